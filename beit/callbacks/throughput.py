"""How fast training runs, how much of the time it waits for data, how much memory it takes."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.trainer.states import TrainerFn


class Tally(NamedTuple):
    """What has been counted since training began; differences of two give rates."""

    images: int  # over all devices
    steps: int  # optimizer steps
    seconds: float  # spent training, validation and what follows an epoch left out
    wait_seconds: float  # of these, spent in asking the loader for the next batch

    def since(self, earlier: "Tally") -> "Tally":
        return Tally(
            self.images - earlier.images,
            self.steps - earlier.steps,
            self.seconds - earlier.seconds,
            self.wait_seconds - earlier.wait_seconds,
        )

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        """In [0, 1]."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps if self.steps else 0.0


class Throughput(L.Callback):
    """Logs `throughput/*` and `memory/peak_mib` every `log_every_n_steps` of the trainer.

    - images_per_second: images of all devices over the time spent training since the last entry;
      validation, pictures at the end of an epoch and checkpoints there are left out.
    - data_wait_share: share of that time in which this process stood still for the next batch,
      in [0, 1], mean over the ranks. Moving the batch, and the tokenizer, are work, not waiting.
      On a GPU it is an upper bound: the device may still be busy with the step before.
    - step_seconds: of one optimizer step, all its accumulated micro-batches together.
    - memory/peak_mib: peak of the device's allocator on a GPU, of the process on the CPU (loader
      workers not counted); the largest of all ranks.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.tally = Tally(0, 0, 0.0, 0.0)
        self._logged = self.tally
        self._running_since: float | None = None
        self._step_before = 0

    # the clock runs from the start of an epoch to its end, except during validation
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step_before = trainer.global_step
        trainer.profiler = FetchTimer(trainer.profiler, self.clock, self._add_wait)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop()
        self._restore(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._lap()
        stepped = trainer.global_step - self._step_before
        self._step_before = trainer.global_step
        self.tally = self.tally._replace(
            images=self.tally.images + len(batch.indices) * trainer.world_size,
            steps=self.tally.steps + stepped,
        )
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        recent = self.tally.since(self._logged)
        self._logged = self.tally
        means = {
            "throughput/images_per_second": recent.images_per_second,
            "throughput/data_wait_share": recent.data_wait_share,
            "throughput/step_seconds": recent.step_seconds,
        }
        spread = trainer.world_size > 1
        for name, value in means.items():
            pl_module.log(name, value, on_epoch=False, batch_size=1, sync_dist=spread)
        peak = peak_memory_mib(trainer.strategy.root_device)
        pl_module.log(
            "memory/peak_mib",
            peak,
            on_epoch=False,
            batch_size=1,
            sync_dist=spread,
            reduce_fx="max",
        )

    def _start(self) -> None:
        self._running_since = self.clock()

    def _lap(self) -> None:
        if self._running_since is not None:
            now = self.clock()
            seconds = self.tally.seconds + now - self._running_since
            self.tally = self.tally._replace(seconds=seconds)
            self._running_since = now

    def _stop(self) -> None:
        self._lap()
        self._running_since = None

    def _add_wait(self, seconds: float) -> None:
        self.tally = self.tally._replace(wait_seconds=self.tally.wait_seconds + seconds)

    @staticmethod
    def _restore(trainer: L.Trainer) -> None:
        if isinstance(trainer.profiler, FetchTimer):
            trainer.profiler = trainer.profiler.inner


class FetchTimer(Profiler):
    """Times the trainer's fetching of training batches and passes everything on to `inner`.

    Between two batches Lightning also logs, validates, saves and moves data to the device; only
    its profiler tells the fetch apart from the rest.
    """

    ACTION = "[_TrainingEpochLoop].train_dataloader_next"

    def __init__(
        self, inner: Profiler, clock: Callable[[], float], report: Callable[[float], None]
    ) -> None:
        super().__init__()
        self.inner, self.clock, self.report = inner, clock, report
        self._began = 0.0

    def start(self, action_name: str) -> None:
        if action_name == self.ACTION:
            self._began = self.clock()
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        self.inner.stop(action_name)
        if action_name == self.ACTION:
            self.report(self.clock() - self._began)

    def summary(self) -> str:
        return self.inner.summary()

    def describe(self) -> None:
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        """Nothing: `inner` goes on serving the trainer, and the base's `__del__` comes here too."""


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the allocator on a GPU, resident of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
