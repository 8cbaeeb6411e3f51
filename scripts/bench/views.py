"""From JPEG bytes to the two views: a literal Pillow and torchvision pipeline, ours, ours fast."""

import torch
from torch import Tensor

from beit.data.dataset import Collate, KeyedDataset
from beit.tokenizers.base import to_value_range
from scripts.bench import literal, own_data
from scripts.bench.photographs import Photographs, described, photographs
from scripts.bench.results import Entry, Table
from scripts.bench.settings import MEAN, STD, Settings, Shape
from scripts.bench.timing import Step, alternate, threads, timed

ROW = "Two views from JPEG bytes, one core"
_TOKENIZER_RANGE = (0.1, 0.9)  # DALL-E's


def run(settings: Settings) -> list[Table]:
    shape = settings.shape()
    files = photographs(settings, settings.number(32, 2))
    with threads(1):
        seconds = alternate(timed(build(shape, files)), rounds=2 * settings.rounds)
    entries = [Entry(name, values, work=len(files)) for name, values in seconds.items()]
    title = f"{described(settings)}, to {shape.image_size} and {shape.token_image_size} px"
    return [Table(title, entries, work="images")]


def build(shape: Shape, files: list[bytes]) -> dict[str, Step]:
    """Each gives one batch of floats of either view, as the encoder and the tokenizer take them."""
    theirs = literal.Views(shape)
    return {
        "ours": _ours(shape, files, fast=False),
        "ours, fast": _ours(shape, files, fast=True),
        "Pillow and torchvision, literally": lambda: [
            torch.stack(view) for view in zip(*map(theirs, files), strict=True)
        ],
    }


def _ours(shape: Shape, files: list[bytes], *, fast: bool) -> Step:
    transform = own_data.views(shape, fast=fast)
    data = KeyedDataset(
        Photographs(files), lambda image, label, key: transform(image, key.rng("views")), seed=0
    )
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
