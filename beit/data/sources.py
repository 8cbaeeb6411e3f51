"""Where images come from: the protocol, parts of sources, and every kind of source by name.

A source is held by every worker of a loader: it is picklable and opens nothing before `load`.
"""

from typing import Protocol

import numpy as np
from PIL import Image

from beit.data.file_sources import ClassFolder as ClassFolder
from beit.data.file_sources import FlatFolder as FlatFolder
from beit.data.file_sources import ListFile as ListFile
from beit.data.images import LazyJpeg
from beit.data.images import UnreadableImage as UnreadableImage
from beit.data.library_sources import Digits as Digits
from beit.data.library_sources import TorchvisionSource as TorchvisionSource
from beit.data.table_sources import HubSource as HubSource
from beit.data.table_sources import ParquetSource as ParquetSource
from beit.errors import UserError


class ImageSource(Protocol):
    """Images by number, with or without labels.

    It may have `open(index)` too, which gives a LazyJpeg in the image's place where it can: a JPEG
    of which only the header was read, for transforms that need no more than a part of its pixels.
    """

    classes: list[str] | None  # names of the labels 0..K-1, None without labels
    labels: np.ndarray | None  # (len,) int64, without decoding anything

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        """An upright RGB image and its label. Raises UnreadableImage."""
        ...

    def name(self, index: int) -> str:
        """The file, or the table and row, for messages."""
        ...


def opened(source: ImageSource, index: int) -> tuple[Image.Image | LazyJpeg, int | None]:
    """By `open`, of a source that has it, else by `load`. Raises UnreadableImage."""
    return getattr(source, "open", source.load)(index)


class Subset:
    """A part of a source, drawn once from `seed`: `per_class` of each class, or `count` in all.

    With `count` and labels the classes stay as equal in number as they can.

    Raises:
        UserError: not exactly one of the two numbers is given, the source has too few images, or
            `per_class` is asked of a source without labels.
    """

    def __init__(
        self, source: ImageSource, *, per_class: int = 0, count: int = 0, seed: int
    ) -> None:
        if (per_class > 0) == (count > 0):
            raise UserError(f"per_class {per_class}, count {count}: give one of the two, above 0")
        self.source = source
        groups = _groups(source, need_labels=per_class > 0)
        for name, members in groups.items():
            if per_class > len(members):
                raise UserError(
                    f"per_class {per_class}: class '{name}' has only {len(members)} images"
                )
        if count > len(source):
            raise UserError(f"count {count}: the source has only {len(source)} images")
        self.indices = _round_robin(list(groups.values()), seed)[: count or per_class * len(groups)]
        self.classes: list[str] | None = source.classes
        self.labels: np.ndarray | None = (
            None if source.labels is None else source.labels[self.indices]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return self.source.load(int(self.indices[index]))

    def open(self, index: int) -> tuple[Image.Image | LazyJpeg, int | None]:
        return opened(self.source, int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def identity(self) -> tuple[bytes, ...]:
        return (np.asarray(self.indices).tobytes(), *getattr(self.source, "identity", tuple)())

    def __repr__(self) -> str:
        return f"Subset({len(self)} images of {self.source!r})"


def few_labels(source: ImageSource, *, per_class: int | str, seed: int) -> ImageSource:
    """The same `per_class` images of each class for the same seed, or "all" there are."""
    if per_class == "all":
        return source
    if not isinstance(per_class, int) or per_class < 1:
        raise UserError(f"labels_per_class {per_class}: expected a number above 0, or all")
    if source.labels is None:
        raise UserError(
            f"labels_per_class {per_class}: {source!r} has no labels; use class folders or a list "
            "with labels (images without labels serve pretraining)"
        )
    return Subset(source, per_class=per_class, seed=seed)


def _groups(source: ImageSource, *, need_labels: bool) -> dict[str, np.ndarray]:
    """The indices of each class, or all of them as one group where there are no labels."""
    if source.labels is None or source.classes is None:
        if need_labels:
            raise UserError(f"per_class: {source!r} has no labels; use count instead")
        return {"": np.arange(len(source))}
    return {
        name: np.flatnonzero(source.labels == number) for number, name in enumerate(source.classes)
    }


def _round_robin(groups: list[np.ndarray], seed: int) -> np.ndarray:
    """Each group shuffled; then the first of each, the second of each, and so on.

    A smaller part drawn with the same seed is the beginning of a larger one.
    """
    rng = np.random.Generator(np.random.PCG64((seed, 0x5B5E7)))
    shuffled = [rng.permutation(members) for members in groups]
    rounds = np.concatenate([np.arange(len(members)) for members in groups])
    return np.concatenate(shuffled)[np.argsort(rounds, kind="stable")]
