"""A run that is asked to stop: all ranks finish the step, a checkpoint is written, they leave."""

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from beit.checkpoints.keeper import CheckpointKeeper
from beit.checkpoints.loops import ends_epoch, ends_run, validation_due
from beit.job import signals, slurm
from beit.job.agreement import Agreement
from beit.job.exits import RunEnd, of_signal
from beit.job.settings import JobSettings
from beit.job.signals import FIRST_STEP_SECONDS, Interrupted, Stop
from beit.job.takeover import take_over

log = logging.getLogger(__name__)

_STEPS_REMEMBERED = 8


class Stopped(RunEnd):
    """The run was asked to stop, and did."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = of_signal(number)
        self.told = True


class Stopping(L.Callback):
    """Ends a run that was sent SIGTERM, SIGINT or SIGUSR1, to whatever process of it.

    - While training: after the optimizer step under way, which the ranks agree on (`Agreement`).
    - While waiting for a batch, in a job of one process: at once, if no gradients are pending.
    - While validating: after the batch under way. What is saved is the state before the
      validation, with the weights that are trained, not their average: the resumed run validates
      from the beginning, and no metric of half a validation is logged.
    - Before training: at once (`signals`).

    A run whose last step is done is not stopped any more: it ends as it would.

    It comes after what changes weights, or its checkpoint would lack that.
    """

    def __init__(self, settings: JobSettings, *, agreement: Agreement) -> None:
        self.settings = settings
        self.agreement = agreement
        self._seconds: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._stepped_at = 0.0
        self._step_before = 0
        self._ended: Stopped | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            take_over(trainer, self._raise)
            self.agreement.connect(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended, self._step_before = None, trainer.global_step
        self._stepped_at = time.monotonic()
        self._expect(FIRST_STEP_SECONDS)
        asked = signals.current()
        if asked is not None:
            asked.seconds = self.settings.stop_seconds
        if trainer.world_size == 1 and asked is not None:
            self._watch_fetches(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step_before:
            return
        self._step_before = trainer.global_step
        now = time.monotonic()
        self._seconds.append(now - self._stepped_at)
        self._stepped_at = now
        self._expect(max(self._seconds))
        # on the way there it is asked again
        later = ends_epoch(trainer) or validation_due(trainer) or ends_run(trainer)
        if self.agreement.stop is not None and not later:
            self._end(trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe_end_validation(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe_end_validation(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._stepped_at = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.agreement.stop is not None and not ends_run(trainer):
            self._end(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Interrupted):
            self.agreement.meet()
            loop: Any = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped -= 1  # where checkpoints are taken it is not counted yet
            self._end(trainer)
            exception.end = self._ended

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        asked = signals.current()
        if asked is not None:
            asked.saved = "after the last step"

    def _expect(self, seconds: float) -> None:
        asked = signals.current()
        if asked is not None:
            asked.may_take(seconds)

    def _maybe_end_validation(self, trainer: L.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self.agreement.meet()
        if self.agreement.stop is not None:
            self._end(trainer)
            self._raise()

    def _end(self, trainer: L.Trainer) -> None:
        """Save; `_raise` ends the run once Lightning has logged the step."""
        stop = self.agreement.stop
        assert stop is not None
        asked = signals.current()
        if asked is not None:
            asked.stop = asked.stop or Stop(stop.number, time.monotonic())
        with signals.held():
            path = keeper_saves(trainer)
            if asked is not None and path:
                asked.saved = f"checkpoint {path}"
            self._ended = Stopped(self._message(trainer, path), stop.number)
            if trainer.is_global_zero:
                log.warning("%s", self._ended)
                slurm.requeue(self.settings, stop.number)

    def _message(self, trainer: L.Trainer, path: Path | None) -> str:
        stop = self.agreement.stop
        assert stop is not None
        name = Stop(stop.number, 0.0).name
        where = f" (rank {stop.rank})" if trainer.world_size > 1 else ""
        saved = f"checkpoint {path}; go on with resume=auto" if path else "no checkpoint is kept"
        return f"stopped by {name}{where} after step {trainer.global_step}: {saved}"

    def _raise(self) -> None:
        if self._ended is not None:
            raise self._ended

    def _watch_fetches(self, trainer: L.Trainer) -> None:
        """Waiting for a batch may be interrupted where no gradients are pending."""
        loop: Any = trainer.fit_loop.epoch_loop
        before, after = loop._on_before_fetch, loop._on_after_fetch
        window: list[Any] = []

        def start() -> None:
            before()
            ready = loop.batch_progress.current.ready
            asked = signals.current()
            if asked is not None and ready and ready % trainer.accumulate_grad_batches == 0:
                window.append(asked.may_interrupt())
                window[-1].__enter__()

        def stop() -> None:
            while window:
                window.pop().__exit__(None, None, None)
            after()

        loop._on_before_fetch, loop._on_after_fetch = start, stop


def keeper_saves(trainer: L.Trainer) -> Path | None:
    """A checkpoint of this moment, by the callback that keeps them; None where there is none."""
    for callback in trainer.callbacks:
        if isinstance(callback, CheckpointKeeper):
            return callback.save_now(trainer)
    return None
