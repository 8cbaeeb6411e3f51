"""From an RGB image to tensors: the two views of pretraining, a tokenizer's, a classifier's.

Every draw is a function of what is handed in: a `random.Random`, or (seed, epoch, index).
"""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from beit.data.augmentation import checked_policy, keep_one_bit
from beit.data.limits import (
    checked_normalisation,
    checked_share,
    not_negative,
    real_number,
    whole_number,
)
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
    to_tensor,
)
from beit.data.randomness import keyed_global_rng
from beit.errors import UserError
from beit.sizes import height_width

LONGEST_STRIP = 64  # times its shorter side


class Draws(NamedTuple):
    """What was drawn for the views of one sample."""

    jitter: list[tuple[str, float]]
    mirrored: bool
    box: CropBox


class Target(NamedTuple):
    """What a crop is resized to: (H, W), and by which filter."""

    size: tuple[int, int]
    resample: Image.Resampling


class TwoViewTransform:
    """One crop of an image at two sizes: for the encoder, and for the tokenizer.

    Colour jitter on the full image (brightness, contrast and saturation, each by a factor of
    U(1 - color_jitter, 1 + color_jitter), in random order), mirroring with probability `flip`, one
    crop box of U(min_scale, max_scale) of the area, and two resizes of the cropped image. The
    numbers are those of the released code (BEiT section 2.5 and its data transform).

    Normalisation happens later, on the device.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        token_image_size: int | tuple[int, int],
        min_scale: float = 0.08,
        max_scale: float = 1.0,
        min_ratio: float = 3 / 4,
        max_ratio: float = 4 / 3,
        color_jitter: float = 0.4,
        flip: float = 0.5,
        image_interpolation: str = "bicubic",
        token_interpolation: str = "lanczos",
    ) -> None:
        self.image_size = height_width(image_size)
        self.token_image_size = height_width(token_image_size)
        self.scale, self.ratio = checked_crop((min_scale, max_scale), (min_ratio, max_ratio))
        self.color_jitter = checked_share("color_jitter", color_jitter)
        self.flip = checked_share("flip", flip)
        self.image_interpolation = image_interpolation
        self.token_interpolation = token_interpolation
        self._for_encoder = Target(self.image_size, checked_interpolation(image_interpolation))
        resample = checked_interpolation(token_interpolation)
        self._for_tokenizer = Target(self.token_image_size, resample)

    def __call__(
        self, image: Image.Image, rng: random.Random, *, token_view: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """An RGB image -> uint8 (3, H, W) for the encoder and (3, H', W') for the tokenizer.

        Without `token_view` the second is None, and nothing else changes.
        """
        draws = self._draw(image, rng)
        if not token_view:
            return self._views(image, draws, self._for_encoder)[0], None
        first, second = self._views(image, draws, self._for_encoder, self._for_tokenizer)
        return first, second

    def token_view(self, image: Image.Image, rng: random.Random) -> Tensor:
        """The second view alone."""
        return self._views(image, self._draw(image, rng), self._for_tokenizer)[0]

    def _draw(self, image: Image.Image, rng: random.Random) -> Draws:
        jitter = draw_jitter(rng, self.color_jitter)
        mirrored = rng.random() < self.flip
        return Draws(jitter, mirrored, draw_crop(rng, image.size, self.scale, self.ratio))

    def _views(self, image: Image.Image, draws: Draws, *targets: Target) -> list[Tensor]:
        crop = jittered_crop(image, draws.jitter, draws.box, draws.mirrored)
        return [resized(crop, *target) for target in targets]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(image={by(self.image_size)} {self.image_interpolation}, "
            f"token_image={by(self.token_image_size)} {self.token_interpolation}, "
            f"scale={self.scale[0]:.4g}..{self.scale[1]:.4g}, "
            f"ratio={self.ratio[0]:.4g}..{self.ratio[1]:.4g}, "
            f"color_jitter={self.color_jitter}, flip={self.flip})"
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
        self.image_size = height_width(image_size)
        self.scale, self.ratio = checked_crop((min_scale, max_scale), (min_ratio, max_ratio))
        self.flip = checked_share("flip", flip)
        self.interpolation = interpolation
        self._resample = checked_interpolation(interpolation)

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        """An RGB image -> uint8 (3, H, W)."""
        mirrored = rng.random() < self.flip
        box = draw_crop(rng, image.size, self.scale, self.ratio)
        return resized(cropped(image, box, mirrored), self.image_size, self._resample)

    def __repr__(self) -> str:
        return (
            f"PixelTransform(image={by(self.image_size)} {self.interpolation}, "
            f"scale={self.scale[0]:.4g}..{self.scale[1]:.4g}, "
            f"ratio={self.ratio[0]:.4g}..{self.ratio[1]:.4g}, flip={self.flip})"
        )


class TrainTransform:
    """The training augmentation of a classifier: timm's recipe, as in BEiT's fine-tuning.

    Random resized crop, mirroring, RandAugment (which switches colour jitter off, timm's
    convention) or colour jitter, normalisation, random erasing. Up to 32 px the image is padded
    by `small_crop_padding` pixels and cut at random instead of the resized crop, as in the
    released code; `min_scale` then has no effect. `auto_augment` is one of timm's policies
    (rand-..., augmix-..., v0, original, 3a), or None.
    Defaults: BEiT table 13 and released code.

    Raises UserError for an unknown policy and for numbers out of range.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        min_scale: float = 0.08,
        max_scale: float = 1.0,
        flip: float = 0.5,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        random_erasing: float = 0.25,
        interpolation: str = "bicubic",
        small_crop_padding: int = 4,
    ) -> None:
        self.image_size = height_width(image_size)
        scale, _ = checked_crop((min_scale, max_scale), (3 / 4, 4 / 3))
        checked_interpolation(interpolation)
        self.auto_augment = checked_policy(auto_augment)
        self.mean, self.std = checked_normalisation(mean, std)
        padding = whole_number("small_crop_padding", small_crop_padding, at_least=0)
        self._steps = create_transform(
            (3, *self.image_size),
            is_training=True,
            scale=scale,
            hflip=checked_share("flip", flip),
            color_jitter=not_negative("color_jitter", color_jitter),
            auto_augment=auto_augment,
            interpolation=interpolation,
            mean=self.mean,
            std=self.std,
            re_prob=checked_share("random_erasing", random_erasing),
            re_mode="pixel",
            re_count=1,
        )
        if max(self.image_size) <= 32:
            crop = transforms.RandomCrop(self.image_size, padding=padding)
            self._steps.transforms[0] = transforms.Compose([_ExactSize(self.image_size), crop])
        for step in self._steps.transforms:
            if isinstance(step, RandomErasing):
                step.device = "cpu"
            if isinstance(step, RandAugment):
                keep_one_bit(step)

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> Tensor:
        """An RGB image -> float (3, H, W), normalised."""
        with keyed_global_rng(seed, epoch, index, "views"):
            return self._steps(image)

    def __repr__(self) -> str:
        steps = ", ".join(self._one_line(step) for step in self._steps.transforms)
        return f"TrainTransform(image={by(self.image_size)}: {steps})"

    def _one_line(self, step: object) -> str:
        if isinstance(step, RandAugment | AutoAugment | AugMixAugment):
            return f"{type(step).__name__}({self.auto_augment})"  # timm lists every operation
        return " ".join(repr(step).split())


