"""Pairs of an image and a label map: folders, parquet packs, the hub, torchvision.

An image is turned upright, as its EXIF orientation says, and a label map by its own, which hardly
any has: a label map belongs to the picture as it is shown. So mmsegmentation read them, and so
programs for annotation draw them. One that was drawn on an unturned photograph shows by its size
where the photograph stands on its side, and is refused; upside down it cannot be told.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from beit.data.images import open_lazily, open_rgb
from beit.data.label_maps import LabelIds, LabelMap, check_sizes, read_label_map
from beit.data.library_sources import construct
from beit.data.pairing import paired, told_missing
from beit.data.paths import PathTable, existing_folder
from beit.data.sources import Subset
from beit.data.table_sources import HubSource, ParquetSource
from beit.errors import UserError
from beit.nearest import did_you_mean
from beit.printable import printable


class SegmentationSource(Protocol):
    """Images by number, each with a label map of its size. It is an ImageSource too."""

    ids: LabelIds
    classes: list[str] | None
    labels: np.ndarray | None  # None: an image has no single class

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, LabelMap]:
        """An upright RGB image, and int16 (H, W). Raises UnreadableImage, UserError."""
        ...

    def label_map(self, index: int) -> LabelMap:
        """The label map alone, once its size was found to be the image's. Raises as `load`."""
        ...

    def name(self, index: int) -> str:
        """The image, for messages."""
        ...


class _Pairs:
    """What all have in common; `_image` and `_label` name the bytes or the file of either."""

    labels: np.ndarray | None = None

    def __init__(self, ids: LabelIds, origin: str) -> None:
        self.ids = ids
        self.classes: list[str] | None = ids.classes
        self.origin = origin

    def __len__(self) -> int:
        raise NotImplementedError

    def _image(self, index: int) -> tuple[bytes | Path, str]:
        """Bytes or file, and its name."""
        raise NotImplementedError

    def _label(self, index: int) -> tuple[bytes | Path, str]:
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, LabelMap]:
        image = open_rgb(*self._image(index))
        return image, self._read(index, image.size)

    def label_map(self, index: int) -> LabelMap:
        return self._read(index, open_lazily(*self._image(index)).size)

    def _read(self, index: int, size: tuple[int, int]) -> LabelMap:
        file, name = self._label(index)
        labels = read_label_map(file, name, self.ids)
        check_sizes(size[::-1], self.name(index), labels.shape, name)
        return labels

    def name(self, index: int) -> str:
        return self._image(index)[1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin}: {len(self)} images with label maps)"


class _PathPairs(_Pairs):
    """Two files for each image, below a folder for either kind."""

    def __init__(
        self, ids: LabelIds, origin: str, roots: tuple[Path, Path], pairs: Sequence[tuple[str, str]]
    ) -> None:
        super().__init__(ids, origin)
        self._roots = roots
        self._files = PathTable([image for image, _ in pairs])
        self._label_files = PathTable([label for _, label in pairs])

    def __len__(self) -> int:
        return len(self._files)

    def _image(self, index: int) -> tuple[Path, str]:
        path = self._roots[0] / self._files[index]
        return path, printable(str(path))

    def _label(self, index: int) -> tuple[Path, str]:
        path = self._roots[1] / self._label_files[index]
        return path, printable(str(path))

    def identity(self) -> tuple[bytes, ...]:
        blocks = (*self._files.blocks(), *self._label_files.blocks())
        return *map(bytes, blocks), self.ids.identity()


