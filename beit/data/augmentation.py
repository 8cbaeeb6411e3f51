"""timm's augmentation policies: checked before use, and with one mistake of theirs mended."""

import re
from typing import Any

from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment

from beit.errors import UserError

# timm's policies; timm itself passes over sections that it does not know
_NUMBER = r"\d+(?:\.\d+)?"
_POLICY = re.compile(
    rf"rand(-([mn]\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|tweights|t3aw?))*"
    rf"|augmix(-([mw]\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(v0r?|originalr?|3a)(-mstd{_NUMBER})*"
)


def checked_policy(policy: str | None) -> str | None:
    """The policy as it is. Raises UserError for one that timm does not know, or half knows."""
    if policy is not None and not (isinstance(policy, str) and _POLICY.fullmatch(policy)):
        raise UserError(
            f"auto_augment {policy!r}: expected rand-m9-mstd0.5-inc1 or another policy of timm's "
            "(rand, augmix, v0, v0r, original, originalr, 3a, each with its own sections), or null"
        )
    return policy


def keep_one_bit(step: RandAugment) -> None:
    """Posterizing keeps at least one bit: at timm's highest level it keeps none, which is a black
    image up to Pillow 12 and an error since. It hits about one image in five hundred."""
    for op in step.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, max(bits, 1)) if bits < 8 else image
