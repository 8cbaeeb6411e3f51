"""Convolutions of the dense heads; one over maps of several sizes without bringing them to one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; a kernel of 3 is padded by 1.

    Keys and initialisation of mmcv's ConvModule: He's normal by fan-out; BatchNorm 1 and 0.
    """

    def __init__(self, in_channels: int, channels: int, *, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def resized(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """The same of x (B,C,h,w) resized to `size` (H,W), for a kernel of 3."""
        return F.relu(self.bn(convolve_resized(x, self.conv.weight, size)), inplace=True)


class FusingConv(ConvNormReLU):
    """The same with a kernel of 3 over maps put together, each resized to the first's size.

    Resizing is bilinear (`align_corners=False`); neither it nor the concatenation is carried out.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(in_channels, channels, kernel_size=3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Maps (B,Ci,hi,wi) -> (B,C,h0,w0)."""
        size = maps[0].shape[2:]
        weights = self.conv.weight.split([part.shape[1] for part in maps], dim=1)
        parts = [convolve_resized(x, w, size) for x, w in zip(maps, weights, strict=True)]
        return F.relu(self.bn(sum(parts[1:], parts[0])), inplace=True)


def convolve_resized(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """conv2d(interpolate(x, size), weight, padding=1) of a small map, without the large one.

    Both are linear: the products with the kernel's nine taps are taken of the small map, and then
    resized, shifted and summed, by one matrix for each axis. To twice the size that is a third of
    the work, to eight times a fortieth.

    Args:
        x: (B,C,h,w).
        weight: (O,C,3,3).
        size: (H,W) of the result (B,O,H,W), which lies in memory channels last.
    """
    if x.shape[2:] == tuple(size):
        return F.conv2d(x, weight, padding=1)
    batch, channels, height, width = x.shape
    out = weight.shape[0]
    pixels = x.permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)
    kernel_rows = weight.permute(2, 1, 3, 0).reshape(3, channels, 3 * out)
    products = pixels @ kernel_rows  # (B, 3, h·w, 3·O)
    vertical = _resize_and_shift(height, size[0], x).flatten(1)  # (H, 3·h)
    columns = vertical @ products.view(batch, 3 * height, width * 3 * out)
    horizontal = _resize_and_shift(width, size[1], x).transpose(1, 2).flatten(1)  # (W, w·3)
    result = horizontal @ columns.view(batch * size[0], width * 3, out)
    return result.view(batch, *size, out).permute(0, 3, 1, 2)


def _resize_and_shift(source: int, target: int, like: Tensor) -> Tensor:
    """Matrix (target, 3, source): bilinear resizing of an axis, then read at -1, 0 and +1."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    identity = torch.eye(source, dtype=dtype, device=like.device)[None]
    resize = F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].t()
    padded = F.pad(resize, (0, 0, 1, 1))  # the convolution's zeros on either side
    shifted = torch.stack([padded[shift : shift + target] for shift in range(3)], dim=1)
    return shifted.to(like.dtype)
