"""What the optimizer is given: gradient norm and learning rates."""

import logging

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

log = logging.getLogger(__name__)


class OptimizerMonitor(L.Callback):
    """Logs `optim/grad_norm`, `optim/lr` and `optim/lr_lowest` every `log_every_n_steps`.

    - grad_norm: L2 norm over all parameters, unscaled and before clipping. It is taken just
      before the task's own `on_before_optimizer_step`: a correction made there is not in it.
    - lr: the rate the step is made with, of the fastest group.
    - lr_lowest: that of the slowest one, left out where all are equal. With layer-wise decay it
      is the patch embedding's.

    A norm that isn't finite is logged as it is; the first one is warned of. Under fp16 a few are
    ordinary while the loss scale is being found.
    """

    def __init__(self) -> None:
        self._warned = False

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step + 1  # the one about to be made
        if step % trainer.log_every_n_steps:
            return
        norm = gradient_norm(optimizer)
        if not self._warned and not torch.isfinite(norm):
            log.warning("step %d: the gradient's norm is %s", step, norm.item())
            self._warned = True
        values = {"optim/grad_norm": norm}
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        values["optim/lr"] = torch.tensor(max(rates))
        if min(rates) != max(rates):
            values["optim/lr_lowest"] = torch.tensor(min(rates))
        for name, value in values.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """L2 norm of all gradients that the optimizer sees: a scalar, 0 where there are none."""
    groups = optimizer.param_groups
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return get_total_norm(grads).float() if grads else torch.tensor(0.0)
