"""Which samples a rank sees, and in which order: a function of (seed, epoch) alone."""

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from beit.errors import UserError

# what becomes of an epoch's last incomplete global batch: left out, an optimizer step of its own,
# or (evaluation) spread over all batches of the epoch
LastBatch = Literal["drop", "keep", "even"]


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one rank, as lists of (epoch, index).

    In training the i-th micro-batch of rank r is
    order[(i * world_size + r) * b : (i * world_size + r + 1) * b], b = batch_size,
    so the optimizer steps see the same samples however a global batch of
    batch_size * world_size * accumulate is spread.

    The samples that are left over for the epoch's last, incomplete global batch are left out with
    `last_batch` "drop". With "keep" they are dealt out: the ranks together see each of them once,
    in batches of at most batch_size whose sizes differ by at most one, and each rank has as many of
    them. (DDP waits for all ranks at every batch. With batch_size 1 some batches have two samples
    for that.) Evaluation, "even", deals out the whole epoch in this way.
    Without `shuffle` the epoch stays 0: evaluation draws the same crops and masks each time.

    With `repeats` r (repeated augmentation: Hoffer et al., arXiv 1901.09335) an epoch has as many
    samples as ever, which are r draws of each of its first size / r images: side by side in the
    order, so that all but those at its ends are in one global batch. The draws in epoch e are keyed
    as those of the epochs e * r ... e * r + r - 1, which no other epoch uses.

    Raises:
        UserError: fewer samples than one global batch in training; fewer samples to be dealt out
            than ranks.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        accumulate: int = 1,
        seed: int,
        shuffle: bool,
        last_batch: LastBatch,
        repeats: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        assert repeats == 1 or (repeats > 1 and shuffle)
        assert batch_size > 0
        assert accumulate > 0
        self.size = size
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.seed = seed
        self.shuffle = shuffle
        self.repeats = repeats
        self.epoch = 0
        self._start = 0
        if last_batch == "even":
            self._full, self._tail = 0, evaluation_batches(size, batch_size, world_size)
        else:
            spread = {"world_size": world_size, "accumulate": accumulate}
            self._full = full_steps(size, batch_size, **spread) * accumulate
            keep = last_batch == "keep"
            self._tail = len(tail_sizes(size, batch_size, **spread)) // world_size if keep else 0

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Itself: Lightning looks for `set_epoch` at loader.batch_sampler.sampler, nowhere else."""
        return self

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self) // self.accumulate)

    def __len__(self) -> int:
        """Micro-batches of this rank in a full epoch, also when it begins in the middle."""
        return self._full + self._tail

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iterator. Lightning calls this, also after it called iter()."""
        if self.shuffle and epoch != self.epoch:
            self.epoch = epoch
            self._start = 0

    def start(self, micro_batch: int) -> None:
        """Begin the current epoch at this micro-batch; nothing before it is loaded."""
        self._start = micro_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # epoch and start are read here, not at the first next(): set_epoch may come in between
        return self._batches(self.epoch, self._start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.size, self.seed, epoch) if self.shuffle else np.arange(self.size)
        for i in range(start, len(self)):
            places = range(*self._bounds(i * self.world_size + self.rank))
            # // and %: which image of the order, and which of its draws
            yield [
                (epoch * self.repeats + place % self.repeats, int(order[place // self.repeats]))
                for place in places
            ]

    def _bounds(self, batch: int) -> tuple[int, int]:
        """Where a batch of the job begins and ends in the order."""
        full = self._full * self.world_size
        if batch < full:
            return batch * self.batch_size, (batch + 1) * self.batch_size
        first = full * self.batch_size
        bounds = _dealt(self.size - first, self._tail * self.world_size)
        return first + bounds[batch - full], first + bounds[batch - full + 1]


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(size), the same under every version of NumPy (raw 64-bit draws)."""
    # not Generator.permutation, whose stream NumPy may change
    return np.argsort(np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(size))


def limited(micro_batches: int, limit: float | int | None) -> int:
    """Micro-batches of an epoch under Trainer's `limit_train_batches`: so many, or a share."""
    if limit is None:
        return micro_batches
    return min(micro_batches, limit) if isinstance(limit, int) else int(micro_batches * limit)


def full_steps(size: int, batch_size: int, world_size: int, accumulate: int) -> int:
    """Complete global batches in an epoch. Raises UserError if there is none."""
    global_batch = batch_size * world_size * accumulate
    if size < global_batch:
        raise UserError(
            f"{size} training images are fewer than one global batch of {global_batch} "
            f"({batch_size} per device x {world_size} devices x {accumulate} accumulated); "
            f"lower the global batch to at most {size}"
        )
    return size // global_batch


def tail_sizes(size: int, batch_size: int, world_size: int, accumulate: int) -> list[int]:
    """Sizes of the batches, of all ranks, that the last incomplete global batch is dealt out in.

    Empty where there is none. Raises UserError where it has fewer samples than there are ranks.
    """
    rest = size % (batch_size * world_size * accumulate)
    if rest == 0:
        return []
    if rest < world_size:
        raise UserError(
            f"loader.last_batch=keep: of {size} training images {rest} are left over for the last "
            f"step, fewer than {world_size} devices; say loader.last_batch=drop, or choose another "
            "batch.global_size"
        )
    bounds = _dealt(rest, _batches_each(rest, batch_size, world_size) * world_size)
    return [end - begin for begin, end in itertools.pairwise(bounds)]


def evaluation_batches(size: int, batch_size: int, world_size: int) -> int:
    """Batches of each rank, all samples dealt out evenly. Raises UserError for too few of them."""
    if size < world_size:
        raise UserError(
            f"{size} validation images are fewer than {world_size} devices: take at least "
            f"{world_size} images, or fewer devices"
        )
    return _batches_each(size, batch_size, world_size)


def _batches_each(size: int, batch_size: int, world_size: int) -> int:
    # at least a sample in each batch; the limit matters for batches of one alone
    return min(-(-size // (batch_size * world_size)), size // world_size)


def _dealt(size: int, batches: int) -> list[int]:
    """Bounds of `batches` slices of `size` samples that differ by at most one."""
    return [size * batch // batches for batch in range(batches + 1)]
