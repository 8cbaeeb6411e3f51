"""Photometric distortion of mmsegmentation, by tables of 256 entries."""

import random

import numpy as np
from PIL import Image

from beit.data.limits import checked_share, not_negative, whole_number
from beit.errors import UserError

_LEVELS = np.arange(256, dtype=np.float32)


class Distortion:
    """Brightness, contrast, saturation and hue, each with probability `share`.

    Brightness adds U(-brightness, brightness) levels of 255; contrast multiplies by
    U(1 - contrast, 1 + contrast), either before the next two or after them; saturation multiplies
    that of HSV likewise; hue adds a whole number in [-hue, hue), of 2 degrees each (OpenCV's
    unit). Results are cut to 0..255 and their fractions dropped, as there.

    Raises:
        UserError: a share outside [0, 1], or other numbers out of range.
    """

    def __init__(
        self, *, share: float, brightness: float, contrast: float, saturation: float, hue: int
    ) -> None:
        self.share = checked_share("distort", share)
        self.brightness = not_negative("brightness", brightness)
        self.contrast = checked_share("contrast", contrast)
        self.saturation = checked_share("saturation", saturation)
        self.hue = whole_number("hue", hue, at_least=0)
        if self.hue > 90:
            raise UserError(
                f"hue {hue}: expected at most 90, half the circle in steps of 2 degrees"
            )

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """An RGB image -> another of its size."""
        brightness = self._drawn(rng, -self.brightness, self.brightness, neutral=0.0)
        early = rng.random() < 0.5
        contrast = self._drawn(rng, 1 - self.contrast, 1 + self.contrast, neutral=1.0)
        saturation = self._drawn(rng, 1 - self.saturation, 1 + self.saturation, neutral=1.0)
        turned = rng.random() < self.share and self.hue > 0
        hue = rng.randrange(-self.hue, self.hue) if turned else 0
        first = _cut(_LEVELS + brightness)
        last = _cut(_LEVELS * contrast)
        image = _by_tables(image, *[last[first] if early else first] * 3)
        image = _in_hsv(image, saturation, hue)
        return image if early else _by_tables(image, *[last] * 3)

    def _drawn(self, rng: random.Random, low: float, high: float, *, neutral: float) -> float:
        """U(low, high) with probability `share`; drawn either way, for what is drawn later."""
        chosen, value = rng.random() < self.share, rng.uniform(low, high)
        return value if chosen else neutral

    def __repr__(self) -> str:
        return (
            f"Distortion(share={self.share}, brightness={self.brightness}, "
            f"contrast={self.contrast}, saturation={self.saturation}, hue={self.hue})"
        )


def _in_hsv(image: Image.Image, saturation: float, hue: int) -> Image.Image:
    if saturation == 1.0 and hue == 0:
        return image
    # Pillow's circle has 256 steps, OpenCV's 180
    turned = ((_LEVELS + round(hue * 256 / 180)) % 256).astype(np.uint8)
    tables = turned, _cut(_LEVELS * saturation), _cut(_LEVELS)
    return _by_tables(image.convert("HSV"), *tables).convert("RGB")


def _cut(levels: np.ndarray) -> np.ndarray:
    return np.clip(levels, 0, 255).astype(np.uint8)


def _by_tables(image: Image.Image, *tables: np.ndarray) -> Image.Image:
    """A table of 256 entries for each channel."""
    if all(np.array_equal(table, _LEVELS) for table in tables):
        return image
    return image.point(np.concatenate(tables).tolist())
