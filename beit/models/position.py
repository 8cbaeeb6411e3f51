"""Relative and absolute positions of patches: index, gathering, resizing to another grid."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.errors import UserError

NUM_CLS_ROWS = 3  # last rows of a table: CLS -> patch, patch -> CLS, CLS -> CLS
_KEPT_GRIDS = 8  # of each table or embedding, without gradient

Grid = tuple[int, int]


def relative_table_rows(grid: tuple[int, int]) -> int:
    """Rows of the bias table of an (h, w) grid: (2h-1)(2w-1) offsets and three rows of CLS."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + NUM_CLS_ROWS


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Row of the bias table for each (query, key): int64 (1+N, 1+N), token 0 is CLS.

    Query patch i and key patch j read row (y_i - y_j + h-1)(2w-1) + (x_i - x_j + w-1).
    """
    height, width = grid
    ys = torch.arange(height).repeat_interleave(width)
    xs = torch.arange(width).repeat(height)
    dy = ys[:, None] - ys[None, :] + height - 1
    dx = xs[:, None] - xs[None, :] + width - 1
    rows = relative_table_rows(grid)
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.long)
    index[1:, 1:] = dy * (2 * width - 1) + dx
    index[0, :] = rows - 3
    index[:, 0] = rows - 2
    index[0, 0] = rows - 1
    return index


def gather_relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """Table (rows, heads) and index (1+N, 1+N) -> attention bias (heads, 1+N, 1+N)."""
    num_tokens = index.shape[0]
    bias = table.t().index_select(1, index.flatten())
    return bias.view(table.shape[1], num_tokens, num_tokens)


class BiasTable(nn.Module):
    """A module with a table of relative position bias, zero at the start, under the released key.

    `relative_position_bias_table` is None until `add_table` makes one for a grid (h, w).
    """

    relative_position_index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table: nn.Parameter | None = None

    def add_table(self, grid: Grid, num_heads: int) -> None:
        self.table_grid = grid
        rows = relative_table_rows(grid)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        index = relative_position_index(grid)
        self.register_buffer("relative_position_index", index, persistent=False)
        self._resized_table = ResizedPositions(resize_relative_table)

    def table_bias(self, grid: Grid | None) -> Tensor:
        """Bias (heads, 1+N, 1+N) of the table's own grid, or (`grid`) of another."""
        table = self.relative_position_bias_table
        assert table is not None
        if grid is None:
            return gather_relative_bias(table, self.relative_position_index)
        resized = self._resized_table(table, self.table_grid, grid)
        return gather_relative_bias(resized, _index_on(grid, table.device))


class RelativePositionBias(BiasTable):
    """One bias table for all blocks, as in the pretraining model."""

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.add_table(grid, num_heads)

    def forward(self, grid: Grid | None = None) -> Tensor:
        """Bias (heads, 1+N, 1+N), added to the attention logits of every block."""
        return self.table_bias(grid)


