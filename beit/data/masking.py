"""Which patches are hidden: blockwise (BEiT, Algorithm 1) or at random. True is hidden."""

import math
import random

import numpy as np

from beit.data.limits import real_number
from beit.errors import UserError

# 75 of the 14x14 patches at 224 px, blocks of at least 16 (BEiT section 2.3 and released code)
PAPER_MASK_RATIO = 75 / 196
PAPER_MIN_BLOCK_RATIO = 16 / 196
ATTEMPTS = 10  # tries for each block before giving up (released code)


def scaled_min_block_patches(grid: tuple[int, int]) -> int:
    """The paper's smallest block, 16 of 196 patches, as a share of another grid (at least 1)."""
    return max(1, round(PAPER_MIN_BLOCK_RATIO * grid[0] * grid[1]))


class BlockwiseMasking:
    """Hides rectangles until `target` patches are covered: at most `target`, often a few less.

    `exact` then hides single patches, drawn from those left, until there are `target` (BEiT v2).

    The rules of the released code: a block has U(min_block_patches, patches still wanted) patches,
    a log-uniform aspect ratio in [min_aspect, 1/min_aspect], is strictly smaller than the grid on
    both sides, and is taken if it covers at least one new patch and no more than are wanted. Ten
    refusals in a row end the mask. At 14x14 with the defaults: 66.8 % of masks have 75 patches.

    `min_block_patches` is a number, or "scaled": the paper's 16 of 196 patches as a share of the
    grid, as the target is.

    Departure: the first block is tried until it fits, for an empty mask has no loss.

    Raises UserError if the target is below the smallest block, or no block fits in the grid.
    """

    def __init__(
        self,
        grid: tuple[int, int] = (14, 14),
        *,
        mask_ratio: float = PAPER_MASK_RATIO,
        min_block_patches: int | str = "scaled",
        min_aspect: float = 0.3,
        exact: bool = False,
    ) -> None:
        self.grid = _checked_grid(grid)
        self.target = _target(self.grid, mask_ratio)
        self.exact = exact
        scaled = scaled_min_block_patches(self.grid)
        if min_block_patches == "scaled":
            min_block_patches = scaled
        if isinstance(min_block_patches, bool) or not isinstance(min_block_patches, int):
            raise UserError(
                f"min_block_patches {min_block_patches!r}: expected a whole number, or scaled"
            )
        self.min_block_patches = min_block_patches
        self.min_aspect = min_aspect
        if not 0.0 < real_number("min_aspect", min_aspect) <= 1.0:
            raise UserError(f"min_aspect {min_aspect}: must lie in (0, 1]; the paper uses 0.3")
        if not 1 <= self.min_block_patches <= self.target:
            raise UserError(
                f"min_block_patches {self.min_block_patches}: mask_ratio {mask_ratio:.4g} of the "
                f"{self.grid[0]}x{self.grid[1]} grid asks for {self.target} masked patches, and a "
                f"block must have 1 to {self.target}; set min_block_patches="
                f"{min(self.target, scaled)} or raise mask_ratio"
            )
        self._log_aspect = math.log(min_aspect)
        # bit y*w of each of the first n rows: a block is this pattern times its run of bits
        width = self.grid[1]
        self._rows = [sum(1 << (y * width) for y in range(n)) for n in range(self.grid[0] + 1)]
        self._check_room(mask_ratio)

    def __call__(self, rng: random.Random) -> np.ndarray:
        """A mask (h, w) bool with 1 to `target` True patches, with exactly `target` if `exact`."""
        covered, count = 0, 0  # the mask is one integer, a bit for each patch: 10 times faster
        while count < self.target:
            wanted = self.target - count
            new = self._next_block(rng, covered, wanted)
            if new == 0 and count > 0:
                break
            covered |= new
            count += new.bit_count()
        mask = _unpack(covered, self.grid)
        return self._filled(mask, rng) if self.exact else mask

    def _filled(self, mask: np.ndarray, rng: random.Random) -> np.ndarray:
        # a block is only taken where it fits into what is wanted: there is never one to take back
        left = np.flatnonzero(~mask).tolist()
        chosen = rng.sample(left, self.target - int(mask.sum()))
        mask = mask.copy()
        mask.flat[chosen] = True
        return mask

    def _next_block(self, rng: random.Random, covered: int, wanted: int) -> int:
        """The newly covered patches as bits, or 0 when all attempts failed."""
        for _ in range(ATTEMPTS):
            height, width = self._block_size(rng, wanted)
            if height >= self.grid[0] or width >= self.grid[1]:
                continue
            top = rng.randint(0, self.grid[0] - height)
            left = rng.randint(0, self.grid[1] - width)
            block = self._rows[height] * ((1 << width) - 1) << (top * self.grid[1] + left)
            new = block & ~covered
            if 0 < new.bit_count() <= wanted:
                return new
        return 0

    def _block_size(self, rng: random.Random, wanted: int) -> tuple[int, int]:
        # with wanted < min_block_patches the range is upside down, as in the released code:
        # late blocks may be smaller than the smallest
        area = rng.uniform(self.min_block_patches, wanted)
        aspect = math.exp(rng.uniform(self._log_aspect, -self._log_aspect))
        return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))

    def _check_room(self, mask_ratio: float) -> None:
        rng = random.Random(0)
        if not any(self._next_block(rng, 0, self.target) for _ in range(20)):
            raise UserError(
                f"grid {self.grid[0]}x{self.grid[1]}: blocks of {self.min_block_patches} to "
                f"{self.target} patches do not fit strictly inside it; lower min_block_patches, "
                f"change mask_ratio {mask_ratio:.4g} or use masking=random"
            )

    def __repr__(self) -> str:
        return (
            f"BlockwiseMasking(grid={self.grid[0]}x{self.grid[1]}, "
            f"target{'=' if self.exact else '<='}{self.target}, "
            f"min_block_patches={self.min_block_patches}, max_block_patches={self.target}, "
            f"aspect={self.min_aspect:.4g}..{1 / self.min_aspect:.4g})"
        )