class EvalTransform:
    """Resize so that size / crop_pct is covered, cut the centre, normalise.

    With crop_pct 1 and at most 32 px a plain resize to the exact size. "auto" is the released
    code's rule: that plain resize up to 32 px, 0.875 below 384 px, 1.0 from there on (timm's 0.9
    is not what BEiT was measured with). With crop_mode "squash" the sides are resized each by
    itself, the aspect given up, as transformers' processor does it.

    Raises UserError for a share outside (0, 1] and for a normalisation that is none.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        crop_pct: float | str = "auto",
        crop_mode: Literal["center", "squash"] = "center",
        interpolation: str = "bicubic",
    ) -> None:
        self.image_size = height_width(image_size)
        self.crop_pct = _crop_share(crop_pct, self.image_size)
        if crop_mode not in ("center", "squash"):
            raise UserError(f"crop_mode {crop_mode!r} must be 'center' or 'squash'")
        self.crop_mode = crop_mode
        self.mean, self.std = checked_normalisation(mean, std)
        self.interpolation = interpolation
        self._resample = checked_interpolation(interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image -> float (3, H, W), normalised."""
        if self.crop_pct == 1.0 and max(self.image_size) <= 32:
            pixels = resized(image, self.image_size, self._resample)
        else:
            pixels = to_tensor(self._centre(image))
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return pixels.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])

    def _centre(self, image: Image.Image) -> Image.Image:
        image = _middle(image)
        height, width = self.image_size
        tall, wide = int(height / self.crop_pct), int(width / self.crop_pct)
        if self.crop_mode == "center":  # keep the aspect: the tighter side decides
            if tall * image.width >= wide * image.height:
                wide = max(wide, int(tall * image.width / image.height))
            else:
                tall = max(tall, int(wide * image.height / image.width))
        if image.size != (wide, tall):
            image = image.resize((wide, tall), self._resample)
        top, left = round((tall - height) / 2), round((wide - width) / 2)
        return image.crop((left, top, left + width, top + height))

    def __repr__(self) -> str:
        return (
            f"EvalTransform(image={by(self.image_size)} {self.interpolation}, "
            f"crop_pct={self.crop_pct} {self.crop_mode}, mean={self.mean}, std={self.std})"
        )


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a strip: as a whole it would be resized to gigabytes, nearly all cut off."""
    longest = LONGEST_STRIP * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class _ExactSize:
    """Bicubic resize to (H, W), the aspect given up: small images mostly have that size anyway."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if image.size == (width, height):
            return image
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def __repr__(self) -> str:
        return f"_ExactSize({by(self.size)})"


def _crop_share(crop_pct: float | str, image_size: tuple[int, int]) -> float:
    """The share itself, or by the released code's rule for "auto"."""
    if crop_pct == "auto":
        return 0.875 if 32 < max(image_size) < 384 else 1.0
    if isinstance(crop_pct, str | None) or not 0.0 < real_number("crop_pct", crop_pct) <= 1.0:
        raise UserError(f"crop_pct {crop_pct!r}: must lie in (0, 1], or be auto (0.875 at 224 px)")
    return float(crop_pct)
