"""Masks: the released algorithm and ours, one core."""

import random

from beit.data.masking import BlockwiseMasking
from beit.data.randomness import sample_rng
from scripts.bench import literal, steps
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import Step, alternate, timed

ROW = "Blockwise masks of 14x14 patches, one core"
_REPEATED = 4  # rounds for each that was asked for: they are short


def run(settings: Settings) -> list[Table]:
    count = settings.number(2000, 20)
    seconds = alternate(timed(build(settings, count)), rounds=_REPEATED * settings.rounds)
    entries = [Entry(name, values, work=count) for name, values in seconds.items()]
    return [Table("", entries, work="masks")]


def build(settings: Settings, count: int) -> dict[str, Step]:
    ours = steps.masking(settings.shape(), exact=False)
    theirs = literal.Masks(ours.grid, ours.target)
    rng = random.Random(0)
    return {
        "ours": lambda: [ours(rng) for _ in range(count)],
        "ours, a generator for each sample": lambda: [_keyed(ours, i) for i in range(count)],
        "the released algorithm, written literally": lambda: [theirs() for _ in range(count)],
    }


def _keyed(masking: BlockwiseMasking, index: int) -> object:
    """As training draws them: from (seed, epoch, index)."""
    return masking(sample_rng(0, 0, index, "mask"))
