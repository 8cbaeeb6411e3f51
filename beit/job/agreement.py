"""What all ranks know of each other at the boundary between two optimizer steps."""

from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist

from beit.job import signals
from beit.job.signals import NUMBERS

# a rank beside the weight of its signal in one number, so that the maximum is of one rank
_RANKS = 1 << 20


class Asked(NamedTuple):
    """A stop that the job was asked for."""

    number: int  # the signal
    rank: int  # of those that got it the highest


class Agreement:
    """One all-reduce of three numbers a step; none in a job of a single process.

    It has a gloo group of its own: it works beside NCCL's, on the CPU, and without waiting for the
    device.
    """

    def __init__(self) -> None:
        self.stop: Asked | None = None
        self._group: Any = None
        self._rank = 0

    def connect(self, trainer: L.Trainer) -> None:
        """To be called on all ranks, once there is a process group."""
        self.stop = None
        self._rank = trainer.global_rank
        if self._group is None and trainer.world_size > 1:
            timeout = getattr(trainer.strategy, "_timeout", None)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def meet(self, *facts: bool) -> list[bool]:
        """Whether each fact holds on any rank; `stop` is then the same everywhere."""
        asked = signals.current()
        own = 0
        if asked is not None and asked.stop is not None:
            own = (1 + NUMBERS.index(asked.stop.number)) * _RANKS + self._rank
        values = [own, *map(int, facts)]
        if self._group is not None:
            tensor = torch.tensor(values)
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
            values = tensor.tolist()
        weight, rank = divmod(values[0], _RANKS)
        self.stop = Asked(NUMBERS[weight - 1], rank) if weight else None
        return [bool(value) for value in values[1:]]

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of the ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values
