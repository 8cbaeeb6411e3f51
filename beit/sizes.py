"""Sizes of images in pixels and the grids they divide into. Imports nothing heavy."""

from collections.abc import Sequence

from beit.errors import UserError


def height_width(size: int | Sequence[int], name: str = "image_size") -> tuple[int, int]:
    """(H, W) of a size in pixels that is one number for both sides or a pair.

    Raises UserError, with the `name`, for anything else, and for a side below 1.
    """
    try:
        sides = (size,) * 2 if isinstance(size, int) else tuple(map(int, size))
    except (TypeError, ValueError):
        sides = ()
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"{name} {size}: expected one number or [height, width], each at least 1")
    return sides[0], sides[1]


def patch_grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """(h, w) patches of an image. Raises UserError where the patch does not divide it."""
    return _grid(image_size, patch_size, "patch_size")


def token_grid(image_size: int | Sequence[int], stride: int) -> tuple[int, int]:
    """(h, w) tokens of an image. Raises UserError where the stride does not divide it."""
    return _grid(image_size, stride, "stride")


def _grid(image_size: int | Sequence[int], side: int, name: str) -> tuple[int, int]:
    height, width = height_width(image_size)
    if side < 1:
        raise UserError(f"{name} {side}: expected at least 1 pixel")
    if height < side or width < side:
        raise UserError(
            f"image_size {height}x{width} is smaller than {name} {side}: enlarge the image or take "
            f"a smaller {name}"
        )
    if height % side or width % side:
        raise UserError(
            f"image_size {height}x{width} does not divide by {name} {side}: choose multiples of "
            f"{side}, for example {round(height / side) * side}x{round(width / side) * side}"
        )
    return height // side, width // side