class FolderPairs(_PathPairs):
    """Two folders, in which an image and its label map have the same path but for the extension.

    Where the names differ at the end, as Cityscapes' do, the ends are given: `image_suffix`
    "_leftImg8bit" and `label_suffix` "_gtFine_labelTrainIds"; files with other ends are passed
    over. A suffix may have an extension (".png"), for images and label maps in one folder.

    Raises:
        UserError: a folder is missing or has no images, an image has no label map, or two have the
            same one.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        ids: LabelIds,
        image_suffix: str = "",
        label_suffix: str = "",
    ) -> None:
        roots = existing_folder(images), existing_folder(annotations, of="label maps")
        pairs = paired(roots, image_suffix, label_suffix)
        super().__init__(ids, printable(f"{roots[0]} with {roots[1]}"), roots, pairs)


# data set of torchvision -> its attribute with the label files; `images` has the images
_LABEL_FILES = {"VOCSegmentation": "masks", "Cityscapes": "targets"}


class TorchvisionPairs(_PathPairs):
    """VOCSegmentation or Cityscapes of torchvision; further arguments are the data set's own.

    Torchvision finds (and of VOC downloads) the files; Cityscapes has label files with its own
    numbers, 7 for the road, which `id_map` turns into the 19 classes.

    Raises:
        UserError: another name, an unknown option, files that are not there.
    """

    def __init__(
        self, name: str, root: str | Path, *, ids: LabelIds, download: bool = False, **options: Any
    ) -> None:
        if name not in _LABEL_FILES:
            near = did_you_mean(name, _LABEL_FILES)
            raise UserError(f"torchvision data set '{name}' has no label maps known here: {near}")
        if name == "Cityscapes":
            options["target_type"] = "semantic"
        data = construct(name, root, download, options)
        labels = [
            label if isinstance(label, str) else label[0]
            for label in getattr(data, _LABEL_FILES[name])
        ]
        folder = Path(root).expanduser()
        # the order of a listed folder is the file system's
        pairs = sorted(
            (os.path.relpath(image, folder), os.path.relpath(label, folder))
            for image, label in zip(data.images, labels)
        )
        missing = [label for _, label in pairs if not os.path.isfile(folder / label)]
        words = "".join(f" {key}={value}" for key, value in options.items())
        origin = f"torchvision {name}{words}"
        if missing:
            raise UserError(told_missing(origin, len(pairs), missing))
        super().__init__(ids, origin, (folder, folder), pairs)


class _TablePairs(_Pairs):
    """Two columns of one table, read as two sources."""

    def __init__(
        self, ids: LabelIds, images: ParquetSource | HubSource, maps: ParquetSource | HubSource
    ) -> None:
        super().__init__(ids, images.origin)
        self._images, self._maps = images, maps
        if len(missing := maps.empty_rows()):
            rows = [f"row {row}" for row in missing.tolist()]
            raise UserError(told_missing(self.origin, len(images), rows))

    def __len__(self) -> int:
        return len(self._images)

    def _image(self, index: int) -> tuple[bytes | Path, str]:
        return self._images.content(index), self._images.name(index)

    def _label(self, index: int) -> tuple[bytes | Path, str]:
        return self._maps.content(index), self._maps.name(index)

    def name(self, index: int) -> str:
        return self._images.name(index)

    def identity(self) -> tuple[bytes, ...]:
        return *self._images.identity(), *self._maps.identity(), self.ids.identity()


class ParquetPairs(_TablePairs):
    """A folder of parquet files with two image columns; see ParquetSource.

    Raises:
        UserError: as there, and for rows without a label map.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        ids: LabelIds,
        image_column: str = "image",
        label_column: str = "annotation",
        max_memory_gb: float = 2.0,
    ) -> None:
        images, maps = (
            ParquetSource(
                path, split, image_column=column, label_column="", max_memory_gb=max_memory_gb
            )
            for column in (image_column, label_column)
        )
        super().__init__(ids, images, maps)


class HubPairs(_TablePairs):
    """A data set on the Hugging Face hub with two image columns; see HubSource.

    Raises:
        UserError: as there, and for rows without a label map.
    """

    def __init__(
        self,
        repo: str,
        split: str,
        *,
        ids: LabelIds,
        config: str = "default",
        revision: str = "main",
        image_column: str = "image",
        label_column: str = "annotation",
    ) -> None:
        images, maps = (
            HubSource(
                repo, split, config=config, revision=revision, image_column=column, label_column=""
            )
            for column in (image_column, label_column)
        )
        super().__init__(ids, images, maps)


class PairsSubset(Subset):
    """So many pairs of a source, drawn once from `seed`; fewer with the same seed begin the same.

    Raises:
        UserError: `count` is below 1, or the source has fewer.
    """

    source: SegmentationSource

    def __init__(self, source: SegmentationSource, *, count: int, seed: int) -> None:
        super().__init__(source, count=count, seed=seed)
        self.ids = source.ids

    def label_map(self, index: int) -> LabelMap:
        return self.source.label_map(int(self.indices[index]))


def few_pairs(source: SegmentationSource, *, images: int | str, seed: int) -> SegmentationSource:
    """The same `images` images with their label maps for the same seed, or "all" there are.

    Raises:
        UserError: `images` is neither a number from 1 to as many as there are, nor "all".
    """
    if images == "all":
        return source
    if not isinstance(images, int) or isinstance(images, bool) or not 1 <= images <= len(source):
        raise UserError(
            f"labelled_images {images}: expected a number from 1 to {len(source)}, which is how "
            "many there are, or all"
        )
    return PairsSubset(source, count=images, seed=seed)
