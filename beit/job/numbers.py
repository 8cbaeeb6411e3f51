"""Numbers that are not finite: found on all ranks before the weights change, named by image."""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from beit.data.dataset import KeyedDataset
from beit.data.loading import Loaders
from beit.errors import UserError
from beit.job.agreement import Agreement
from beit.job.exits import Exit, RunEnd

log = logging.getLogger(__name__)

_NAMED = 4  # images of the first micro-batch in the message; the file has all of them


class NotFinite(RunEnd):
    """The loss or its gradient was not finite; the weights are those of the step before."""

    code = Exit.NOT_FINITE


class MicroBatch(NamedTuple):
    """Which samples a micro-batch of the window had."""

    epoch: int
    number: int
    indices: Tensor


class Fault(NamedTuple):
    """What one rank has to tell of a window."""

    rank: int
    what: str  # loss | gradient
    parts: list[tuple[int, int, list[int]]]  # (epoch, micro-batch, samples) of those at fault
    names: list[str]  # of the first samples
    written: str  # where to, or why not


class FiniteGuard(L.Callback):
    """Checks the losses of all micro-batches and the gradient's norm before each optimizer step.

    Where one is not finite on any rank, all ranks leave the step out: its gradients are dropped,
    so that the optimizer neither moves nor decays a weight, and running means are put back; the
    learning rate goes on. Beyond `max_nonfinite_steps` of them NotFinite ends the run before the
    weights change. The images of the micro-batches at fault are written to `folder`.

    An infinite gradient under fp16 is left to the loss scale, as long as that can still fall.

    It comes before what else reads the gradients. `norm` is that of the step under way.
    """

    def __init__(self, folder: Path, *, agreement: Agreement, max_nonfinite_steps: int) -> None:
        self.folder = folder
        self.agreement = agreement
        self.max_nonfinite_steps = max_nonfinite_steps
        self.skipped = 0
        self.norm = torch.tensor(0.0)
        self._window: list[MicroBatch] = []
        self._losses: list[Tensor] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []  # and what they were before the window

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.agreement.connect(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window, self._losses = [], []
            if self.skipped < self.max_nonfinite_steps:
                # running means see the images too, before anything is checked
                self._buffers = [
                    (b, b.clone()) for b in pl_module.buffers() if b.is_floating_point()
                ]
        indices = getattr(batch, "indices", torch.empty(0, dtype=torch.int64))
        self._window.append(MicroBatch(trainer.current_epoch, batch_idx, indices))

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.norm = gradient_norm(optimizer)
        device = self.norm.device
        # the one look at the device in a step
        values = [*(loss.to(device) for loss in self._losses), self.norm]
        *losses, norm = torch.stack(values).tolist()
        bad_loss = not all(map(math.isfinite, losses))
        any_loss, any_gradient = self.agreement.meet(bad_loss, not math.isfinite(norm))
        if any_loss or (any_gradient and not _scale_can_fall(trainer)):
            self._leave_out(trainer, optimizer, losses, norm, any_loss)
        if self.max_nonfinite_steps:
            pl_module.log("optim/skipped_steps", float(self.skipped), on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _leave_out(
        self,
        trainer: L.Trainer,
        optimizer: torch.optim.Optimizer,
        losses: list[float],
        norm: float,
        any_loss: bool,
    ) -> None:
        step = trainer.global_step + 1  # the one about to be made
        self.skipped += 1
        faults = self.agreement.gather(self._examine(trainer, step, losses, norm, any_loss))
        message = describe(step, [fault for fault in faults if fault is not None])
        if self.skipped > self.max_nonfinite_steps:
            end = NotFinite(message + _mend(self.max_nonfinite_steps))
            if trainer.world_size == 1:  # else the watch over the ranks tells it, once
                log.error("%s", end)
                end.told = True
            raise end
        log.warning("%s; step left out, %d of %d", message, self.skipped, self.max_nonfinite_steps)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def _examine(
        self, trainer: L.Trainer, step: int, losses: list[float], norm: float, any_loss: bool
    ) -> Fault | None:
        """What this rank has to tell, its images on the disk; None where it is not at fault.

        An infinite gradient of finite losses may be any micro-batch's, and any rank's: the ranks'
        mean is all that is left of it.
        """
        at_fault = self._window
        if any_loss:
            pairs = zip(self._window, losses, strict=True)
            at_fault = [part for part, loss in pairs if not math.isfinite(loss)]
        if not at_fault:
            return None
        parts = [(part.epoch, part.number, part.indices.tolist()) for part in at_fault]
        first = parts[0][2][:_NAMED]
        source = _train_data(trainer).source
        file = self.folder / f"step{step:07d}-rank{trainer.global_rank}.safetensors"
        about = {"step": step, "losses": losses, "gradient_norm": norm, "rank": trainer.global_rank}
        written = f"written to {file}"
        try:
            write_batches(file, trainer.datamodule.loaders, parts, about)
        except (OSError, SafetensorError, UserError, RunEnd) as error:
            written = f"not written ({error})"  # that is not what ends the run
        what = "loss" if any_loss else "gradient"
        return Fault(trainer.global_rank, what, parts, [source.name(i) for i in first], written)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """L2 norm of all gradients that the optimizer sees: a scalar, 0 where there are none."""
    groups = optimizer.param_groups
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return get_total_norm(grads).float() if grads else torch.tensor(0.0)


def describe(step: int, faults: list[Fault]) -> str:
    """One sentence: step, ranks, micro-batches and samples."""
    parts = []
    for fault in faults:
        (epoch, number, indices), more = fault.parts[0], len(fault.parts) - 1
        samples = ", ".join(f"{i} ({name})" for i, name in zip(indices, fault.names))
        rest = len(indices) - len(fault.names)
        samples += f" and {rest} more" if rest > 0 else ""
        others = f", and {more} more micro-batches" if more else ""
        parts.append(
            f"rank {fault.rank}, epoch {epoch}, micro-batch {number}, samples {samples}{others}, "
            f"{fault.written}"
        )
    what = faults[0].what if faults else "loss"
    return f"step {step}: the {what} is not finite: {'; '.join(parts)}"


def write_batches(
    file: Path, loaders: Loaders, parts: list[tuple[int, int, list[int]]], about: dict[str, Any]
) -> None:
    """The micro-batches as the loader yields them, made again from (epoch, index).

    Tensors are named as `micro3.images`; `about` and the samples stand in the metadata.
    """
    tensors = {}
    for epoch, number, indices in parts:
        samples = [loaders.train_data[epoch, index] for index in indices]
        for name, value in loaders.collate(samples)._asdict().items():
            tensors[f"micro{number}.{name}"] = value.contiguous()
    samples_of = {f"micro{number}": [epoch, indices] for epoch, number, indices in parts}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"beit": json.dumps({**about, "samples": samples_of})})


def _train_data(trainer: L.Trainer) -> KeyedDataset:
    return trainer.datamodule.loaders.train_data


def _mend(allowed: int) -> str:
    done = f" ({allowed} such steps were left out before)" if allowed else ""
    return (
        f"{done}; the weights and checkpoints are those of the step before: resume=auto with a "
        "lower optim.lr or trainer.precision=32-true, or with job.max_nonfinite_steps=N"
    )


def _scale_can_fall(trainer: L.Trainer) -> bool:
    """Whether fp16's loss scale is at work: infinite gradients are how it finds its size."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1.0
