"""The arithmetic of a learned codebook: sampling codes, keeping them in use, reviving dead ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from beit.errors import UserError


class HasCodebook(Protocol):
    """What reviving needs to know of a tokenizer."""

    vocab_size: int
    to_logits: nn.Linear  # (D,) -> (V,)
    codebook: nn.Parameter  # (V, C)


def gumbel_softmax(
    logits: Tensor, *, temperature: float, generator: Generator | None = None
) -> Tensor:
    """(..., V) -> relaxed one-hot samples (..., V), by Gumbel noise and a softmax."""
    # log(-log u) is minus a Gumbel draw. exponential_ would save a log, but is six times slower
    # than uniform_ on a CPU and was a third of the training step
    noise = torch.empty_like(logits).uniform_(generator=generator).log_().neg_().log_()
    return (logits - noise).mul_(1 / temperature).softmax(dim=-1)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Mean over positions of KL(softmax(logits) || uniform), in nats: (..., V) -> ()."""
    log_q = logits.log_softmax(dim=-1)
    return (log_q.exp() * log_q).sum(dim=-1).mean() + math.log(logits.shape[-1])


def imbalance(logits: Tensor) -> Tensor:
    """KL(mean over positions of softmax(logits) || uniform), in nats: (..., V) -> ().

    Zero when the batch as a whole uses all codes alike, however sure each position is.
    """
    mean = logits.softmax(dim=-1).flatten(0, -2).mean(dim=0)
    return math.log(mean.numel()) - torch.special.entr(mean.clamp_min(1e-12)).sum()


def feature_sums(features: Tensor, token_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Sum (V, D) and number (V,) of the features (..., D) of the positions that chose each code."""
    flat, ids = features.flatten(0, -2).float(), token_ids.flatten()
    sums = flat.new_zeros(vocab_size, flat.shape[-1]).index_add_(0, ids, flat)
    return sums, torch.bincount(ids, minlength=vocab_size)


@torch.no_grad()
def split_codes(
    tokenizer: HasCodebook,
    dead: Tensor,
    parents: Tensor,
    *,
    centres: Tensor,
    noise: float,
    generator: Generator,
) -> None:
    """Put each dead code beside a busy one: same encoder row and code vector, plus a little noise.

    A parent and its children share the parent's probability, so that a split without noise changes
    nothing that the decoder sees. The noise in a row is taken back by the bias at the middle of the
    parent's positions, so that these are parted in two: features have a large common mean, and
    without this one of the pair would get all of them and the other would be dead again.

    Args:
        dead: (n,) ids of the codes to revive.
        parents: (n,) ids to copy from, repeats allowed, none of them dead.
        centres: (V, D) mean feature of the positions that chose each code.
        noise: standard deviation relative to that of the copied rows.
        generator: on the device of the codebook; in the same state on all ranks.
    """
    family = torch.bincount(parents, minlength=tokenizer.vocab_size) + 1
    bias = tokenizer.to_logits.bias
    bias.sub_(family.to(bias.dtype).log())
    bias[dead] = bias[parents]
    for table in (tokenizer.to_logits.weight, tokenizer.codebook):
        rows = table[parents]
        offsets = torch.empty_like(rows).normal_(generator=generator)
        offsets *= noise * rows.std(unbiased=False)
        table[dead] = rows + offsets
        if table is tokenizer.to_logits.weight:
            bias[dead] -= (offsets * centres[parents]).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class CodeRevival:
    """When a code counts as dead, and when such codes are split off busy ones.

    Args:
        every_steps: optimizer steps over which usage is counted, and after which the dead revive.
        until_share: share of the run after which the codebook is left to settle.
        dead_below: a code is dead if it is used less than this share of the mean usage.
        noise: see `split_codes`.
    """

    every_steps: int
    until_share: float
    dead_below: float
    noise: float

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise UserError(f"every_steps {self.every_steps}: must be at least 1")
        if not 0 <= self.until_share <= 1:
            raise UserError(f"until_share {self.until_share}: must lie in [0, 1]")
        if not 0 <= self.dead_below < 1:
            raise UserError(f"dead_below {self.dead_below}: must lie in [0, 1)")

    def is_due(self, step: int, total_steps: int) -> bool:
        """After `step` optimizer steps of `total_steps`."""
        return step % self.every_steps == 0 and step <= self.until_share * total_steps

    @torch.no_grad()
    def __call__(
        self,
        tokenizer: HasCodebook,
        counts: Tensor,
        *,
        centres: Tensor,
        state: Mapping[Tensor, dict[str, Tensor]],
        generator: Generator,
    ) -> int:
        """Split busy codes, drawn by usage, into the dead ones. Returns how many revived.

        Args:
            counts: (V,) usage over all ranks. Equal counts and generators give equal codebooks, so
                the ranks need no word from each other.
            centres: (V, D) mean feature of the positions that chose each code, over all ranks.
            state: the optimizer's: a child takes over its parent's moments.
        """
        alive = counts >= self.dead_below * counts.float().mean()
        alive &= counts > 0
        dead = (~alive).nonzero().flatten()
        if len(dead) == 0 or not alive.any():
            return 0
        weights = counts.float() * alive
        parents = torch.multinomial(weights, len(dead), replacement=True, generator=generator)
        split_codes(
            tokenizer, dead, parents, centres=centres, noise=self.noise, generator=generator
        )
        for parameter in (tokenizer.to_logits.weight, tokenizer.to_logits.bias, tokenizer.codebook):
            for value in state.get(parameter, {}).values():
                if value.shape == parameter.shape:  # the moments, not the step count
                    value[dead] = value[parents]
        return len(dead)
