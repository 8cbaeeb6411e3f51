"""Where the run stands: a bar in a terminal, a line now and then in a log file."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from beit.callbacks.throughput import Tally, Throughput, peak_memory_mib

log = logging.getLogger(__name__)

BAR_WIDTH = 20


class Progress(L.Callback):
    """Epoch, step, metrics, images/s, share of time waiting for data, time left.

    In a terminal one line is redrawn; elsewhere the same text is logged as a plain line every
    `line_every_seconds`, and at the end of each epoch. It shows the metrics that the task logs with
    `prog_bar=True`; images/s and data wait come from `Throughput`, when that is among the
    trainer's callbacks, and concern the time since the last line.

    Args:
        line_every_seconds: where the output isn't a terminal.
        redraw_every_seconds: in a terminal.
        stream: what to draw on, where it is a terminal.
    """

    def __init__(
        self,
        *,
        line_every_seconds: float = 10.0,
        redraw_every_seconds: float = 0.5,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream or sys.stderr
        self.clock = clock
        self.interactive = self.stream.isatty()
        self.pause_seconds = redraw_every_seconds if self.interactive else line_every_seconds
        self._shown_tally = Tally(0, 0, 0.0, 0.0)
        self._batches = 0  # of this start of the run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = self._shown_at = self.clock()
        self._batches = 0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._batches += 1
        last = batch_idx + 1 == trainer.num_training_batches
        if not trainer.is_global_zero or not (
            last or self.clock() - self._shown_at >= self.pause_seconds
        ):
            return
        self._shown_at = self.clock()
        text = self._describe(trainer, batch_idx)
        if self.interactive:
            self._draw(text, (batch_idx + 1) / max(trainer.num_training_batches, 1))
        else:
            log.info("%s", text)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or not trainer.is_global_zero:
            return
        metrics = [
            f"{name} {_number(float(value))}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        ]
        self._wipe()
        log.info("%s  %s", _epoch(trainer), "  ".join(metrics))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._wipe()
        if not trainer.is_global_zero:
            return
        parts = [f"trained {trainer.global_step} steps", _clock(self.clock() - self._began)]
        throughput = _throughput(trainer)
        if throughput and throughput.tally.seconds:
            parts.append(_rate(throughput.tally))
            parts.append(f"data-wait {throughput.tally.data_wait_share:.1%}")
        parts.append(f"peak memory {peak_memory_mib(trainer.strategy.root_device):,.0f} MiB")
        log.info("%s", "  ".join(parts))

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._wipe()

    def _describe(self, trainer: L.Trainer, batch_idx: int) -> str:
        parts = [_epoch(trainer), _step(trainer, batch_idx), *_metrics(trainer)]
        throughput = _throughput(trainer)
        if throughput:
            recent = throughput.tally.since(self._shown_tally)
            self._shown_tally = throughput.tally
            parts.append(_rate(recent))
            parts.append(f"data-wait {recent.data_wait_share:.1%}")
        left = self._seconds_left(trainer, batch_idx)
        if left is not None:
            parts.append(f"eta {_clock(left)}")
        return "  ".join(parts)

    def _seconds_left(self, trainer: L.Trainer, batch_idx: int) -> float | None:
        """From this start's own pace, validation included; None for a run without an end."""
        # not trainer.estimated_stepping_batches: reading it drops the saved loader state
        ends = []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            epochs = trainer.max_epochs - trainer.current_epoch
            ends.append(epochs * trainer.num_training_batches - batch_idx - 1)
        if trainer.max_steps > 0:
            steps = trainer.max_steps - trainer.global_step
            ends.append(steps * trainer.accumulate_grad_batches)
        if not ends or not math.isfinite(min(ends)):
            return None
        return max(min(ends), 0) * (self.clock() - self._began) / self._batches

    def _draw(self, text: str, done: float) -> None:
        filled = round(BAR_WIDTH * min(done, 1.0))
        line = f"[{'=' * filled}{' ' * (BAR_WIDTH - filled)}] {text}"
        columns = shutil.get_terminal_size().columns
        # back to the first column at the end, so that whatever else is printed covers the bar
        self._write(f"\r\x1b[K{line[: columns - 1]}\r")

    def _wipe(self) -> None:
        if self.interactive:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone, or closed
            self.interactive = False


def _epoch(trainer: L.Trainer) -> str:
    total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{total}"


def _step(trainer: L.Trainer, batch_idx: int) -> str:
    """Optimizer steps of this epoch."""
    accumulate = trainer.accumulate_grad_batches
    total = trainer.num_training_batches
    text = f"step {math.ceil((batch_idx + 1) / accumulate)}"
    return f"{text}/{math.ceil(total / accumulate)}" if math.isfinite(total) else text


def _metrics(trainer: L.Trainer) -> list[str]:
    """The training metrics that the task wants shown, under their short names."""
    shown = {}
    for name, value in trainer.progress_bar_metrics.items():
        if name.startswith("train/") and not name.endswith("_epoch"):
            shown[name.removeprefix("train/").removesuffix("_step")] = float(value)
    return [f"{name} {_number(value)}" for name, value in shown.items()]


def _throughput(trainer: L.Trainer) -> Throughput | None:
    return next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)


def _rate(tally: Tally) -> str:
    rate = tally.images_per_second
    return f"{rate:.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _clock(seconds: float) -> str:
    """Like 12:30, or 3:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
