"""What the tasks count: the global batch's mean, and how often each visual token occurs."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over the ranks of the job, in place; the value as it is without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


class MeanOverGlobalBatch:
    """Turns a micro-batch's sum of losses into its share of the mean over the global batch.

    DDP averages gradients over ranks and Lightning divides a loss by the accumulated
    micro-batches; both are means of means, wrong where the parts hold different numbers of terms
    (masked patches; images of an epoch's incomplete last batch). Each micro-batch is divided by the
    job-wide count of the first one of its window, and at the end of the window the gradients are
    corrected by first / mean count. The epoch's last window may be cut short: it too becomes a
    plain mean.
    """

    def __init__(self) -> None:
        self._reference = torch.tensor(0.0)
        self._counts: list[Tensor] = []
        self.mean = torch.tensor(0.0)  # of the last micro-batch: this rank's share of it, to log
        self.total, self.count = torch.tensor(0.0), 0  # of the last micro-batch, this rank's own

    def __call__(
        self, task: L.LightningModule, total: Tensor, count: int, batch_idx: int
    ) -> Tensor:
        """The loss to return from `training_step` for a sum `total` over `count` terms.

        Equals the global batch's mean loss where nothing is accumulated.
        """
        if count == 0:
            raise AssertionError("an empty mask reached the loss")
        everywhere = sum_over_ranks(torch.tensor(float(count), device=total.device))
        if batch_idx % task.trainer.accumulate_grad_batches == 0:
            self._reference, self._counts = everywhere, []
        self._counts.append(everywhere)
        self.total, self.count = total.detach(), count
        scaled = total * task.trainer.world_size
        self.mean = scaled.detach() / everywhere
        return scaled / self._reference

    def gradient_factor(self, accumulate: int) -> Tensor | float:
        """What `correct_gradients` multiplies the window's gradients by."""
        if accumulate == 1:
            return 1.0
        return self._reference * accumulate / torch.stack(self._counts).sum()

    def correct_gradients(self, task: L.LightningModule) -> None:
        """To be called once the window's gradients are complete, before they are clipped."""
        factor = self.gradient_factor(task.trainer.accumulate_grad_batches)
        grads = [p.grad for p in task.parameters() if p.grad is not None]
        if isinstance(factor, Tensor) and grads:  # there are none in a step that is left out
            torch._foreach_mul_(grads, factor.to(grads[0].dtype))


class TokenHistogram(Metric):
    """Counts of each visual token over an epoch and all ranks: (V,) int64.

    An accuracy in predicting tokens means little by itself: a model that always guesses the
    commonest token reaches `commonest_share`.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(vocab_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, token_ids: Tensor) -> None:
        self.counts += torch.bincount(token_ids.flatten(), minlength=self.counts.numel())

    def compute(self) -> Tensor:
        return self.counts

    def commonest_share(self) -> Tensor:
        """Share of the commonest token, in [0, 1]."""
        counts = self.compute().double()
        return (counts.max() / counts.sum().clamp(min=1)).float()

    def used_share(self) -> Tensor:
        """Share of the vocabulary that occurs at all, in [0, 1]."""
        return (self.compute() > 0).float().mean()

    def perplexity(self) -> Tensor:
        """exp of the entropy of the tokens' distribution, in [1, V]."""
        counts = self.compute().double()
        shares = counts / counts.sum().clamp(min=1)
        return torch.special.entr(shares).sum().exp().float()

    def named(self) -> dict[str, Tensor]:
        """What guessing the commonest token reaches, and of how many tokens."""
        return {
            "commonest_token_acc": self.commonest_share(),
            "token_perplexity": self.perplexity(),
        }
