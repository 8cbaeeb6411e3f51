"""From an RGB image and its label map to tensors: training crops, and the evaluation's resize.

The pipeline is that of mmsegmentation 0.x, with which BEiT was trained on ADE20K. Where it differs:
images are resized by Pillow, whose filters look at all pixels when they shrink (OpenCV's at two or
four); label maps take the label at the centre of each new pixel, in line with the image (OpenCV's
nearest neighbour is up to half a pixel off); hue and saturation are 8-bit numbers of Pillow's HSV.
"""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit.data.distortion import Distortion
from beit.data.label_maps import IGNORED, LabelMap
from beit.data.limits import checked_normalisation, checked_share, real_number
from beit.data.pixels import CropBox, by, checked_interpolation, to_tensor
from beit.errors import UserError
from beit.sizes import height_width

CROPS = 10  # that are looked at for one with more than one class (mmsegmentation)


class Draws(NamedTuple):
    """What was drawn for the geometry of one sample."""

    size: tuple[int, int]  # (h, w) that the whole image would be resized to
    mirrored: bool
    box: CropBox  # in that size


class SegmentationTrainTransform:
    """Resize by a random factor, crop, mirror, distort the colours, pad.

    The image is thought of as resized, its aspect kept, to a short side of `short_side` and a long
    side of at most `max_aspect` times that, both times U(min_scale, max_scale). A crop of
    `image_size` is drawn from it; where one class has `max_class_share` or more of its labelled
    pixels another is drawn, ten times at most. A crop that is smaller than `image_size` is padded
    at the right and the bottom: labels with -1, images with the mean colour, which the
    normalisation makes 0 to within half a level of 255.

    Only the crop is resized, by the same filter at the same places. That gives what resizing the
    whole and cropping then would, but for a level or two in one value of 200 (Pillow rounds the box
    to 24 bits).

    Defaults: the released configs for 512 px, base size (2048, 512).

    Raises:
        UserError: numbers out of range.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        short_side: int | Sequence[int],
        mean: Sequence[float],
        max_aspect: float = 4.0,
        min_scale: float = 0.5,
        max_scale: float = 2.0,
        max_class_share: float = 0.75,
        flip: float = 0.5,
        distort: float = 0.5,
        brightness: float = 32.0,
        contrast: float = 0.5,
        saturation: float = 0.5,
        hue: int = 18,
        interpolation: str = "bilinear",
    ) -> None:
        self.image_size = height_width(image_size)
        self.base = _base(short_side, max_aspect)
        for name, value in (("min_scale", min_scale), ("max_scale", max_scale)):
            real_number(name, value)
        if not 0.0 < min_scale <= max_scale <= 16.0:
            raise UserError(f"scale {min_scale}..{max_scale}: expected 0 < min <= max <= 16")
        self.scale = min_scale, max_scale
        self.max_class_share = checked_share("max_class_share", max_class_share)
        self.flip = checked_share("flip", flip)
        self.distortion = Distortion(
            share=distort, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )
        self.interpolation = interpolation
        self._resample = checked_interpolation(interpolation)
        mean, _ = checked_normalisation(mean, (1.0, 1.0, 1.0))
        self._padding = np.clip(np.round(np.array(mean) * 255), 0, 255).astype(np.uint8)

    def __call__(
        self, image: Image.Image, labels: LabelMap, rng: random.Random, colour_rng: random.Random
    ) -> tuple[Tensor, Tensor]:
        """An RGB image, int16 (H0, W0) -> uint8 (3, H, W), int16 (H, W)."""
        draws = self.draw(labels, rng)
        crop = self.distortion(self.crop(image, draws), colour_rng)
        return self._padded(crop, cropped_labels(labels, draws))

    def draw(self, labels: LabelMap, rng: random.Random) -> Draws:
        """Size, side and crop; the crop depends on the labels in it."""
        height, width = labels.shape
        scale = rng.uniform(*self.scale)
        size = fitted((height, width), *(int(side * scale) for side in self.base))
        draws = Draws(size, rng.random() < self.flip, self._box(size, rng))
        for _ in range(CROPS if self.max_class_share < 1.0 else 0):
            if is_mixed(cropped_labels(labels, draws), self.max_class_share):
                break
            draws = draws._replace(box=self._box(size, rng))
        return draws

    def crop(self, image: Image.Image, draws: Draws) -> Image.Image:
        """The box of the resized image, mirrored if so drawn."""
        (height, width), box = draws.size, draws.box
        region = (
            box.left * image.width / width,
            box.top * image.height / height,
            (box.left + box.width) * image.width / width,
            (box.top + box.height) * image.height / height,
        )
        crop = image.resize((box.width, box.height), self._resample, region)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.mirrored else crop

    def _box(self, size: tuple[int, int], rng: random.Random) -> CropBox:
        height, width = (min(side, most) for side, most in zip(size, self.image_size))
        top, left = rng.randint(0, size[0] - height), rng.randint(0, size[1] - width)
        return CropBox(top, left, height, width)

    def _padded(self, image: Image.Image, labels: LabelMap) -> tuple[Tensor, Tensor]:
        if labels.shape == self.image_size:
            return to_tensor(image), torch.from_numpy(np.ascontiguousarray(labels))
        height, width = labels.shape
        pixels = np.empty((*self.image_size, 3), dtype=np.uint8)
        pixels[:] = self._padding
        pixels[:height, :width] = np.asarray(image)
        padded = np.full(self.image_size, IGNORED, dtype=np.int16)
        padded[:height, :width] = labels
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(padded)

    def __repr__(self) -> str:
        long, short = self.base
        return (
            f"SegmentationTrainTransform(image={by(self.image_size)} {self.interpolation}, "
            f"base=({long}, {short}), scale={self.scale[0]:.4g}..{self.scale[1]:.4g}, "
            f"max_class_share={self.max_class_share}, flip={self.flip}, {self.distortion!r})"
        )


class SegmentationEvalTransform:
    """Resize, aspect kept, to a short side; the long side is at most `max_aspect` times that.

    `short_side` "original" leaves the image as it is.

    Raises:
        UserError: numbers out of range.
    """

    def __init__(
        self,
        *,
        short_side: int | Sequence[int] | Literal["original"],
        max_aspect: float = 4.0,
        interpolation: str = "bilinear",
    ) -> None:
        self.base = None if short_side == "original" else _base(short_side, max_aspect)
        self.interpolation = interpolation
        self._resample = checked_interpolation(interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image -> uint8 (3, H, W)."""
        if self.base is not None:
            height, width = fitted((image.height, image.width), *self.base)
            if image.size != (width, height):
                image = image.resize((width, height), self._resample)
        return to_tensor(image)

    def __repr__(self) -> str:
        if self.base is None:
            return "SegmentationEvalTransform(original size)"
        long, short = self.base
        return f"SegmentationEvalTransform(base=({long}, {short}) {self.interpolation})"


