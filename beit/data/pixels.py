"""Operations on RGB images that the views are made of: crop, jitter, resize, checks.

Every draw comes from the `random.Random` that is handed in.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit.data.limits import real_number
from beit.errors import UserError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class CropBox(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_jitter(rng: random.Random, strength: float) -> list[tuple[str, float]]:
    """Names and factors of the three adjustments, in the order in which they are applied."""
    names = ("brightness", "contrast", "saturation")
    jitter = [(name, rng.uniform(1.0 - strength, 1.0 + strength)) for name in names]
    rng.shuffle(jitter)
    return jitter if strength > 0 else []


def draw_crop(
    rng: random.Random,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> CropBox:
    """A box with a share U(scale) of the area and a log-uniform aspect; size is (width, height).

    After ten boxes that do not fit, the largest central one with an allowed aspect, as in
    torchvision's RandomResizedCrop.
    """
    width, height = size
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return CropBox(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(w / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(h * ratio[1]))
    w, h = max(w, 1), max(h, 1)
    return CropBox((height - h) // 2, (width - w) // 2, h, w)


def jittered_crop(
    image: Image.Image, jitter: list[tuple[str, float]], box: CropBox, mirrored: bool
) -> Image.Image:
    """The pixels of jitter, then mirror, then crop, with less work.

    Brightness and saturation look at one pixel at a time; only contrast needs the whole image, for
    its mean. So everything after that mean is worked out inside the box alone.
    """
    names = [name for name, _ in jitter]
    whole = names.index("contrast") if "contrast" in names else 0
    for name, factor in jitter[:whole]:
        image = _adjusted(image, name, factor, 0)
    mean = _grey_mean(image) if jitter else 0
    crop = cropped(image, box, mirrored)
    for name, factor in jitter[whole:]:
        crop = _adjusted(crop, name, factor, mean)
    return crop


def cropped(image: Image.Image, box: CropBox, mirrored: bool) -> Image.Image:
    """The box of the mirrored image, if mirrored: cut from the other side, then turned."""
    crop = cut(image, box, mirrored)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop


def cut(image: Image.Image, box: CropBox, mirrored: bool) -> Image.Image:
    """The box of the mirrored image, if mirrored, not turned yet."""
    left = image.width - box.left - box.width if mirrored else box.left
    return image.crop((left, box.top, left + box.width, box.top + box.height))


def _adjusted(image: Image.Image, name: str, factor: float, grey_mean: int) -> Image.Image:
    """Blends with black, with the mean grey, or with the grey image (Pillow's ImageEnhance)."""
    if name == "saturation":
        other = image.convert("L").convert("RGB")
    else:
        level = grey_mean if name == "contrast" else 0
        other = Image.new("RGB", image.size, (level, level, level))
    return Image.blend(other, image, factor)


_LEVELS = np.arange(256)


def _grey_mean(image: Image.Image) -> int:
    counts = image.convert("L").histogram()
    return int(float(_LEVELS @ counts) / (image.width * image.height) + 0.5)


def resized(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    *,
    box: tuple[float, float, float, float] | None = None,
) -> Tensor:
    """uint8 (3, H, W) of the image, or of a box of it that may lie between pixels, resized."""
    return to_tensor(resized_image(image, size, resample, box=box))


def resized_image(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    *,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The image, or the box (left, top, right, bottom) of it, at size (H, W)."""
    height, width = size
    if box is None and image.size == (width, height):
        return image
    return image.resize((width, height), resample, box)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def checked_interpolation(name: str) -> Image.Resampling:
    """Pillow's filter of that name. Raises UserError for an unknown one."""
    if not isinstance(name, str) or name not in INTERPOLATIONS:
        raise UserError(f"interpolation {name!r}: expected one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def checked_crop(
    scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ranges of a random crop. Raises UserError where they are empty."""
    for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
        real_number(f"min_{name}", low)
        real_number(f"max_{name}", high)
    if not 0.0 < scale[0] <= scale[1] <= 1.0:
        raise UserError(f"crop scale {scale[0]}..{scale[1]}: expected 0 < min <= max <= 1")
    if not 0.0 < ratio[0] <= ratio[1]:
        raise UserError(f"crop ratio {ratio[0]}..{ratio[1]}: expected 0 < min <= max")
    return scale, ratio


def by(size: tuple[int, int]) -> str:
    """Height x width, for messages."""
    return f"{size[0]}x{size[1]}"
