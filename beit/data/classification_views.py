"""A classifier's views of an image: timm's augmentation for training, BEiT's resize and crop.

Every draw is a function of (seed, epoch, index).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from beit.data.augmentation import checked_policy, keep_one_bit
from beit.data.images import LazyJpeg
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
    resized,
    resized_image,
    to_tensor,
)
from beit.data.randomness import keyed_global_rng
from beit.data.reduction import part, reduction
from beit.errors import UserError
from beit.sizes import height_width

LONGEST_STRIP = 64  # times its shorter side


class TrainTransform:
    """The training augmentation of a classifier: timm's recipe, as in BEiT's fine-tuning.

    Random resized crop, mirroring, RandAugment (which switches colour jitter off, timm's
    convention) or colour jitter, normalisation, random erasing. Up to 32 px the image is padded
    by `small_crop_padding` pixels and cut at random instead of the resized crop, as in the
    released code; `min_scale` then has no effect. `auto_augment` is one of timm's policies
    (rand-..., augmix-..., v0, original, 3a), or None.
    Defaults: BEiT table 13 and released code.

    With `scaled_decoding` a JPEG of which the crop has twice the pixels of the view, or more, in
    each direction, is read at 1/2, 1/4 or 1/8 (see `reduction`): the same draws, crops of the same
    place, pixels a little different. No effect up to 32 px.

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
        scaled_decoding: bool = False,
    ) -> None:
        self.image_size = height_width(image_size)
        scale, _ = checked_crop((min_scale, max_scale), (3 / 4, 4 / 3))
        resample = checked_interpolation(interpolation)
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
        self.scaled_decoding = scaled_decoding and max(self.image_size) > 32
        steps = self._steps.transforms
        if max(self.image_size) <= 32:
            crop = transforms.RandomCrop(self.image_size, padding=padding)
            steps[0] = transforms.Compose([_ExactSize(self.image_size), crop])
        elif scaled_decoding:
            steps[0] = _ReducedCrop(steps[0], self.image_size, resample)
        for step in steps:
            if isinstance(step, RandomErasing):
                step.device = "cpu"
            if isinstance(step, RandAugment):
                keep_one_bit(step)

    def __call__(self, image: Image.Image | LazyJpeg, seed: int, epoch: int, index: int) -> Tensor:
        """An RGB image -> float (3, H, W), normalised.

        Raises UnreadableImage for what a JPEG's header did not tell.
        """
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

    Photographs are decoded as a whole, always: accuracies are compared with those of others.

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


class _ReducedCrop:
    """timm's resized crop, of no more of a JPEG than it needs; the box is drawn as timm does."""

    def __init__(
        self,
        step: RandomResizedCropAndInterpolation,
        size: tuple[int, int],
        resample: Image.Resampling,
    ) -> None:
        self.step, self.size, self.resample = step, size, resample

    def __call__(self, image: Image.Image | LazyJpeg) -> Image.Image:
        width, height = image.size
        nothing = torch.empty(height, width, device="meta")  # has a size, takes no memory
        box = CropBox(*self.step.get_params(nothing, self.step.scale, self.step.ratio))
        pixels, around, inside = part(image, box, False, reduced_by=reduction(box, self.size))
        return resized_image(cropped(pixels, around, False), self.size, self.resample, box=inside)

    def __repr__(self) -> str:
        return f"{self.step!r} of a scaled decoding"


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
