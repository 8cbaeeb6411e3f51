"""Blockwise masks against BEiT's Algorithm 1 written out, each with draws of its own.

Both sides are samples of 20,000 masks: the bounds are five standard deviations of the difference
of two shares of that many draws, at most 5 · sqrt(2 · 0.25 / 20000) = 0.025.
"""

import math
import random

import numpy as np
import pytest

from beit.data.masking import BlockwiseMasking

DRAWS = 20_000
BOUND = 5 * math.sqrt(2 * 0.25 / DRAWS)
SETTINGS = {"14x14": ((14, 14), 75, 16), "7x11": ((7, 11), 29, 6)}  # grid, target, smallest block


def algorithm_1(rng, grid, target, smallest):
    """Cell by cell, with the released ten attempts: the mask, and the new cells of each block."""
    covered, blocks = set(), []
    while len(covered) < target:
        wanted = target - len(covered)
        for _attempt in range(10):
            area = smallest + (wanted - smallest) * rng.random()
            aspect = 0.3 * (1 / 0.3 / 0.3) ** rng.random()
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= grid[0] or width >= grid[1]:
                continue
            top = int(rng.random() * (grid[0] - height + 1))
            left = int(rng.random() * (grid[1] - width + 1))
            new = {
                (y, x)
                for y in range(top, top + height)
                for x in range(left, left + width)
                if (y, x) not in covered
            }
            if 0 < len(new) <= wanted:
                covered |= new
                blocks.append(len(new))
                break
        else:
            break
    return covered, blocks


def filled_up(rng, covered, grid, target):
    """BEiT v2: single cells on top, each of those left as likely."""
    left = [(y, x) for y in range(grid[0]) for x in range(grid[1]) if (y, x) not in covered]
    rng.shuffle(left)
    return covered | set(left[: target - len(covered)])


class Recording(BlockwiseMasking):
    """Keeps the number of new patches of each block."""

    def _next_block(self, rng, covered, wanted):
        new = super()._next_block(rng, covered, wanted)
        if new and hasattr(self, "blocks"):
            self.blocks.append(new.bit_count())
        return new


@pytest.fixture(scope="module", params=SETTINGS)
def sample(request):
    """Masks of both sides, before and after filling up, and the blocks of both."""
    grid, target, smallest = SETTINGS[request.param]
    ratio = target / math.prod(grid)
    theirs, exact = np.zeros((2, DRAWS, *grid), dtype=bool)
    their_blocks = []
    rng = random.Random(1)
    for i in range(DRAWS):
        covered, blocks = algorithm_1(rng, grid, target, smallest)
        their_blocks.append(blocks)
        theirs[i][tuple(np.array(list(covered)).T)] = True
        exact[i][tuple(np.array(list(filled_up(rng, covered, grid, target))).T)] = True
    masking = Recording(grid, mask_ratio=ratio, min_block_patches=smallest)
    filled = BlockwiseMasking(grid, mask_ratio=ratio, min_block_patches=smallest, exact=True)
    our_blocks, rng = [], random.Random(2)
    ours = np.empty_like(theirs)
    for i in range(DRAWS):
        masking.blocks = []
        ours[i] = masking(rng)
        our_blocks.append(masking.blocks)
    our_exact = np.stack([filled(rng) for _ in range(DRAWS)])
    return request.param, (ours, theirs), (our_blocks, their_blocks), (our_exact, exact)


def shares(values, size):
    return np.bincount(values, minlength=size)[:size] / len(values)


def furthest(values, size):
    """Largest difference between the distribution functions of two samples of whole numbers."""
    ours, theirs = (np.cumsum(shares(np.asarray(v), size)) for v in values)
    return np.abs(ours - theirs).max()


def test_masks_follow_algorithm_1(sample, measured):
    name, masks, blocks, _ = sample
    part, against = "Blockwise masks", "Algorithm 1 written out"
    counts = [mask.sum(axis=(1, 2)) for mask in masks]
    histograms = [shares(count, 80) for count in counts]
    difference = np.abs(histograms[0] - histograms[1]).max()
    measured(part, f"{name}: share of each count", against, difference, BOUND)
    rates = [mask.mean(axis=0) for mask in masks]
    difference = np.abs(rates[0] - rates[1]).max()
    measured(part, f"{name}: rate of each patch", against, difference, BOUND)
    numbers = [[len(b) for b in side] for side in blocks]
    measured(part, f"{name}: blocks in a mask", against, furthest(numbers, 40), BOUND)
    for order, words in enumerate(("first", "second", "third")):
        sizes = [[b[order] for b in side if len(b) > order] for side in blocks]
        what = f"{name}: new patches of the {words} block"
        measured(part, what, against, furthest(sizes, 80), BOUND)


def test_exact_masks_follow_the_filled_algorithm(sample, measured):
    name, _, _, masks = sample
    target = SETTINGS[name][1]
    assert all((mask.sum(axis=(1, 2)) == target).all() for mask in masks)
    difference = np.abs(masks[0].mean(axis=0) - masks[1].mean(axis=0)).max()
    what = f"{name}, exact count: rate of each patch"
    measured("Blockwise masks", what, "Algorithm 1 filled up (BEiT v2)", difference, BOUND)


PUBLISHED = {75: 0.668, 74: 0.232, 73: 0.049, 72: 0.035}  # 60,000 masks by the released rules


def test_published_shares(sample, measured):
    name, (masks, _), (blocks, _), _ = sample
    if name != "14x14":
        pytest.skip("the published numbers are those of 14x14")
    part, against, bound = "Blockwise masks", "60,000 masks by the released rules", 0.02
    counts = masks.sum(axis=(1, 2))
    for count, share in PUBLISHED.items():
        difference = abs((counts == count).mean() - share)
        measured(part, f"share of masks of {count}", against, difference, bound)
    measured(part, "mean count", against, abs(counts.mean() - 74.48), 0.05)
    number = np.mean([len(b) for b in blocks])
    measured(part, "mean number of blocks", against, abs(number - 4.11), 0.05)
    rate = masks.mean(axis=0)
    corner = rate[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    edge = np.concatenate([rate[0, 6:8], rate[-1, 6:8], rate[6:8, 0], rate[6:8, -1]]).mean()
    for place, found, published in (
        ("corner", corner, 0.041),
        ("middle of an edge", edge, 0.192),
        ("centre", rate[6:8, 6:8].mean(), 0.716),
    ):
        measured(part, f"rate of the {place}", against, abs(found - published), bound)
