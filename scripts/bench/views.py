"""From JPEG bytes to the two views: a literal Pillow and torchvision pipeline, ours, ours fast."""

from functools import partial

import torch
from PIL import Image
from torch import Tensor

from beit.data.dataset import Collate, KeyedDataset, SampleKey
from beit.data.images import LazyJpeg
from beit.data.views import TwoViewTransform
from beit.tokenizers.base import to_value_range
from scripts.bench import literal, own_data
from scripts.bench.photographs import LARGE, Photographs, described, enlarged, photographs
from scripts.bench.results import Entry, Table
from scripts.bench.settings import MEAN, STD, Settings, Shape
from scripts.bench.timing import Step, alternate, threads, timed

ROW = "Two views from JPEG bytes, one core"
LITERALLY = "Pillow and torchvision, literally"
_TOKENIZER_RANGE = (0.1, 0.9)  # DALL-E's


def run(settings: Settings) -> list[Table]:
    shape = settings.shape()
    files = photographs(settings, settings.number(32, 2))
    title = f"{described(settings)}, to {shape.image_size} and {shape.token_image_size} px"
    tables = [_table(title, build(shape, files), settings, work=len(files))]
    for size in LARGE:
        few = enlarged(files[: settings.number(8, 1)], size)
        title = "The same enlarged to {}x{}: smoother than real ones, and decoded faster".format(
            *size
        )
        tables.append(_table(title, build_large(shape, few), settings, work=len(few)))
    return tables


def _table(title: str, steps: dict[str, Step], settings: Settings, *, work: int) -> Table:
    with threads(1):
        seconds = alternate(timed(steps), rounds=2 * settings.rounds)
    entries = [Entry(name, values, work=work) for name, values in seconds.items()]
    return Table(title, entries, work="images")


def build(shape: Shape, files: list[bytes]) -> dict[str, Step]:
    """Each gives one batch of floats of either view, as the encoder and the tokenizer take them."""
    return {
        "ours": _ours(files, own_data.views(shape)),
        "ours, fast": _ours(files, own_data.views(shape, fast=True)),
        LITERALLY: partial(_literally, files, literal.Views(shape)),
    }


def build_large(shape: Shape, files: list[bytes]) -> dict[str, Step]:
    """The same, with scaled decoding and without."""
    ours = partial(own_data.views, shape)
    return {
        "ours": _ours(files, ours()),
        "ours, scaled decoding": _ours(files, ours(scaled_decoding=True)),
        "ours, fast": _ours(files, ours(fast=True)),
        "ours, fast, decoded as a whole": _ours(files, ours(fast=True, scaled_decoding=False)),
        LITERALLY: partial(_literally, files, literal.Views(shape)),
    }


def _literally(files: list[bytes], views: literal.Views) -> list[Tensor]:
    return [torch.stack(view) for view in zip(*map(views, files), strict=True)]


def _ours(files: list[bytes], transform: TwoViewTransform) -> Step:
    data = KeyedDataset(Photographs(files), _Sample(transform), seed=0)
    collate = Collate(lambda *fields: fields)
    epochs = iter(range(10**9))

    def step() -> list[Tensor]:
        epoch = next(epochs)
        samples = data.__getitems__([(epoch, index) for index in range(len(data))])
        images, token_images, *_ = collate(samples)
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        pixels = token_images.float().div_(255)
        return [images.float().sub_(mean).div_(std), to_value_range(pixels, _TOKENIZER_RANGE)]

    return step


class _Sample:
    """Both views, and nothing else."""

    def __init__(self, transform: TwoViewTransform) -> None:
        self.transform = transform
        self.takes_lazy = transform.scaled_decoding

    def __call__(
        self, image: Image.Image | LazyJpeg, label: int | None, key: SampleKey
    ) -> tuple[Tensor | None, ...]:
        return self.transform(image, key.rng("views"))
