"""Whether a run that reached its end did what was planned: steps, images, learning rate."""

import logging
import math
from typing import Any

import lightning as L
import torch

from beit.data.loading import resume_position
from beit.job.exits import Exit, RunEnd
from beit.tasks.accounting import sum_over_ranks
from beit.tasks.planning import planned_steps

log = logging.getLogger(__name__)


class OffPlan(RunEnd):
    """The run ended, and it is not the run that was planned."""

    code = Exit.FAULT


class PlanCheck(L.Callback):
    """Counts what is trained on; at the end compares it with the plan, in one line.

    Of a resumed run the images since the resume are counted, against the steps that were left: with
    the steps themselves, which Lightning counts over the whole run, nothing can have been left out
    or done twice. The learning rate is compared with the closed form of its schedule.
    """

    def __init__(self) -> None:
        self._start = 0
        self._images = 0  # of this rank, since the start
        self._faults: list[str] = []
        self._line = ""
        self._validated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._images = trainer.global_step, 0
        per_epoch, _ = planned_steps(trainer)
        epoch, batch = resume_position(trainer, _micro_batches(trainer))
        place = epoch * per_epoch + math.ceil(batch / trainer.accumulate_grad_batches)
        if place != self._start and trainer.is_global_zero:
            log.warning(
                "the run goes on after step %d in epoch %d, micro-batch %d, which is step %d of "
                "the plan: what an epoch is must have changed",
                *(self._start, epoch, batch, place),
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._images += len(batch.indices)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        images = torch.tensor(self._images, device=pl_module.device)
        seen = int(sum_over_ranks(images))
        per_epoch, planned = planned_steps(trainer)
        done = trainer.global_step
        early = trainer.should_stop and done < planned
        end = done if early else planned
        left = planned_images(trainer, end) - planned_images(trainer, self._start)
        self._faults = [] if early else _differs("optimizer steps", done, planned)
        self._faults += _differs("images", seen, left)
        for found, expected in _rates(trainer, pl_module, end, (per_epoch, planned)):
            if not math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-12):
                self._faults += _differs("final learning rate", f"{found:.6g}", f"{expected:.6g}")
                break
        since = f" since step {self._start}" if self._start else ""
        rate = max((group["lr"] for group in trainer.optimizers[0].param_groups), default=0.0)
        if not (early or self._start or self._validated):
            self._warn_of_no_validation(trainer)
        self._line = (
            f"{'stopped early' if early else 'as planned'}: {done} of {planned} optimizer steps, "
            f"{seen} images{since}, learning rate {rate:.3g} at the end"
        )

    def _warn_of_no_validation(self, trainer: L.Trainer) -> None:
        has_images = trainer.datamodule.loaders.val_data is not None and trainer.limit_val_batches
        if has_images and trainer.is_global_zero:
            log.warning(
                "no validation was due within the run's %d steps: there are no val/ metrics and no "
                "best checkpoint (+trainer.val_check_interval=N validates every N micro-batches)",
                trainer.global_step,
            )

    def conclude(self) -> None:
        """Say what was found. Raises OffPlan where it is not the plan."""
        if self._faults:
            raise OffPlan(f"the run is not the one that was planned: {'; '.join(self._faults)}")
        if self._line:
            log.info("%s", self._line)


def conclude(trainer: L.Trainer) -> None:
    """What the trainer's PlanCheck found, said; to be called when `fit` has returned."""
    for callback in trainer.callbacks:
        if isinstance(callback, PlanCheck):
            callback.conclude()


def planned_images(trainer: L.Trainer, steps: int) -> int:
    """Images in the first `steps` optimizer steps of a run, over all ranks."""
    accumulate, world_size = trainer.accumulate_grad_batches, trainer.world_size
    spread = {"world_size": world_size, "accumulate": accumulate}
    loaders = trainer.datamodule.loaders
    at_once = loaders.settings.batch_size_per_device * world_size
    tail = loaders.tail_sizes(**spread)
    whole = trainer.datamodule.micro_batches(**spread) - len(tail) // world_size
    batches = trainer.num_training_batches
    in_epoch = min(batches, whole) * at_once + sum(tail[: max(0, batches - whole) * world_size])
    per_epoch, _ = planned_steps(trainer)
    epochs, rest = divmod(steps, per_epoch)
    return int(epochs * in_epoch + rest * accumulate * at_once)


def _micro_batches(trainer: L.Trainer) -> int:
    spread = {
        "world_size": trainer.world_size,
        "accumulate": trainer.accumulate_grad_batches,
    }
    return trainer.datamodule.micro_batches(**spread)


def _rates(
    trainer: L.Trainer, task: Any, step: int, plan: tuple[int, int]
) -> list[tuple[float, float]]:
    """(found, planned) learning rate of each parameter group after `step` optimizer steps."""
    planned = task.optim.rate_at(step, steps_per_epoch=plan[0], total_steps=plan[1])
    groups = trainer.optimizers[0].param_groups
    return [(group["lr"], planned * group["lr_scale"]) for group in groups]


def _differs(what: str, found: Any, expected: Any) -> list[str]:
    return [] if found == expected else [f"{found} {what} where {expected} were planned"]
