"""What the guards of a run cost: the same training through `beit train`, and by Lightning alone."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from omegaconf import DictConfig

from beit import config, runner
from beit.callbacks.randomness import KeyedRandomness
from beit.checkpoints.plugin import CheckpointFiles
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import alternate

ROW = "Guards: a step with and without them"
_FEW_STEPS = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1")  # one interval


class Intervals(L.Callback):
    """Seconds from one batch to the next, within an epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if batch_idx > 0:
            self.seconds.append(now - self._begun)
        self._begun = now


def run(settings: Settings) -> list[Table]:
    torch.manual_seed(0)
    seconds = alternate(
        {
            "guarded": lambda: _step_seconds(settings, guarded=True),
            "Lightning alone": lambda: _step_seconds(settings, guarded=False),
        },
        rounds=settings.rounds,
    )
    entries = [Entry(name, values) for name, values in seconds.items()]
    pairs = zip(*seconds.values(), strict=True)
    extra = statistics.median(guarded / bare - 1 for guarded, bare in pairs)
    notes = [
        "a value is the median step of one run; both have the same data, task, loggers and other "
        f"callbacks. In pairs of runs the guards cost {100 * extra:+.1f} % in the median."
    ]
    return [Table(f"the demo's pretraining, batch {_batch(settings)}", entries, notes=notes)]


def _batch(settings: Settings) -> int:
    return settings.number(128, 8)


def _step_seconds(settings: Settings, *, guarded: bool) -> float:
    intervals = Intervals()
    with tempfile.TemporaryDirectory() as folder:
        cfg = _config(settings, folder)
        if guarded:
            build = runner.build_trainer

            def watched(*arguments: Any) -> L.Trainer:
                trainer = build(*arguments)
                trainer.callbacks.append(intervals)  # type: ignore[attr-defined]
                return trainer

            with mock.patch.object(runner, "build_trainer", watched):
                runner.fit(cfg)
        else:
            _bare(cfg, intervals)
    return statistics.median(intervals.seconds)


def _bare(cfg: DictConfig, intervals: Intervals) -> None:
    """What `runner.fit` does, without what watches over it."""
    config.settle_devices(cfg)
    Path(cfg.paths.output_dir).mkdir(parents=True)
    L.seed_everything(cfg.seed, verbose=False)
    task, data = runner.build(cfg, 1)
    callbacks = [config.instantiate(node) for node in (cfg.callbacks or {}).values() if node]
    loggers = [config.instantiate(node) for node in cfg.logger.values() if node]
    trainer = config.instantiate(
        cfg.trainer,
        callbacks=[KeyedRandomness(cfg.seed), *callbacks, intervals],
        logger=loggers,
        plugins=[CheckpointFiles()],
    )
    trainer.fit(task, datamodule=data)


def _config(settings: Settings, folder: str) -> DictConfig:
    return config.compose(
        [
            "task=mim",
            "model=micro",
            "tokenizer=dvae_tiny",
            "data=digits",
            "logger=csv",
            "callbacks=default",
            f"batch.global_size={_batch(settings)}",
            f"batch.per_device={_batch(settings)}",
            "optim.warmup_epochs=0",
            "loader.check_images=0",
            f"trainer.max_epochs={settings.number(6, 1)}",
            *(_FEW_STEPS if settings.quick else ()),
            f"paths.runs_dir={folder}",
            "paths.output_dir=${paths.runs_dir}/run",
            "name=run",
        ]
    )