def fitted(size: tuple[int, int], long: int, short: int) -> tuple[int, int]:
    """(h, w) of an image of `size`, aspect kept, within `long` and `short` (mmcv.imrescale)."""
    factor = min(long / max(size), short / min(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def cropped_labels(labels: LabelMap, draws: Draws) -> LabelMap:
    """The box of the resized label map, mirrored if so drawn: the labels at the pixels' centres."""
    (height, width), box = draws.size, draws.box
    rows = _centres(box.top, box.height, height, labels.shape[0])
    columns = _centres(box.left, box.width, width, labels.shape[1])
    return labels[rows][:, columns[::-1] if draws.mirrored else columns]


def is_mixed(labels: LabelMap, max_class_share: float) -> bool:
    """Whether there are two classes or more, and the largest has less than that share.

    Shares are of the labelled pixels (mmsegmentation).
    """
    counts = np.bincount(labels.ravel() + 1)[1:]  # IGNORED is -1
    mixed = np.count_nonzero(counts) > 1
    return bool(mixed and counts.max() < max_class_share * counts.sum())


def _centres(start: int, count: int, new: int, old: int) -> np.ndarray:
    """Of `count` of `new` pixels, from `start` on: in which of `old` pixels each centre lies."""
    # whole numbers: (2 i + 1) / 2 * old / new, rounded down
    return (2 * np.arange(start, start + count) + 1) * old // (2 * new)


def _base(short_side: int | Sequence[int], max_aspect: float) -> tuple[int, int]:
    """(long, short): the sides that an image is fitted into."""
    if real_number("max_aspect", max_aspect) < 1.0:
        raise UserError(f"max_aspect {max_aspect}: expected at least 1")
    short = min(height_width(short_side, "short_side"))
    return int(short * max_aspect), short
