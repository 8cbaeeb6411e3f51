"""Chains of ten kills at random places: the final weights are those of a run without."""

import random
from pathlib import Path

from scripts.faults.exact import SECONDS, Different, Settings, compare, complete, killed, warm
from scripts.faults.forked import run_many

ROW = "chain of 10 random kills"
TRIALS = 50  # kills, ten in each chain
SHARE = 2

KILLS = 10
SETTINGS: Settings = {
    "workers": 1,
    "per_device": 4,
    "ema": True,
    "keep_last": True,
    "save_every": 2,
}
MICRO_BATCHES = 12  # of an epoch: 4 steps of 3


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """Chains with seeds of their own, of ten kills each, the last of what is left."""
    lengths = [KILLS] * (trials // KILLS) + [trials % KILLS] * (trials % KILLS > 0)
    epochs = 4 if trials >= KILLS else 1
    warm(folder, epochs=epochs, **SETTINGS)
    cases = [
        (folder / f"chain{number}", length, seed + number, epochs)
        for number, length in enumerate(lengths)
    ]
    outcomes = run_many(chain, cases, timeout=(KILLS + 2) * SECONDS)
    bad = [i for i, outcome in enumerate(outcomes) if outcome.returncode != 0]
    for i in bad:
        print(f"chain {i}", outcomes[i].output[-1500:])
    passed = sum(length for i, length in enumerate(lengths) if i not in bad)
    return passed, trials, f"{len(lengths)} chains over {epochs * 4} steps, 1 worker, EMA"


def control(folder: Path, seed: int) -> bool:
    """With draws from global generators the resumed run ends in other weights."""
    settings: Settings = {"seed": seed, "epochs": 1, "keyed": False}
    warm(folder, **settings)
    complete(folder / "whole", **settings)
    killed(folder / "killed", (0, 1, "start"), **settings)
    complete(folder / "killed", resume="auto", **settings)
    try:
        compare(folder / "whole", folder / "killed")
    except Different:
        return True
    return False


def chain(folder: Path, kills: int, seed: int, epochs: int) -> None:
    """Run whole, and beside it killed again and again. Raises Different."""
    settings = {"seed": seed, "epochs": epochs, **SETTINGS}
    complete(folder / "whole", **settings)
    rng = random.Random(seed)
    # past the first checkpoint, so that there is something to go on from
    numbers = sorted(rng.sample(range(7, epochs * MICRO_BATCHES), kills))
    for number in numbers:
        place = (*divmod(number, MICRO_BATCHES), rng.choice(["start", "end"]))
        killed(folder / "killed", place, resume="auto", **settings)
    complete(folder / "killed", resume="auto", **settings)
    compare(folder / "whole", folder / "killed")
