"""The four maps: their sizes, their values by torch's own layers, and what they refuse."""

import pytest
import torch
from torch import nn

from beit.errors import UserError
from beit.models.pyramid import DoublingConv, FeaturePyramid, PlainMaps

BATCH, GRID, WIDTH = 3, (3, 5), 22


def tokens(grid=GRID, batch=BATCH):
    count = 1 + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, count, WIDTH, generator=generator) for _ in range(4)]


def literal_maps(inputs, grid):
    """Row by row: patch (y, x) of the map is token 1 + y·w + x."""
    maps = []
    for x in inputs:
        rows = torch.empty(len(x), WIDTH, *grid)
        for y in range(grid[0]):
            for column in range(grid[1]):
                rows[:, :, y, column] = x[:, 1 + y * grid[1] + column]
        maps.append(rows)
    return maps


@pytest.mark.parametrize("grid", [GRID, (2, 7), (6, 4)])
def test_strides_and_sizes_of_the_maps(grid):
    pyramid = FeaturePyramid(WIDTH, taps=[0, 1, 2, 3], patch_size=16)
    assert pyramid.strides == (4, 8, 16, 32)
    maps = pyramid(tokens(grid), grid)
    sizes = [tuple(16 * side // stride for side in grid) for stride in (4, 8, 16, 32)]
    assert [tuple(x.shape) for x in maps] == [(BATCH, WIDTH, *size) for size in sizes]


@pytest.mark.parametrize("training", [True, False])
def test_pyramid_is_torchs_own_layers(training):
    """With the same keys, in both modes of BatchNorm, and with its running statistics."""
    pyramid = FeaturePyramid(WIDTH, taps=[0, 1, 2, 3], patch_size=16).train(training)
    up = lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)  # noqa: E731
    literal = nn.ModuleDict(
        {
            "fpn1": nn.Sequential(up(), nn.BatchNorm2d(WIDTH), nn.GELU(), up()),
            "fpn2": nn.Sequential(up()),
            "fpn3": nn.Identity(),
            "fpn4": nn.MaxPool2d(2),
        }
    ).train(training)
    literal.load_state_dict(pyramid.state_dict(), strict=True)
    inputs = tokens()
    maps = pyramid(inputs, GRID)
    theirs = [literal[f"fpn{i + 1}"](x) for i, x in enumerate(literal_maps(inputs, GRID))]
    for ours, expected in zip(maps, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        pyramid.fpn1[1].running_var, literal["fpn1"][1].running_var, rtol=0, atol=1e-6
    )


def test_doubling_conv_has_the_gradients_of_torchs():
    ours, theirs = DoublingConv(WIDTH).double(), nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH, WIDTH, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(BATCH, WIDTH, 6, 10, dtype=torch.float64)
    first, second = (
        torch.autograd.grad((layer(x) * weight).sum(), [x, *layer.parameters()])
        for layer in (ours, theirs)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_pyramid_starts_as_torchs_layers_do():
    torch.manual_seed(0)
    ours = FeaturePyramid(WIDTH, taps=[0, 1, 2, 3], patch_size=16)
    torch.manual_seed(0)
    theirs = [nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2) for _ in range(3)]
    for layer, expected in zip((ours.fpn1[0], ours.fpn1[3], ours.fpn2[0]), theirs, strict=True):
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)


def test_plain_maps_are_the_tokens():
    plain = PlainMaps(WIDTH, taps=[0, 1, 2, 3], patch_size=16)
    assert plain.strides == (16,) * 4
    assert not list(plain.parameters())
    inputs = tokens()
    for ours, expected in zip(plain(inputs, GRID), literal_maps(inputs, GRID), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", [FeaturePyramid, PlainMaps])
@pytest.mark.parametrize("taps", [[3, 5, 7], [3, 5, 11, 7], [-1, 1, 2, 3], []])
def test_taps_that_are_not_four_blocks_are_refused(kind, taps):
    with pytest.raises(UserError, match=r"taps \[.*\] must be 4 blocks"):
        kind(WIDTH, taps=taps, patch_size=16)


def test_an_image_of_one_row_of_patches_is_refused():
    pyramid = FeaturePyramid(WIDTH, taps=[0, 1, 2, 3], patch_size=16)
    with pytest.raises(UserError, match="1x5 patches is too small"):
        pyramid(tokens((1, 5)), (1, 5))
