"""Rows of Hugging Face data sets: local parquet files, and the hub."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from beit.data.images import LazyJpeg, UnreadableImage, open_lazily, open_rgb
from beit.data.limits import not_negative
from beit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# Hugging Face's name of a parquet file: SPLIT-00000-of-00001.parquet, or plain SPLIT.parquet
_PARQUET_NAME = re.compile(r"(?P<split>\w+?)(-\d{5}-of-\d{5})?\.parquet")


class _Rows:
    """The rows of a Hugging Face data set; the image column holds bytes, or {bytes, path}.

    Args:
        folders: where the files that rows may name lie; a relative name is below the first.
    """

    def __init__(
        self,
        data: "Dataset",
        image_column: str,
        label_column: str,
        origin: str,
        folders: Sequence[str | Path],
    ) -> None:
        self.origin = origin
        self._folders = [Path(folder).expanduser().resolve() for folder in folders]
        _check_columns(origin, data.column_names, filter(None, (image_column, label_column)))
        # the table itself: datasets' Image feature decodes by other rules (no EXIF), per-row
        # indexing through the library is several times slower
        self._table, self._image_column = data.data, image_column
        self._images = self._table.column(image_column)
        self.classes, self.labels = _read_labels(data, label_column)

    def __getstate__(self) -> dict[str, Any]:
        # pickled, a column brings all its bytes; a mapped table only its path
        return {key: value for key, value in self.__dict__.items() if key != "_images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = self._table.column(self._image_column)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return open_rgb(self.content(index), self.name(index)), self._label(index)

    def open(self, index: int) -> tuple[Image.Image | LazyJpeg, int | None]:
        return open_lazily(self.content(index), self.name(index)), self._label(index)

    def _label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def content(self, index: int) -> bytes | Path:
        """The bytes of a row's image, or the file that it names. Raises UnreadableImage."""
        from pyarrow import ArrowException

        try:
            value = self._images[index].as_py()
        except (ArrowException, UnicodeDecodeError) as error:
            raise UnreadableImage(self.name(index), str(error)) from error
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, bytes | str) or not value:
            raise UnreadableImage(self.name(index), f"no image bytes but {type(value).__name__}")
        return self._file(value, index) if isinstance(value, str) else value

    def empty_rows(self) -> np.ndarray:
        """Numbers of the rows that hold neither bytes nor a path; no image is looked at."""
        from pyarrow import compute, types

        parts = [self._images]
        if types.is_struct(self._images.type):
            names = [field.name for field in self._images.type]
            parts = [compute.struct_field(self._images, n) for n in ("bytes", "path") if n in names]
        there = [np.asarray(compute.is_valid(part)) for part in parts]
        return np.flatnonzero(~np.any(there, axis=0))

    def _file(self, path: str, index: int) -> Path:
        """The file that a row names: one of the pack's, not any of this machine."""
        try:
            file = (self._folders[0] / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links
            raise UnreadableImage(self.name(index), str(error)) from error
        if not any(folder in file.parents for folder in self._folders):
            raise UnreadableImage(self.name(index), f"{path} lies outside of the data set")
        return file

    def name(self, index: int) -> str:
        return f"{self.origin} row {index}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin}: {len(self)} images)"


class ParquetSource(_Rows):
    """A folder of parquet files in the Hugging Face convention, read by random access.

    PATH/data/SPLIT-00000-of-0000N.parquet or PATH/SPLIT*.parquet. `label_column` empty: no labels.

    Up to `max_memory_gb` (10^9 bytes, decompressed) the two columns are read as they lie and held
    in memory once per rank: workers that are forked share them. A larger split is copied by
    Hugging Face `datasets`, at its first use, into one Arrow file and mapped into memory: below
    $HF_DATASETS_CACHE (~/.cache/huggingface/datasets), about as large as the images together, to be
    deleted at will. Parquet cannot give a single row: with a row group (10,000 rows of CIFAR-10,
    512 of a Caltech-101 pack) decompressed for each image, 340 and 570 rows/s were read on one core
    instead of 80,000 and more in memory or mapped, of which decoding leaves 12,000 and 1,600.

    Raises:
        UserError: missing folder, no or broken parquet files, unknown split or column.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        image_column: str = "image",
        label_column: str = "label",
        max_memory_gb: float = 2.0,
    ) -> None:
        not_negative("max_memory_gb", max_memory_gb)
        files = _parquet_files(Path(path).expanduser())
        if split not in files:
            raise UserError(f"{path}: no split '{split}'; there are {', '.join(sorted(files))}")
        columns = [column for column in (image_column, label_column) if column]
        data = _open_parquet(files[split], columns, max_memory_gb * 1e9)
        super().__init__(data, image_column, label_column, f"{path} {split}", [path])
        sizes = [(file.name, file.stat().st_size) for file in files[split]]
        self._identity = repr((sizes, columns)).encode()

    def identity(self) -> tuple[bytes, ...]:
        return (self._identity,)


class HubSource(_Rows):
    """A data set on the Hugging Face hub, downloaded once into its cache.

    Raises:
        UserError: no such data set or split, or an unknown column.
    """

    def __init__(
        self,
        repo: str,
        split: str,
        *,
        config: str = "default",
        revision: str = "main",
        image_column: str = "image",
        label_column: str = "label",
    ) -> None:
        from datasets import config as hf
        from datasets import exceptions, load_dataset
        from huggingface_hub.constants import HF_HUB_CACHE

        try:
            data = load_dataset(repo, config, split=split, revision=revision)
        except (exceptions.DatasetsError, ValueError, OSError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"hub data set {repo} config {config} {split}: {message}") from error
        # what the library downloaded; or a folder of the user's, where `repo` is one
        caches = (hf.HF_CACHE_HOME, hf.HF_DATASETS_CACHE, HF_HUB_CACHE)
        folders = [repo] if Path(repo).is_dir() else caches
        super().__init__(data, image_column, label_column, f"{repo} {split}", folders)
        self._identity = repr((repo, config, split, revision, image_column)).encode()

    def identity(self) -> tuple[bytes, ...]:
        return (self._identity,)


def _read_labels(data: "Dataset", column: str) -> tuple[list[str] | None, np.ndarray | None]:
    if not column:
        return None, None
    values = data.data.column(column).to_pylist()
    names = getattr(data.features[column], "names", None)
    if all(isinstance(value, int) for value in values):
        count = max(values, default=-1) + 1
        return names or [str(number) for number in range(count)], np.array(values, dtype=np.int64)
    if not all(isinstance(value, str) for value in values):
        odd = next(value for value in values if not isinstance(value, int))
        raise UserError(f"column '{column}': label {odd!r}; expected class numbers, or names")
    names = sorted(set(values))
    known = {name: number for number, name in enumerate(names)}
    return names, np.array([known[value] for value in values], dtype=np.int64)


def _check_columns(origin: str, names: Iterable[str], wanted: Iterable[str]) -> None:
    for column in wanted:
        if column not in names:
            raise UserError(f"{origin}: no column '{column}'; there are {', '.join(names)}")


def _open_parquet(files: list[Path], columns: list[str], max_bytes: float) -> "Dataset":
    """These columns, in memory if they fit, else mapped from datasets' own copy."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import ArrowException, parquet

    size = 0
    for file in files:
        try:
            metadata = parquet.read_metadata(file)
        except (ArrowException, OSError) as error:
            raise UserError(f"{file}: not a parquet file ({error})") from error
        _check_columns(str(file), metadata.schema.to_arrow_schema().names, columns)
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        size += sum(group.total_byte_size for group in groups)
    if size > max_bytes:
        return Dataset.from_parquet([str(file) for file in files], columns=columns)
    try:
        return Dataset(InMemoryTable(parquet.read_table(files, columns=columns)))
    except (ArrowException, OSError) as error:
        names = ", ".join(str(file) for file in files)
        raise UserError(f"{names}: cannot be read ({' '.join(str(error).split())})") from error


def _parquet_files(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected PATH/data/SPLIT-*.parquet")
    files: dict[str, list[Path]] = {}
    for file in sorted((folder / "data" if (folder / "data").is_dir() else folder).iterdir()):
        if match := _PARQUET_NAME.fullmatch(file.name):
            files.setdefault(match["split"], []).append(file)
    if not files:
        raise UserError(f"{folder}: no parquet files; expected data/SPLIT-00000-of-00001.parquet")
    return files
