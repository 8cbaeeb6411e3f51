"""Stochastic depth drawn per sample: which branches a sample keeps depends on its key alone.

Draws from torch's generators depend on where in which batch a sample stands, on one rank or
another. A counter-based generator (splitmix64: Steele, Lea and Flood, OOPSLA 2014) has no such
state: the same sample drops the same branches however a global batch is spread, on any device.
"""

from typing import Any

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_BITS = 53  # of a draw


def sample_keys(key: int, indices: Tensor) -> Tensor:
    """One key (B,) int64 for each sample, from a 64-bit `key` of the epoch and indices (B,)."""
    signed = (key & 0xFFFFFFFFFFFFFFFF) - ((key & (1 << 63)) << 1)
    return _mixed(indices * _GAMMA + signed)


def thresholds(rates: list[float]) -> Tensor:
    """What `kept_branches` takes, for the drop rate of each block: (depth, 1, 1) int64."""
    return torch.tensor([round((1 - rate) * (1 << _BITS)) for rate in rates]).view(-1, 1, 1)


def kept_branches(keys: Tensor, limits: Tensor) -> Tensor:
    """Whether a sample keeps each of the two branches of each block: (depth, 2, B) bool.

    Args:
        keys: (B,) int64.
        limits: of `thresholds`, on the same device.
    """
    depth = len(limits)
    counters = torch.arange(1, 2 * depth + 1, device=keys.device).view(depth, 2, 1)
    return _shifted(_mixed(keys + counters * _GAMMA), 64 - _BITS) < limits


def add_rows(x: Tensor, rows: Tensor, added: Tensor) -> Tensor:
    """x (B,...) with `added` (R,...) added to its `rows` (R,), no row twice."""
    return _AddRows.apply(x, rows, added)


class _AddRows(torch.autograd.Function):
    """`index_add`, whose own backward keeps all of `added` to know its shape: 232 MB of a base-size
    batch of 16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, added: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_add(0, rows, added)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        return grads[0], None, grads[0].index_select(0, *ctx.saved_tensors)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's output function; int64 products wrap as unsigned ones do."""
    x = (x ^ _shifted(x, 30)) * _FACTORS[0]
    x = (x ^ _shifted(x, 27)) * _FACTORS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
