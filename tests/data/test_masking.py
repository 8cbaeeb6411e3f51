import math
import random

import numpy as np
import pytest

from beit.data.masking import BlockwiseMasking, RandomMasking
from beit.errors import UserError


def literal_blockwise(rng, grid, target, smallest, min_aspect):
    """The published rules, cell by cell, with the draws in the published order."""
    height, width = grid
    covered = set()
    while len(covered) < target:
        wanted = target - len(covered)
        for _ in range(10):
            area = rng.uniform(smallest, wanted)
            aspect = math.exp(rng.uniform(math.log(min_aspect), math.log(1 / min_aspect)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (h < height and w < width):
                continue
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            cells = {(y, x) for y in range(top, top + h) for x in range(left, left + w)}
            if 0 < len(cells - covered) <= wanted:
                covered |= cells
                break
        else:
            break
    mask = np.zeros(grid, dtype=bool)
    for cell in covered:
        mask[cell] = True
    return mask


@pytest.mark.parametrize(
    ("grid", "ratio", "smallest"), [((14, 14), 75 / 196, 16), ((3, 5), 0.5, 2), ((7, 11), 0.3, 5)]
)
def test_blockwise_equals_the_literal_algorithm(grid, ratio, smallest):
    masking = BlockwiseMasking(grid, mask_ratio=ratio, min_block_patches=smallest)
    for seed in range(200):
        expected = literal_blockwise(
            random.Random(seed), grid, int(ratio * grid[0] * grid[1] + 1e-9), smallest, 0.3
        )
        if expected.any():
            np.testing.assert_array_equal(masking(random.Random(seed)), expected)


def test_blockwise_follows_the_published_distribution():
    # 60,000 masks by the released rules: 75 patches in 66.8 %, mean 74.48, minimum 64;
    # a corner is hidden in 4.1 %, the middle of an edge in 19.2 %, the centre in 71.6 %
    masking, rng = BlockwiseMasking(), random.Random(0)
    masks = np.stack([masking(rng) for _ in range(4000)])
    counts = masks.sum(axis=(1, 2))
    assert counts.max() == 75
    assert counts.min() >= 60
    assert counts.mean() == pytest.approx(74.48, abs=0.1)
    assert (counts == 75).mean() == pytest.approx(0.668, abs=0.03)
    share = masks.mean(axis=0)
    corner = share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    edge = np.concatenate([share[0, 6:8], share[-1, 6:8], share[6:8, 0], share[6:8, -1]]).mean()
    assert corner == pytest.approx(0.041, abs=0.01)
    assert edge == pytest.approx(0.192, abs=0.02)
    assert share[6:8, 6:8].mean() == pytest.approx(0.716, abs=0.03)


def test_target_is_75_of_196_and_scales_to_other_grids():
    assert BlockwiseMasking().target == 75
    assert BlockwiseMasking().min_block_patches == 16
    assert BlockwiseMasking((8, 8)).target == 24  # 64 * 75 / 196 = 24.5
    assert BlockwiseMasking((8, 8)).min_block_patches == 5  # 64 * 16 / 196 = 5.2
    assert RandomMasking((24, 24)).target == 220
    assert RandomMasking((14, 14), mask_ratio=0.3826530612).target == 75


@pytest.mark.parametrize("grid", [(2, 2), (2, 9), (3, 5), (4, 4)])
def test_no_mask_is_empty_or_over_the_target(grid):
    masking, rng = BlockwiseMasking(grid, mask_ratio=0.4), random.Random(1)
    counts = [int(masking(rng).sum()) for _ in range(2000)]
    assert min(counts) >= 1
    assert max(counts) == masking.target


def test_random_masking_is_exact_and_uniform():
    masking, rng = RandomMasking((3, 5), mask_ratio=0.4), random.Random(0)
    masks = np.stack([masking(rng) for _ in range(6000)])
    assert set(masks.sum(axis=(1, 2))) == {6}
    # 5 standard deviations of a share around 0.4
    assert np.abs(masks.mean(axis=0) - 0.4).max() < 5 * math.sqrt(0.24 / 6000)


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 75 / 196), ((3, 5), 0.5), ((7, 11), 0.9)])
def test_exact_masks_are_the_blocks_and_single_patches_up_to_the_target(grid, ratio):
    blocks = BlockwiseMasking(grid, mask_ratio=ratio)
    exact = BlockwiseMasking(grid, mask_ratio=ratio, exact=True)
    fills = []
    for seed in range(300):
        filled, without = exact(random.Random(seed)), blocks(random.Random(seed))
        assert filled.sum() == exact.target
        assert not (without & ~filled).any()
        fills.append(int(filled.sum() - without.sum()))
    assert max(fills) > 0


@pytest.mark.parametrize("masking", [BlockwiseMasking((3, 5)), RandomMasking((3, 5))])
def test_same_generator_state_same_mask_and_globals_untouched(masking):
    random.seed(5)
    expected = random.random()
    random.seed(5)
    a, b = masking(random.Random(7)), masking(random.Random(7))
    assert random.random() == expected
    np.testing.assert_array_equal(a, b)
    assert a.dtype == bool
    assert a.shape == (3, 5)


def test_target_below_the_smallest_block_names_the_numbers_and_the_mend():
    with pytest.raises(UserError, match=r"16.*3x5 grid asks for 5.*min_block_patches=1"):
        BlockwiseMasking((3, 5), min_block_patches=16)


def test_a_grid_without_room_is_refused():
    with pytest.raises(UserError, match="1x9"):
        BlockwiseMasking((1, 9), mask_ratio=0.5, min_block_patches=2)
    with pytest.raises(UserError, match=r"mask_ratio 0\.01"):
        RandomMasking((3, 5), mask_ratio=0.01)
    with pytest.raises(UserError, match="mask_ratio 1"):
        RandomMasking((3, 5), mask_ratio=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": "abc"}, "mask_ratio 'abc': expected a number"),
        ({"mask_ratio": None}, "mask_ratio None: expected a number"),
        ({"grid": "abc"}, "grid 'abc': expected"),
        ({"grid": (3, 2.5)}, r"grid \(3, 2\.5\): expected"),
        ({"grid": 14}, "grid 14: expected"),
        ({"grid": (0, 5)}, r"grid \(0, 5\): expected"),
    ],
)
def test_wrong_kinds_are_refused(change, message):
    for masking in (BlockwiseMasking, RandomMasking):
        with pytest.raises(UserError, match=message):
            masking(**change)


def test_wrong_blocks_are_refused():
    for wrong in ("many", 2.5):
        with pytest.raises(UserError, match=f"min_block_patches {wrong!r}: .*scaled"):
            BlockwiseMasking(min_block_patches=wrong)
    with pytest.raises(UserError, match="min_aspect 'flat': expected a number"):
        BlockwiseMasking(min_aspect="flat")


def test_repr_prints_the_numbers():
    assert "target<=75" in repr(BlockwiseMasking())
    assert "min_block_patches=16" in repr(BlockwiseMasking())
    assert "target=75" in repr(RandomMasking())
    assert "target=75" in repr(BlockwiseMasking(exact=True))
