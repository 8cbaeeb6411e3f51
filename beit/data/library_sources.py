"""Images from other libraries' data sets: torchvision, Hugging Face datasets, scikit-learn."""

import difflib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torchvision import datasets as torchvision_datasets

from beit.data.images import UnreadableImage, open_rgb, to_rgb
from beit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# Hugging Face's name of a parquet file: SPLIT-00000-of-00001.parquet, or plain SPLIT.parquet
_PARQUET_NAME = re.compile(r"(?P<split>\w+?)(-\d{5}-of-\d{5})?\.parquet")


class TorchvisionSource:
    """A classification data set of torchvision by the name of its class, e.g. CIFAR10.

    Further keyword arguments are the data set's own: train=true for CIFAR10, split="train" and
    size="160px" for Imagenette.

    Raises:
        UserError: unknown name or option, not downloaded, or targets that are not classes.
    """

    def __init__(
        self, name: str, root: str | Path, *, download: bool = False, **options: Any
    ) -> None:
        if name not in torchvision_datasets.__all__:
            close = difflib.get_close_matches(name, torchvision_datasets.__all__, n=3, cutoff=0.4)
            raise UserError(
                f"torchvision data set '{name}': no such class; "
                f"did you mean {' or '.join(close or ['CIFAR10', 'Imagenette'])}?"
            )
        words = (f" {key}={value}" for key, value in options.items())
        self.origin = f"torchvision {name}{''.join(words)}"
        self._data = _construct(name, root, download, dict(options))
        self.labels: np.ndarray | None = self._read_labels()
        self.classes: list[str] | None = self._read_classes()

    def _read_labels(self) -> np.ndarray:
        for attribute in ("targets", "_labels", "labels"):
            values = getattr(self._data, attribute, None)
            if values is not None and len(values) == len(self._data):
                return np.asarray(values, dtype=np.int64)
        pairs = getattr(self._data, "_samples", None) or getattr(self._data, "samples", None)
        labels = [pair[1] for pair in pairs] if pairs else self._targets_one_by_one()
        if not all(isinstance(label, int | np.integer) for label in labels):
            raise UserError(f"{self.origin}: its targets are {labels[0]!r}..., not class numbers")
        return np.asarray(labels, dtype=np.int64)

    def _targets_one_by_one(self) -> list[Any]:
        return [self._data[index][1] for index in range(len(self._data))]

    def _read_classes(self) -> list[str]:
        assert self.labels is not None
        count = int(self.labels.max()) + 1
        names = getattr(self._data, "classes", None) or range(count)
        return [" / ".join(name) if isinstance(name, tuple) else str(name) for name in names]

    def __len__(self) -> int:
        return len(self._data)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        image, label = self._data[index]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        return to_rgb(image), int(label)

    def name(self, index: int) -> str:
        return f"{self.origin} image {index}"

    def __repr__(self) -> str:
        return f"TorchvisionSource({self.origin}: {len(self)} images)"


class _Rows:
    """The rows of a Hugging Face data set; the image column holds bytes, or {bytes, path}."""

    def __init__(self, data: "Dataset", image_column: str, label_column: str, origin: str) -> None:
        self.origin = origin
        for column in filter(None, (image_column, label_column)):
            if column not in data.column_names:
                raise UserError(
                    f"{origin}: no column '{column}'; there are {', '.join(data.column_names)}"
                )
        # the table itself: datasets' Image feature decodes by other rules (no EXIF), per-row
        # indexing through the library is several times slower
        self._images = data.data.column(image_column)
        self.classes, self.labels = _read_labels(data, label_column)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        value = self._images[index].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, bytes | str) or not value:
            raise UnreadableImage(self.name(index), f"no image bytes but {type(value).__name__}")
        image = open_rgb(value, self.name(index))
        return image, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.origin} row {index}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin}: {len(self)} images)"


class ParquetSource(_Rows):
    """A folder of parquet files in the Hugging Face convention, read by random access.

    PATH/data/SPLIT-00000-of-0000N.parquet or PATH/SPLIT*.parquet. Hugging Face `datasets` maps the
    rows into memory through its cache on disk. `label_column` empty: no labels.

    Raises:
        UserError: missing folder, no parquet files, unknown split or column.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        image_column: str = "image",
        label_column: str = "label",
    ) -> None:
        files = _parquet_files(Path(path).expanduser())
        if split not in files:
            raise UserError(f"{path}: no split '{split}'; there are {', '.join(sorted(files))}")
        from datasets import Dataset

        data = Dataset.from_parquet([str(file) for file in files[split]], split=split)
        super().__init__(data, image_column, label_column, f"{path} {split}")


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
        from datasets import exceptions, load_dataset

        try:
            data = load_dataset(repo, config, split=split, revision=revision)
        except (exceptions.DatasetsError, ValueError, OSError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"hub data set {repo} config {config} {split}: {message}") from error
        super().__init__(data, image_column, label_column, f"{repo} {split}")


class Digits:
    """scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels, 17 greys; no download.

    `split` is "train" (1,437 images), "test" (360, every fifth of each class) or "all".
    """

    def __init__(self, split: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                "the digits come with scikit-learn, which is not installed; "
                "pip install 'beit[demo]' or pip install scikit-learn"
            ) from error
        digits = load_digits()
        self.split = split
        self.indices = _digits_split(digits.target, split)
        self.labels: np.ndarray | None = digits.target[self.indices].astype(np.int64)
        self.classes: list[str] | None = [str(name) for name in digits.target_names]
        # 17 levels, 0 to 16
        self._pixels = (digits.images[self.indices] * (255 / 16)).round().astype(np.uint8)

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        assert self.labels is not None
        return Image.fromarray(self._pixels[index]).convert("RGB"), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"digits scan {self.indices[index]}"

    def __repr__(self) -> str:
        return f"Digits({self.split}: {len(self)} images, 10 classes)"


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


def _construct(name: str, root: str | Path, download: bool, options: dict[str, Any]) -> Any:
    factory = getattr(torchvision_datasets, name)
    known = inspect.signature(factory).parameters
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"torchvision {name}: no option '{unknown[0]}'; it has {', '.join(known)}")
    if "root" in known:
        options["root"] = str(Path(root).expanduser())
    if "download" in known:
        options["download"] = download
    if "loader" in known:  # its own would leave the EXIF orientation out
        options["loader"] = _load_file
    try:
        return factory(**options)
    except (RuntimeError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
        mend = "" if download else " (download=true fetches it)"
        raise UserError(f"torchvision {name} in {root}: {message}{mend}") from error


def _digits_split(targets: np.ndarray, split: str) -> np.ndarray:
    # PCG64's raw stream and a stable sort: the same split under every version of NumPy
    noise = np.random.PCG64(20210615).random_raw(len(targets))
    by_class = np.lexsort((noise, targets))
    is_test = np.arange(len(targets)) % 5 == 0
    parts = {"train": by_class[~is_test], "test": by_class[is_test], "all": by_class}
    if split not in parts:
        raise UserError(f"digits: no split '{split}'; there are {', '.join(parts)}")
    return np.sort(parts[split])


def _load_file(path: str) -> Image.Image:
    return open_rgb(path, str(path))
