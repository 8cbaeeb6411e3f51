"""Sizes and grids: what divides, and what a user reads where it does not."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from beit.errors import UserError
from beit.sizes import height_width, patch_grid, token_grid


def test_grid_of_rectangular_images_is_rows_by_columns() -> None:
    assert patch_grid([24, 40], 8) == (3, 5)
    assert token_grid(24, 8) == (3, 3)
    assert patch_grid(OmegaConf.create([24, 40]), 8) == (3, 5)


@pytest.mark.parametrize(
    ("size", "side", "words"),
    [
        (30, 8, "30x30 does not divide by {} 8.*32x32"),
        ([24, 41], 8, "24x40"),
        (4, 8, "4x4 is smaller than {} 8"),
        ([40, 4], 8, "smaller than"),
        (24, 0, "{} 0"),
    ],
)
def test_a_grid_that_does_not_divide_is_refused(
    size: int | list[int], side: int, words: str
) -> None:
    with pytest.raises(UserError, match=words.format("patch_size")):
        patch_grid(size, side)
    with pytest.raises(UserError, match=words.format("stride")):
        token_grid(size, side)


@pytest.mark.parametrize("size", [0, [24, 0], [24], [24, 40, 3], "ab", 2.5, None])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(UserError, match=r"expected one number or \[height, width\]"):
        height_width(size)  # type: ignore[arg-type]  # what a config may hold


def test_sizes_import_nothing_heavy() -> None:
    code = "import sys, beit.sizes; assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