class RandomMasking:
    """Hides exactly `target` patches, each set of them equally likely."""

    def __init__(
        self, grid: tuple[int, int] = (14, 14), *, mask_ratio: float = PAPER_MASK_RATIO
    ) -> None:
        self.grid = _checked_grid(grid)
        self.target = _target(self.grid, mask_ratio)

    def __call__(self, rng: random.Random) -> np.ndarray:
        """A mask (h, w) bool with `target` True patches."""
        mask = np.zeros(self.grid[0] * self.grid[1], dtype=bool)
        mask[rng.sample(range(mask.size), self.target)] = True
        return mask.reshape(self.grid)

    def __repr__(self) -> str:
        return f"RandomMasking(grid={self.grid[0]}x{self.grid[1]}, target={self.target})"


def _checked_grid(grid: tuple[int, int]) -> tuple[int, int]:
    sides = tuple(grid) if isinstance(grid, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise UserError(f"grid {grid!r}: expected [rows, columns], each at least 1 patch")
    return sides[0], sides[1]


def _target(grid: tuple[int, int], mask_ratio: float) -> int:
    """int(mask_ratio * N), not one less where 75/196 * 196 comes out as 74.999..."""
    patches = grid[0] * grid[1]
    target = math.floor(real_number("mask_ratio", mask_ratio) * patches + 1e-6)
    if not 0.0 < mask_ratio < 1.0 or target < 1:
        raise UserError(
            f"mask_ratio {mask_ratio}: {target} of the {patches} patches of the "
            f"{grid[0]}x{grid[1]} grid; it must lie between {1 / patches:.4g} and 1"
        )
    return target


def _unpack(bits: int, grid: tuple[int, int]) -> np.ndarray:
    patches = grid[0] * grid[1]
    packed = np.frombuffer(bits.to_bytes((patches + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=patches, bitorder="little").view(bool).reshape(grid)
