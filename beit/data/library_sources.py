"""Images from other libraries' data sets: torchvision and scikit-learn."""

import contextlib
import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets as torchvision_datasets

from beit.data.file_sources import open_image
from beit.data.images import BROKEN_FILE_ERRORS, UnreadableImage, open_rgb, to_rgb
from beit.errors import UserError

# LSUN unpickles a file that it finds in the current folder; CIFAR's pickles are compared with their
# known checksums first
_PICKLED = ("LSUN", "LSUNClass")


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
        if name in _PICKLED:
            raise UserError(
                f"torchvision data set '{name}' keeps a pickle beside its images, which "
                "may hold code; give the images as a folder (data=folder)"
            )
        if not inspect.isclass(getattr(torchvision_datasets, name, None)):
            close = difflib.get_close_matches(name, torchvision_datasets.__all__, n=3, cutoff=0.4)
            raise UserError(
                f"torchvision data set '{name}': no such class; "
                f"did you mean {' or '.join(close or ['CIFAR10', 'Imagenette'])}?"
            )
        words = (f" {key}={value}" for key, value in options.items())
        self.origin = f"torchvision {name}{''.join(words)}"
        self._data = construct(name, root, download, dict(options))
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
        with _guarded():
            return [self._data[index][1] for index in range(len(self._data))]

    def _read_classes(self) -> list[str]:
        assert self.labels is not None
        count = int(self.labels.max()) + 1
        names = getattr(self._data, "classes", None) or range(count)
        return [" / ".join(name) if isinstance(name, tuple) else str(name) for name in names]

    def __len__(self) -> int:
        return len(self._data)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        try:
            with _guarded():
                image, label = self._data[index]
        except BROKEN_FILE_ERRORS as error:  # of those that keep their images in other files
            raise UnreadableImage(self.name(index), str(error)) from error
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        return to_rgb(image), int(label)

    def name(self, index: int) -> str:
        return f"{self.origin} image {index}"

    def identity(self) -> tuple[bytes, ...]:
        return (self.origin.encode(),)

    def __repr__(self) -> str:
        return f"TorchvisionSource({self.origin}: {len(self)} images)"


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

    def identity(self) -> tuple[bytes, ...]:
        return (self.indices.tobytes(),)

    def __repr__(self) -> str:
        return f"Digits({self.split}: {len(self)} images, 10 classes)"


def construct(name: str, root: str | Path, download: bool, options: dict[str, Any]) -> Any:
    """A data set of torchvision. Raises UserError for what its constructor refuses."""
    factory = getattr(torchvision_datasets, name)
    known = inspect.signature(factory).parameters
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"torchvision {name}: no option '{unknown[0]}'; it has {', '.join(known)}")
    if "root" in known:
        options["root"] = str(Path(root).expanduser())
    if "download" in known:
        options["download"] = download
    if "loader" in known and known["loader"].default is inspect.Parameter.empty:
        options["loader"] = open_image
    missing = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and key not in options
    ]
    if missing:
        raise UserError(f"torchvision {name}: '{missing[0]}' has no value; it stands beside `name`")
    try:
        return factory(**options)
    except (RuntimeError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
        mend = " (download=true fetches it)" if "download" in known and not download else ""
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


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Within it Pillow's `Image.open`, by which torchvision opens files, is our own.

    Not all of its data sets take a `loader`. Theirs leaves out the EXIF orientation, too.
    """
    plain = Image.open
    Image.open = _open  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.open = plain


def _open(file: Any, *_: Any, **__: Any) -> Image.Image:
    path = file if isinstance(file, str | Path) else getattr(file, "name", None)
    if isinstance(path, str | Path):
        return open_image(path)
    return open_rgb(file.read(), "a picture within a file")
