"""How often each class occurs, as a table before training, from a bounded number of label maps."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from beit.data.images import UnreadableImage
from beit.data.segmentation_sources import SegmentationSource
from beit.errors import UserError

MOST_NAMED = 12


class PixelCounts(NamedTuple):
    """Pixels of some label maps."""

    classes: np.ndarray  # (K,) int64
    ignored: int
    maps: int  # that were looked at
    of: int  # that there are

    @property
    def looked_at(self) -> str:
        if self.maps == self.of:
            return f"all {self.of} label maps"
        return f"{self.maps} of {self.of} label maps"


def count_pixels(source: SegmentationSource, *, maps: int, seconds: float) -> PixelCounts:
    """Counts of at most `maps` label maps, spread evenly, and no more once `seconds` are over.

    Unreadable ones are passed over: they are dealt with elsewhere.

    Raises:
        UserError: a label map with other values than classes, or of another size than its image.
    """
    count = len(source.ids.classes)
    totals = np.zeros(count + 1, dtype=np.int64)
    seen, until = 0, time.monotonic() + seconds
    places = np.linspace(0, len(source) - 1, min(maps, len(source))).round().astype(int)
    # in an order in which those until the time is over are spread as well
    for index in places[np.argsort(_bit_reversed(len(places)), kind="stable")].tolist():
        try:
            totals += np.bincount(source.label_map(index).ravel() + 1, minlength=count + 1)
            seen += 1
        except UnreadableImage:
            continue
        if time.monotonic() > until:
            break
    return PixelCounts(totals[1:], int(totals[0]), seen, len(source))


class ClassShares:
    """The shares of the classes, by the role of the source."""

    def __init__(self, names: Sequence[str], counts: Mapping[str, PixelCounts]) -> None:
        self.names, self.counts = names, counts

    def table(self) -> str:
        """A line for each class with its share of the labelled pixels, and one for the others."""
        looked_at = ", ".join(f"{role} {of.looked_at}" for role, of in self.counts.items())
        width = max(len(name) for name in (*self.names, "(not counted)"))
        lines = [f"share of each class in its labelled pixels ({looked_at}):"]
        lines.append(" " * (width + 6) + "".join(f"{role:>12}" for role in self.counts))
        for number, name in enumerate(self.names):
            shares = (
                100 * of.classes[number] / max(of.classes.sum(), 1) for of in self.counts.values()
            )
            lines.append(f"{number:>4}  {name:<{width}}" + "".join(map(_percent, shares)))
        shares = (
            100 * of.ignored / max(of.ignored + of.classes.sum(), 1) for of in self.counts.values()
        )
        lines.append(f"      {'(not counted)':<{width}}" + "".join(map(_percent, shares)))
        return "\n".join(lines)

    def check(self) -> None:
        """Raises UserError where no label map of training has a pixel that counts."""
        of = self.counts.get("training")
        if of is not None and of.maps == of.of and not of.classes.any():
            raise UserError(
                f"training: no pixel of {of.looked_at} has a class, all are ignored: see what "
                "values the files hold, and data.ids.ignore, id_map and reduce_zero_label"
            )

    def warnings(self) -> list[str]:
        """Classes that training never shows, and label maps in which nothing counts."""
        found = []
        for role, of in self.counts.items():
            never = [name for name, pixels in zip(self.names, of.classes) if not pixels]
            if len(never) == len(self.names):
                found.append(f"{role}: no pixel of {of.looked_at} has a class; all are ignored")
            elif never and (role == "training" or of.maps == of.of):
                few = ", ".join(never[:MOST_NAMED]) + (", ..." if len(never) > MOST_NAMED else "")
                found.append(
                    f"{role}: {len(never)} of {len(self.names)} classes do not occur in "
                    f"{of.looked_at}: {few}"
                )
                if len(self.names) == 2 and of.ignored:
                    found[-1] += (
                        "; of files that hold 0 and 255 say data.ids.ignore=[] "
                        "data.ids.id_map='{0: 0, 255: 1}'"
                    )
        return found


def _percent(share: float) -> str:
    return f"{share:>11.3f}%"


def _bit_reversed(count: int) -> np.ndarray:
    """(count,) numbers 0..count-1, their bits in reverse: sorting by them spreads any beginning."""
    bits = max(int(count - 1).bit_length(), 1)
    numbers, reversed_ = np.arange(count), np.zeros(count, dtype=np.int64)
    for bit in range(bits):
        reversed_ |= (numbers >> bit & 1) << (bits - 1 - bit)
    return reversed_
