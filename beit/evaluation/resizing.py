"""Bilinear resizing of some rows of a picture at a time, so that no whole picture need exist."""

import torch
import torch.nn.functional as F
from torch import Tensor


def source_rows(begin: int, end: int, *, height: int, target: int) -> tuple[int, int]:
    """Which rows of a picture the rows begin ... end-1 of its resize are made of: (first, after).

    Args:
        height, target: rows of the picture, and of the picture resized.
    """
    low, _, _ = _neighbours(begin, begin + 1, height, target)
    _, high, _ = _neighbours(end - 1, end, height, target)
    return int(low[0]), int(high[0]) + 1


def resized_rows(
    part: Tensor, first: int, begin: int, end: int, *, height: int, target: tuple[int, int]
) -> Tensor:
    """Rows begin ... end-1 (K, end-begin, W) of a bilinear resize to `target` (H, W).

    As `F.interpolate(mode="bilinear", align_corners=False)` makes them of the whole picture.

    Args:
        part: (K, r, w), the rows from `first` on of a picture with `height` rows.
    """
    if height == target[0]:
        rows = part[:, begin - first : end - first]
    else:
        low, high, share = _neighbours(begin, end, height, target[0])
        low, high = (index.to(part.device) - first for index in (low, high))
        weight = share.to(part.device, part.dtype)[:, None]
        rows = torch.lerp(part.index_select(1, low), part.index_select(1, high), weight)
    if rows.shape[2] == target[1]:
        return rows
    size = (rows.shape[1], target[1])
    return F.interpolate(rows[None], size=size, mode="bilinear", align_corners=False)[0]


def _neighbours(begin: int, end: int, height: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two source rows of each row begin ... end-1, and the share of the second."""
    centres = (torch.arange(begin, end, dtype=torch.float64) + 0.5) * (height / target) - 0.5
    centres = centres.clamp(min=0)
    low = centres.floor().long().clamp(max=height - 1)
    return low, (low + 1).clamp(max=height - 1), centres - low
