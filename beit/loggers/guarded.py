"""A logger that cannot hurt the run, whatever it does."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from beit.callbacks.metrics_file import MetricsFile
from beit.loggers.guard import Guard
from beit.markdown import table_of


class GuardedLogger(Logger):
    """Passes everything on to `inner`, until that raises: it is told once and then left alone."""

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self.inner = inner
        name = type(inner).__name__
        self._guard = Guard(f"logger {name}", lost=f"what {name} would have written")

    @property
    def name(self) -> str | None:
        return self._guard(lambda: self.inner.name)

    @property
    def version(self) -> int | str | None:
        return self._guard(lambda: self.inner.version)

    @property
    def save_dir(self) -> str | None:
        return self.inner.save_dir

    @property
    def root_dir(self) -> str | None:
        return self.inner.root_dir

    @property
    def log_dir(self) -> str | None:
        return self.inner.log_dir

    @property
    def group_separator(self) -> str:
        return self.inner.group_separator

    @property
    def experiment(self) -> Any:
        """Of the inner logger, made now if it makes one; None if that fails."""
        return self._guard(getattr, self.inner, "experiment", None)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._guard(self.inner.log_metrics, metrics, step)

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        self._guard(self.inner.log_hyperparams, params, *args, **kwargs)

    def log_graph(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._guard(self.inner.log_graph, model, *args, **kwargs)

    def log_picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Pixels (H, W, 3) uint8, for the loggers that take pictures."""
        self._guard(log_picture, self.inner, name, pixels, step)

    def log_table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Rows with the same keys, for the loggers that take tables."""
        self._guard(log_table, self.inner, name, rows, step)

    def rewind(self, step: int) -> None:
        """The run goes on after `step` optimizer steps: what was logged of later ones is void."""
        self._guard(rewind, self.inner, step)

    def save(self) -> None:
        self._guard(self.inner.save)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        self._guard(self.inner.after_save_checkpoint, checkpoint_callback)

    def finalize(self, status: str) -> None:
        self._guard(self.inner.finalize, status)


class RewindLoggers(L.Callback):
    """Tells the loggers of a run where it begins: at 0, or where a resumed one goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, GuardedLogger):
                    logger.rewind(trainer.global_step)


def log_picture(logger: Logger, name: str, pixels: np.ndarray, step: int) -> None:
    """Pixels (H, W, 3) uint8 to TensorBoard and W&B, guarded or not; other loggers take none."""
    if isinstance(logger, GuardedLogger):
        logger.log_picture(name, pixels, step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, pixels, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [pixels])


def log_table(logger: Logger, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Rows with the same keys to TensorBoard, as text, and W&B; guarded or not, as a picture."""
    columns = list(rows[0])
    if isinstance(logger, GuardedLogger):
        logger.log_table(name, rows, step)
    elif isinstance(logger, TensorBoardLogger):
        cells = [["" if row[key] is None else str(row[key]) for key in columns] for row in rows]
        logger.experiment.add_text(name, table_of(columns, cells), step)
    elif isinstance(logger, WandbLogger):
        logger.log_table(
            name, columns=columns, data=[[row[key] for key in columns] for row in rows]
        )


def rewind(logger: Logger, step: int) -> None:
    """What stands in the log of optimizer steps after the first `step` is dropped.

    From metrics.csv at once. TensorBoard leaves it out when it reads the files. W&B cannot: there
    the repeated steps stand twice.
    """
    if isinstance(logger, MetricsFile):
        logger.rewind(step)
    elif isinstance(logger, TensorBoardLogger) and step:
        _purge(logger.experiment.file_writer.add_event, step)


def _purge(add_event: Callable[[Any], None], step: int) -> None:
    """What SummaryWriter(purge_step=...) writes; that one is made before the step is known."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    add_event(Event(step=step, file_version="brain.Event:2"))
    add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
