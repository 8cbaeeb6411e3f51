import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_rel import gen_relative_position_index, resize_rel_pos_bias_table

from beit.errors import UserError
from beit.models.position import (
    gather_relative_bias,
    geometric_coordinates,
    geometric_ratio,
    relative_position_index,
    relative_table_rows,
    resize_position_embedding,
    resize_relative_table,
)

GRIDS = [((3, 5), (4, 9)), ((14, 14), (24, 24)), ((5, 3), (3, 5)), ((24, 24), (14, 14))]


def offsets(grid):
    """Patch offsets -(g-1) ... g-1 of both axes, as columns and rows."""
    height, width = grid
    return torch.arange(1 - height, height)[:, None], torch.arange(1 - width, width)[None, :]


def test_table_rows_of_the_released_models():
    sides = [14, 24, 32, 40]
    assert [relative_table_rows((s, s)) for s in sides] == [732, 2212, 3972, 6244]


def test_index_agrees_with_timm():
    ours = relative_position_index((3, 5))
    assert torch.equal(ours, gen_relative_position_index((3, 5), class_token=True))


def test_gathered_bias_is_the_table_at_the_offset():
    table = torch.randn(relative_table_rows((3, 5)), 2)
    bias = gather_relative_bias(table, relative_position_index((3, 5)))
    query, key = (2, 1), (0, 4)  # y, x
    row = (query[0] - key[0] + 2) * 9 + (query[1] - key[1] + 4)
    assert torch.equal(bias[:, 1 + 2 * 5 + 1, 1 + 4], table[row])
    assert torch.equal(bias[:, 0, 3], table[-3])
    assert torch.equal(bias[:, 3, 0], table[-2])
    assert torch.equal(bias[:, 0, 0], table[-1])


@pytest.mark.parametrize(("side", "ratio"), [(24, 1.090307), (32, 1.134918), (40, 1.168504)])
def test_geometric_ratios_of_the_released_code(side, ratio):
    assert geometric_ratio(27, 2 * side - 1) == pytest.approx(ratio, abs=1e-6)
    coordinates = geometric_coordinates(27, 2 * side - 1)
    assert coordinates[13:16] == pytest.approx([0, 1, 1 + ratio], abs=1e-5)
    assert coordinates[-1] == pytest.approx(side - 1, abs=1e-2)


@pytest.mark.parametrize(("source", "target"), GRIDS)
def test_resizing_is_the_bicubic_spline_of_scipy(source, target):
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn(relative_table_rows(source), 2)
    ours = resize_relative_table(table, source, target)
    axes = [
        geometric_coordinates(2 * a - 1, 2 * b - 1) if a != b else np.arange(1 - a, a)
        for a, b in zip(source, target, strict=True)
    ]
    points = [np.arange(1 - g, g) for g in target]
    for head in range(2):
        surface = table[:-3, head].view(2 * source[0] - 1, -1).double().numpy()
        expected = interpolate.RectBivariateSpline(*axes, surface, kx=3, ky=3, s=0)(*points)
        np.testing.assert_allclose(ours[:-3, head].numpy(), expected.ravel(), atol=1e-5)
    assert torch.equal(ours[-3:], table[-3:])


@pytest.mark.parametrize(("source", "target"), [((5, 7), (8, 11)), GRIDS[1]])
def test_resizing_agrees_with_timm_where_linear_is_exact(source, target):
    """timm interpolates linearly between the same coordinates: equal on a bilinear surface."""
    ys, xs = (
        torch.tensor(geometric_coordinates(2 * a - 1, 2 * b - 1))
        for a, b in zip(source, target, strict=True)
    )
    surface = 0.3 * ys[:, None] - 0.2 * xs + 0.1 * ys[:, None] * xs
    table = torch.cat([surface.flatten(), torch.tensor([5.0, 6.0, 7.0])])[:, None].repeat(1, 2)
    rows = relative_table_rows(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm indexes with a list
        theirs = resize_rel_pos_bias_table(table, target, (rows, 2), source)
    ours = resize_relative_table(table, source, target)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    dy, dx = offsets(target)
    expected = 0.3 * dy - 0.2 * dx + 0.1 * dy * dx
    torch.testing.assert_close(ours[:-3, 0], expected.flatten(), rtol=0, atol=1e-2)


def test_near_offsets_keep_their_bias():
    """A table peaked at the centre: the bias of the nearest neighbour survives 14 -> 40."""
    dy, dx = offsets((14, 14))
    surface = torch.exp(-(dy**2 + dx**2) / 8.0)
    table = torch.cat([surface.flatten(), torch.zeros(3)])[:, None]
    resized = resize_relative_table(table, (14, 14), (40, 40))[:-3, 0].view(79, 79)
    assert resized[39, 39].item() == pytest.approx(1.0, abs=1e-4)
    assert resized[39, 40].item() == pytest.approx(surface[13, 14].item(), abs=1e-3)


def test_same_grid_is_untouched_and_tiny_grids_are_refused():
    table = torch.randn(relative_table_rows((3, 5)), 2)
    torch.testing.assert_close(resize_relative_table(table, (3, 5), (3, 5)), table)
    with pytest.raises(UserError, match="2 patches"):
        resize_relative_table(torch.randn(relative_table_rows((2, 5)), 2), (2, 5), (3, 5))


def test_absolute_positions_are_resized_bicubically():
    embedding = torch.randn(1, 1 + 15, 22)
    resized = resize_position_embedding(embedding, (3, 5), (4, 9))
    image = embedding[0, 1:].T.reshape(1, 22, 3, 5)
    expected = F.interpolate(image, size=(4, 9), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(resized[0, 1:], expected)
    assert torch.equal(resized[:, 0], embedding[:, 0])
