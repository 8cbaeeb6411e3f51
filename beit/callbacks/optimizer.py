"""What the optimizer is given: gradient norm and learning rates."""

import lightning as L
import torch
from torch import Tensor

from beit.job.numbers import FiniteGuard, gradient_norm


class OptimizerMonitor(L.Callback):
    """Logs `optim/grad_norm`, `optim/lr` and `optim/lr_lowest` every `log_every_n_steps`.

    - grad_norm: L2 norm over all parameters, unscaled and before clipping, the task's correction
      for unequal micro-batches included.
    - lr: the rate the step is made with, of the fastest group.
    - lr_lowest: that of the slowest one, left out where all are equal. With layer-wise decay it
      is the patch embedding's.

    A norm that isn't finite is logged as it is; `beit.job.numbers` says what becomes of the step.
    """

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step + 1  # the one about to be made
        if step % trainer.log_every_n_steps:
            return
        average = getattr(pl_module, "average", None)  # MeanOverGlobalBatch, which corrects later
        factor = average.gradient_factor(trainer.accumulate_grad_batches) if average else 1.0
        values = {"optim/grad_norm": self._norm(trainer, optimizer) * factor}
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        values["optim/lr"] = torch.tensor(max(rates))
        if min(rates) != max(rates):
            values["optim/lr_lowest"] = torch.tensor(min(rates))
        for name, value in values.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    @staticmethod
    def _norm(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
        """What was worked out for this step already, where the run checks its numbers."""
        for callback in trainer.callbacks:
            if isinstance(callback, FiniteGuard):
                return callback.norm
        return gradient_norm(optimizer)