class ResizedPositions:
    """Positions resized to other grids; kept while they stay as they are and no gradient is asked.

    Whether they have stayed is told by comparing them: writing through `.data`, as averaging of
    weights does, leaves no other trace.
    """

    def __init__(self, resize: Callable[[Tensor, Grid, Grid], Tensor]) -> None:
        self.resize = resize
        self._positions = torch.empty(0)
        self._kept: dict[Grid, Tensor] = {}

    def __call__(self, positions: Tensor, source: Grid, target: Grid) -> Tensor:
        """Positions of the grid `source` for the grid `target`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.resize(positions, source, target)
        if not self._are(positions):
            self._positions = positions.clone()
            self._kept.clear()
        if target not in self._kept:
            if len(self._kept) == _KEPT_GRIDS:
                del self._kept[next(iter(self._kept))]
            self._kept[target] = self.resize(positions, source, target)
        return self._kept[target]

    def _are(self, positions: Tensor) -> bool:
        kept = self._positions
        same_kind = (kept.device, kept.dtype) == (positions.device, positions.dtype)
        return same_kind and torch.equal(kept, positions)


@lru_cache(maxsize=2)  # of a large grid it takes 100 MB
def _index_on(grid: Grid, device: torch.device) -> Tensor:
    # training could not use a tensor that was made in inference mode
    with torch.inference_mode(False), torch.device("cpu"):
        return relative_position_index(grid).to(device)


def resize_position_embedding(
    embedding: Tensor, source: tuple[int, int], target: tuple[int, int]
) -> Tensor:
    """Absolute positions (1, 1+N, D) of one grid to another: bicubic, the CLS row kept."""
    cls_row, patches = embedding[:, :1], embedding[:, 1:]
    patches = patches.reshape(1, *source, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=target, mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)
    return torch.cat([cls_row, patches], dim=1)


def geometric_ratio(source: int, target: int) -> float:
    """Ratio q in [1.01, 1.5] whose sum 1 + q + ... over source//2 terms is target//2.

    `source` and `target` are table sides (2g - 1). Bisection to 1e-6 as the original does it:
    1.090307 for a grid of 14 to 24, 1.134918 to 32, 1.168504 to 40.
    """
    terms, reach = source // 2, target // 2
    low, high, ratio = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**terms) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    return ratio


def geometric_coordinates(source: int, target: int) -> list[float]:
    """Where the source offsets lie among the target's: ..., -(1+q), -1, 0, 1, 1+q, ..."""
    ratio = geometric_ratio(source, target)
    positive = [sum(ratio**power for power in range(i + 1)) for i in range(source // 2)]
    return [-x for x in reversed(positive)] + [0.0] + positive


def spline_weights(knots: Tensor, points: Tensor) -> Tensor:
    """Matrix (points, knots) that evaluates the interpolating cubic spline with not-a-knot ends.

    The spline SciPy's interp2d and RectBivariateSpline (kx=ky=3, s=0) build on each axis, in the
    truncated power basis with knots[2:-2] as interior knots; float64, at least 4 knots. Points
    outside the knots are clamped to them, as those functions do.
    """
    interior = knots[2:-2]
    scale = knots.abs().max()  # keeps the powers of the basis near 1

    def basis(x: Tensor) -> Tensor:
        powers = torch.stack([(x / scale) ** k for k in range(4)], dim=1)
        truncated = ((x[:, None] - interior[None, :]) / scale).clamp(min=0) ** 3
        return torch.cat([powers, truncated], dim=1)

    points = points.clamp(knots[0].item(), knots[-1].item())
    return torch.linalg.solve(basis(knots).t(), basis(points).t()).t()


@lru_cache(maxsize=64)
def _axis_weights_on(source: int, target: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return _axis_weights(source, target).to(device)


def _axis_weights(source: int, target: int) -> Tensor:
    """Resizing matrix (2*target-1, 2*source-1) of an axis, from `source` to `target` patches."""
    if source == target:
        return torch.eye(2 * source - 1, dtype=torch.float64)
    if source < 3:
        raise UserError(
            f"a bias table of {source} patches on a side is too small for a cubic spline; it takes"
            " weights of at least 3"
        )
    source_side, target_side = 2 * source - 1, 2 * target - 1
    knots = torch.tensor(geometric_coordinates(source_side, target_side), dtype=torch.float64)
    reach = target_side // 2
    return spline_weights(knots, torch.arange(-reach, reach + 1, dtype=torch.float64))


def resize_relative_table(
    table: Tensor, source: tuple[int, int], target: tuple[int, int]
) -> Tensor:
    """Bias table (rows, heads) of one grid to another, near offsets one to one, far ones stretched.

    Geometric interpolation of the released code, on each axis by itself, so that grids need not be
    square; the three CLS rows are kept. To a smaller grid the ratio stays at its floor of 1.01 and
    the far offsets fall away. Gradients pass through.

    Raises:
        UserError: a side of fewer than 3 patches that has to change.
    """
    assert table.shape[0] == relative_table_rows(source), (table.shape, source)
    offsets, cls_rows = table[:-NUM_CLS_ROWS], table[-NUM_CLS_ROWS:]
    heads = table.shape[1]
    surface = offsets.double().view(2 * source[0] - 1, 2 * source[1] - 1, heads)
    rows, columns = (
        _axis_weights_on(old, new, surface.device) for old, new in zip(source, target, strict=True)
    )
    resized = torch.einsum("ay,bx,yxh->abh", rows, columns, surface)
    return torch.cat([resized.reshape(-1, heads).to(table), cls_rows])
