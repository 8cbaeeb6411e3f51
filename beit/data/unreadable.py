"""Unreadable images: named as they are met, counted, and refused beyond a limit."""

import logging

import lightning as L
import numpy as np
import torch.distributed as dist

from beit.data.images import UnreadableImage
from beit.data.sources import ImageSource
from beit.errors import UserError

log = logging.getLogger(__name__)


class UnreadableImages:
    """The unreadable images of a run, as far as this rank has met them.

    Args:
        limit: different images, of training and validation together, that may fail on a rank.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: dict[tuple[str, int], str] = {}  # by role ("training", ...) and index

    def probe(self, source: ImageSource, role: str, *, count: int, strict: bool) -> None:
        """Decode `count` images, spread evenly over the source.

        Raises UserError if all fail or more than the limit, and if `strict` for a single one.
        """
        count = min(count, len(source))
        failures = []
        for index in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
            try:
                source.load(index)
            except UnreadableImage as error:
                failures.append(error)
                self.names[role, index] = error.name
        if not failures:
            return
        named = "; ".join(str(error) for error in failures[:3])
        message = f"{len(failures)} of {count} {role} images tried are unreadable: {named}"
        limit = 0 if strict else self.limit
        if len(self.names) > limit or len(failures) == count:
            raise UserError(f"{message} (limit {limit}); mend or remove them")
        log.warning("%s", message)

    def meet(self, source: ImageSource, role: str, index: int) -> None:
        """Name an image that failed, the first time. Raises UserError beyond the limit."""
        if (role, index) in self.names:
            return
        self.names[role, index] = source.name(index)
        why = reason(source, index)
        fate = "another stands in for it" if role == "training" else "left out"
        log.warning("unreadable %s image, %s: %s", role, fate, why)
        if len(self.names) > self.limit:
            raise UserError(
                f"{len(self.names)} unreadable images, more than max_unreadable_images="
                f"{self.limit}, the last {why}; mend the data set"
            )

    def log_total(self, trainer: L.Trainer) -> None:
        """One line, if there were any. All ranks must call it, each at the end of its run."""
        met = set(self.names)
        if trainer.world_size > 1 and dist.is_initialized():
            of_ranks: list[set[tuple[str, int]]] = [set() for _ in range(trainer.world_size)]
            dist.all_gather_object(of_ranks, met)
            met = set().union(*of_ranks)
        if met and trainer.is_global_zero:
            training = sum(role == "training" for role, _ in met)
            log.warning(
                "%d unreadable images in this run: %d training, %d validation",
                *(len(met), training, len(met) - training),
            )


def reason(source: ImageSource, index: int) -> str:
    """Name of an unreadable image and why; it is read once more, for workers pass on no text."""
    try:
        source.load(index)
    except UnreadableImage as error:
        return str(error)
    return f"{source.name(index)}: readable at the second attempt"
