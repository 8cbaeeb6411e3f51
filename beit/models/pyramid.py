"""From the tokens of four blocks to four maps: what heads of segmentation and detectors read."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from beit.errors import UserError

NUM_MAPS = 4


class FeaturePyramid(nn.Module):
    """Maps at a quarter, half, once and twice the patch's stride, each from a block of its own.

    Transposed convolutions enlarge the first two, the third stays, the fourth is max-pooled. Names
    and initialisation (torch's own) are those of the released segmentation code.

    Args:
        width: D, of the tokens and of every map.
        taps: the four blocks, counted from 0: 3, 5, 7, 11 (base), 7, 11, 15, 23 (large).
        patch_size: pixels on a side of a patch.

    Attributes: `taps`; `strides` of the maps in pixels, 4, 8, 16, 32 for patches of 16.

    Raises:
        UserError: not four taps.
    """

    def __init__(self, width: int, *, taps: Sequence[int], patch_size: int) -> None:
        super().__init__()
        self.taps = checked_taps(taps)
        self.strides = (patch_size / 4, patch_size / 2, patch_size, patch_size * 2)
        self.fpn1 = nn.Sequential(
            DoublingConv(width), nn.BatchNorm2d(width), nn.GELU(), DoublingConv(width)
        )
        self.fpn2 = nn.Sequential(DoublingConv(width))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """Tokens (B,1+N,D) of each tap and their grid (h,w) -> maps (B,D,hi,wi), channels last.

        Raises:
            UserError: a grid of less than two patches on a side.
        """
        self.check_grid(grid)
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [level(to_map(x, grid)) for level, x in zip(levels, tokens, strict=True)]

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises UserError for a grid (h,w) of patches too small for the coarsest map."""
        if min(grid) < 2:
            raise UserError(
                f"a grid of {grid[0]}x{grid[1]} patches is too small for the pyramid: images must"
                " have at least 2 patches on a side"
            )


class PlainMaps(nn.Module):
    """Four maps at the patch's own stride: the tokens as they are, without a parameter.

    What SETR and linear heads read. Arguments, attributes and `forward` are those of
    `FeaturePyramid`.
    """

    def __init__(self, width: int, *, taps: Sequence[int], patch_size: int) -> None:
        super().__init__()
        self.width = width
        self.taps = checked_taps(taps)
        self.strides = (patch_size,) * NUM_MAPS

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """Tokens (B,1+N,D) of each tap and their grid (h,w) -> maps (B,D,h,w), channels last."""
        return [to_map(x, grid) for x in tokens]

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Any will do."""


class DoublingConv(nn.ConvTranspose2d):
    """Transposed convolution with kernel 2 and stride 2, computed as the matrix product it is."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x (B,D,h,w) -> (B,D,2h,2w), channels last."""
        assert self.bias is not None
        batch, width, height, columns = x.shape
        weight = self.weight.permute(2, 3, 1, 0).reshape(4 * width, width)
        pixels = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4))
        pixels = pixels.view(batch, height, columns, 2, 2, width).transpose(2, 3)
        return pixels.reshape(batch, 2 * height, 2 * columns, width).permute(0, 3, 1, 2)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B,1+N,D) -> map (B,D,h,w) without CLS: a view, which lies channels last."""
    return tokens[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)


def checked_taps(taps: Sequence[int]) -> tuple[int, ...]:
    """Raises UserError unless there are four, in rising order."""
    if len(taps) != NUM_MAPS or min(taps) < 0 or list(taps) != sorted(taps):
        raise UserError(
            f"taps {list(taps)} must be {NUM_MAPS} blocks counted from 0, in rising order; a base"
            " model of 12 blocks has [3, 5, 7, 11]"
        )
    return tuple(taps)
