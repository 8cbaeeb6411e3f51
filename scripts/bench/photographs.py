"""JPEG photographs to measure with, as bytes in memory: no disk is measured here."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from beit.data.file_sources import find_images
from beit.data.images import LazyJpeg, open_lazily, open_rgb
from beit.errors import UserError
from scripts.bench.settings import Settings

SIZE = (500, 375)  # width, height: the commonest of ImageNet's
LARGE = ((2000, 1500), (4000, 3000))  # of 3 and 12 million pixels
_QUALITY = 90
_MOST = 256


class Photographs:
    """A source of photographs that lie in memory, without labels."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, photographs: list[bytes]) -> None:
        self.photographs = photographs

    def __len__(self) -> int:
        return len(self.photographs)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return open_rgb(self.photographs[index], self.name(index)), None

    def open(self, index: int) -> tuple[Image.Image | LazyJpeg, int | None]:
        return open_lazily(self.photographs[index], self.name(index)), None

    def name(self, index: int) -> str:
        return f"photograph {index}"


def photographs(settings: Settings, count: int) -> list[bytes]:
    """`count` JPEG files of those that were named, again from the first one where they are fewer.

    Without a name they are cut out of scikit-learn's two. Raises UserError where there are none.
    """
    found = list(_named(Path(settings.images).expanduser()) if settings.images else _bundled())
    if not found:
        raise UserError(f"--images {settings.images}: no JPEG files found there")
    return [found[i % len(found)] for i in range(count)]


def enlarged(files: list[bytes], size: tuple[int, int]) -> list[bytes]:
    """The photographs at another size (width, height), as JPEG files."""
    whole = (open_rgb(file, "a photograph") for file in files)
    return [_encoded(image.resize(size, Image.Resampling.LANCZOS)) for image in whole]


def described(settings: Settings) -> str:
    """A line for the document."""
    if settings.images:
        return "JPEG photographs that were named with `--images`"
    width, height = SIZE
    return f"JPEG photographs of {width}x{height}, cut out of scikit-learn's two"


def _bundled() -> Iterator[bytes]:
    """Parts of the two photographs, from a half to all of their height, some mirrored."""
    from sklearn.datasets import load_sample_images

    for image in map(Image.fromarray, load_sample_images().images):
        for share in (0.5, 0.65, 0.8, 0.999):
            height = share * image.height
            width = height * SIZE[0] / SIZE[1]
            for mirrored in (False, True):
                left = (image.width - width) * (0.9 if mirrored else 0.1)
                top = (image.height - height) * (0.2 if mirrored else 0.7)
                part = image.resize(
                    SIZE, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height)
                )
                if mirrored:
                    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                yield _encoded(part)


def _encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def _named(path: Path) -> Iterator[bytes]:
    """The first JPEG files of a folder, or of the parquet files in it; or of one parquet file."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    tables = [file for file in files if file.suffix == ".parquet"]
    values = _rows(tables) if tables else (file.read_bytes() for file in find_images(path))
    taken = 0
    for value in values:
        if taken < _MOST and value.startswith(b"\xff\xd8"):
            taken += 1
            yield value


def _rows(files: list[Path]) -> Iterator[bytes]:
    from pyarrow import parquet

    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(_MOST, columns=["image"]):
            for value in batch.column("image").to_pylist():
                yield value["bytes"] if isinstance(value, dict) else value
            break  # a row group can be large
