"""From an RGB image to tensors: the two views of pretraining, and a tokenizer's own.

Every draw is a function of what is handed in: a `random.Random`, or (seed, epoch, index).
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from beit.data.classification_views import EvalTransform as EvalTransform
from beit.data.classification_views import TrainTransform as TrainTransform
from beit.data.images import LazyJpeg
from beit.data.limits import checked_share
from beit.data.pixels import (
    CropBox,
    by,
    checked_crop,
    checked_interpolation,
    cropped,
    draw_crop,
    draw_jitter,
    jittered_crop,
    resized,
)
from beit.data.reduction import Part, part, reduction
from beit.sizes import height_width


class Draws(NamedTuple):
    """What was drawn for the views of one sample."""

    jitter: list[tuple[str, float]]
    mirrored: bool
    box: CropBox


class Target(NamedTuple):
    """What a crop is resized to: (H, W), and by which filter."""

    size: tuple[int, int]
    resample: Image.Resampling


@dataclass(kw_only=True, repr=False, eq=False)
class TwoViewTransform:
    """One crop of an image at two sizes: for the encoder, and for the tokenizer.

    Colour jitter on the full image (brightness, contrast and saturation, each by a factor of
    U(1 - color_jitter, 1 + color_jitter), in random order), mirroring with probability `flip`, one
    crop box of U(min_scale, max_scale) of the area, and two resizes of the cropped image. The
    numbers are those of the released code (BEiT section 2.5 and its data transform).

    With `scaled_decoding` a JPEG of which the crop has twice the pixels that both views need, or
    more, in each direction, is read at 1/2, 1/4 or 1/8 (see `reduction`): the same draws, crops of
    the same place, pixels a little different. Without it they are the released code's, bit for bit.

    Normalisation happens later, on the device.
    """

    image_size: int | tuple[int, int]
    token_image_size: int | tuple[int, int]
    min_scale: float = 0.08
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3
    color_jitter: float = 0.4
    flip: float = 0.5
    image_interpolation: str = "bicubic"
    token_interpolation: str = "lanczos"
    scaled_decoding: bool = False

    def __post_init__(self) -> None:
        scale, ratio = (self.min_scale, self.max_scale), (self.min_ratio, self.max_ratio)
        self.scale, self.ratio = checked_crop(scale, ratio)
        checked_share("color_jitter", self.color_jitter)
        checked_share("flip", self.flip)
        self._for_encoder = _target(self.image_size, self.image_interpolation)
        self._for_tokenizer = _target(self.token_image_size, self.token_interpolation)

    def __call__(
        self, image: Image.Image | LazyJpeg, rng: random.Random, *, token_view: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """An RGB image -> uint8 (3, H, W) for the encoder and (3, H', W') for the tokenizer.

        Without `token_view` the second is None, and nothing else changes. Raises UnreadableImage
        for what a JPEG's header did not tell.
        """
        draws = self._draw(image, rng)
        if not token_view:
            return self._views(image, draws, self._for_encoder)[0], None
        first, second = self._views(image, draws, self._for_encoder, self._for_tokenizer)
        return first, second

    def token_view(self, image: Image.Image | LazyJpeg, rng: random.Random) -> Tensor:
        """The second view alone."""
        return self._views(image, self._draw(image, rng), self._for_tokenizer)[0]

    def _draw(self, image: Image.Image | LazyJpeg, rng: random.Random) -> Draws:
        jitter = draw_jitter(rng, self.color_jitter)
        mirrored = rng.random() < self.flip
        return Draws(jitter, mirrored, draw_crop(rng, image.size, self.scale, self.ratio))

    def _views(self, image: Image.Image | LazyJpeg, draws: Draws, *targets: Target) -> list[Tensor]:
        pixels, box, inside = self._part(image, draws)
        crop = jittered_crop(pixels, draws.jitter, box, draws.mirrored)
        return [resized(crop, *target, box=inside) for target in targets]

    def _part(self, image: Image.Image | LazyJpeg, draws: Draws) -> Part:
        # by what both views need, whichever are made: each looks the same without the other
        sizes = self._for_encoder.size, self._for_tokenizer.size
        reduced_by = reduction(draws.box, *sizes) if self.scaled_decoding else 1
        return part(image, draws.box, draws.mirrored, reduced_by=reduced_by)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(image={by(self._for_encoder.size)} {self.image_interpolation}, "
            f"token_image={by(self._for_tokenizer.size)} {self.token_interpolation}, "
            f"scale={self.scale[0]:.4g}..{self.scale[1]:.4g}, "
            f"ratio={self.ratio[0]:.4g}..{self.ratio[1]:.4g}, "
            f"color_jitter={self.color_jitter}, flip={self.flip}"
            f"{', scaled_decoding=True' if self.scaled_decoding else ''})"
        )


class PixelTransform:
    """One crop for training a tokenizer: random resized crop and mirroring.

    No jitter: a tokenizer shall reproduce the colours it will be shown, and these are jittered
    only mildly (the paper's own tokenizer training is not published in such detail).
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        min_scale: float = 0.08,
        max_scale: float = 1.0,
        min_ratio: float = 3 / 4,
        max_ratio: float = 4 / 3,
        flip: float = 0.5,
        interpolation: str = "lanczos",
    ) -> None:
        self.scale, self.ratio = checked_crop((min_scale, max_scale), (min_ratio, max_ratio))
        self.flip = checked_share("flip", flip)
        self.interpolation = interpolation
        self._target = _target(image_size, interpolation)

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        """An RGB image -> uint8 (3, H, W)."""
        mirrored = rng.random() < self.flip
        box = draw_crop(rng, image.size, self.scale, self.ratio)
        return resized(cropped(image, box, mirrored), *self._target)

    def __repr__(self) -> str:
        return (
            f"PixelTransform(image={by(self._target.size)} {self.interpolation}, "
            f"scale={self.scale[0]:.4g}..{self.scale[1]:.4g}, "
            f"ratio={self.ratio[0]:.4g}..{self.ratio[1]:.4g}, flip={self.flip})"
        )


def _target(size: int | tuple[int, int], interpolation: str) -> Target:
    return Target(height_width(size), checked_interpolation(interpolation))
