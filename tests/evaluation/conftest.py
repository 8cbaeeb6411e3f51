"""A tiny backbone (grid 3x5, width 22, depth 4) and noise images with labels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit.data.labelled import LabelledData, LabelledImages
from beit.data.loading import LoaderSettings
from beit.data.sources import UnreadableImage
from beit.data.views import EvalTransform
from beit.models.vit import VisionTransformer


class Noise:
    """Labels 0, 1, 2, 0, ...; the noise of a class has a brightness of its own."""

    def __init__(self, size: int, *, first: int = 0, broken: int = -1, labelled: bool = True):
        self.size, self.first, self.broken = size, first, broken
        self.classes = ["ape", "bee", "cow"] if labelled else None
        self.labels = np.arange(size) % 3 if labelled else None

    def __len__(self) -> int:
        return self.size

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        if index == self.broken:
            raise UnreadableImage(self.name(index), "truncated")
        draw = np.random.default_rng(self.first + index)
        pixels = draw.integers(0, 200, (26, 44, 3)) + 15 * (index % 3)
        label = None if self.labels is None else int(self.labels[index])
        return Image.fromarray(pixels.astype(np.uint8)), label

    def name(self, index: int) -> str:
        return f"picture {index}"


TRANSFORM = EvalTransform(image_size=(24, 40), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
LOADER = LoaderSettings(7, 7, num_workers=0, seed=3)


@pytest.fixture
def noise() -> Callable[..., Any]:
    return Noise


@pytest.fixture
def images() -> Callable[..., LabelledImages]:
    def make(size: int, **changes: Any) -> LabelledImages:
        return LabelledImages(Noise(size, **changes), TRANSFORM, LOADER, role="training")

    return make


@pytest.fixture
def labelled() -> Callable[..., LabelledData]:
    def make(train: Any, val: Any, num_classes: int | str = "auto") -> LabelledData:
        options: dict[str, Any] = {"transform": TRANSFORM, "loader": LOADER}
        return LabelledData.of(train, val, num_classes=num_classes, **options)

    return make


@pytest.fixture
def backbone() -> Callable[..., VisionTransformer]:
    def make(**changes: Any) -> VisionTransformer:
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "width": 22, "depth": 4, "num_heads": 2, "absolute_position": True,
            "relative_position": "none", "layer_scale": 0.0, "drop_path_rate": 0.5,
            "mask_token": True, "final_norm": True, "init_std": 0.3, "init_cut": 2.0,
        }  # fmt: skip
        return VisionTransformer((24, 40), 8, **{**options, **changes})

    return make
