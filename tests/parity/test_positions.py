"""Resizing of the relative bias table: timm's with SciPy's spline in it, and published ratios.

timm interpolates linearly where the released code has a cubic spline (SciPy's, since removed): here
its interpolator is replaced by that spline, and its coordinates and layout remain the oracle. Where
a side keeps its length it resamples that side all the same; ours leaves it alone.
"""

import ast
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm.layers.pos_embed_rel
import torch
from timm.layers.pos_embed_rel import gen_relative_position_index, resize_rel_pos_bias_table

import beit
from beit.models.position import (
    geometric_ratio,
    relative_position_index,
    relative_table_rows,
    resize_relative_table,
)

SQUARE = [((14, 14), (side, side)) for side in (24, 32, 40)]
NON_SQUARE = [((14, 14), (24, 32)), ((3, 5), (4, 9)), ((5, 7), (11, 13)), ((7, 11), (5, 3))]
PUBLISHED = {24: 1.090307, 32: 1.134918, 40: 1.168504}


class SplineOfSciPy:
    """Takes the place of timm's linear interpolator: the released code's kind, cubic."""

    def __init__(self, axes, surface):
        interpolate = pytest.importorskip("scipy.interpolate")
        ys, xs = (axis.double().numpy() for axis in axes)
        self.spline = interpolate.RectBivariateSpline(ys, xs, surface.double().numpy(), s=0)

    def __call__(self, points):
        ys, xs = (grid.double().numpy() for grid in points)
        return torch.from_numpy(self.spline.ev(ys, xs)).float()


@pytest.mark.parametrize(("source", "target"), SQUARE + NON_SQUARE)
def test_resized_tables(source, target, measured, monkeypatch):
    monkeypatch.setattr(timm.layers.pos_embed_rel, "RegularGridInterpolator", SplineOfSciPy)
    table = torch.randn(relative_table_rows(source), 2, generator=torch.Generator().manual_seed(3))
    shape = (relative_table_rows(target), 2)
    expected = resize_rel_pos_bias_table(table, target, shape, source)
    found = resize_relative_table(table, source, target)
    difference = (found - expected).abs().max()
    what = f"bias table, {source[0]}x{source[1]} to {target[0]}x{target[1]}"
    measured("Positions", what, "timm with SciPy's cubic spline", difference, 1e-5)
    assert torch.equal(found[-3:], table[-3:])


@pytest.mark.parametrize(("source", "target"), [*SQUARE, ((14, 14), (24, 32)), ((5, 7), (11, 13))])
def test_resized_tables_where_linear_is_exact(source, target, measured):
    """timm as it is, on a surface that bends nowhere: a plane of the two offsets."""
    ys, xs = (_coordinates(a, b) for a, b in zip(source, target, strict=True))
    plane = 0.03 * ys[:, None] - 0.02 * xs[None, :]
    table = torch.from_numpy(np.concatenate([plane.ravel(), [5.0, 6.0, 7.0]])).float()[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm indexes with a list
        expected = resize_rel_pos_bias_table(
            table, target, (relative_table_rows(target), 1), source
        )
    difference = (resize_relative_table(table, source, target) - expected).abs().max()
    what = f"plane, {source[0]}x{source[1]} to {target[0]}x{target[1]}"
    # a target offset may lie a hair beyond the last knot: timm goes on, the spline stops there
    measured("Positions", what, "timm as it is", difference, 1e-5)


def _coordinates(source, target):
    """Offsets of the source among those of the target, from the formula of the geometric sum."""
    ratio = geometric_ratio(2 * source - 1, 2 * target - 1)
    reach = np.arange(1, source)
    positive = (1 - ratio**reach) / (1 - ratio)
    return np.concatenate([-positive[::-1], [0.0], positive])


@pytest.mark.parametrize("side", PUBLISHED)
def test_ratios(side, measured):
    difference = abs(geometric_ratio(27, 2 * side - 1) - PUBLISHED[side])
    measured("Positions", f"ratio, 14 to {side}", "released code", difference, 1e-6)


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (14, 14)])
def test_index(grid, measured):
    different = (
        relative_position_index(grid) != gen_relative_position_index(grid, class_token=True)
    ).sum()
    measured("Positions", f"index of the table, {grid[0]}x{grid[1]}", "timm", different, 0)


def test_the_product_does_without_scipy():
    for path in Path(beit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "scipy" for name in names), path
