"""Two ranks killed and resumed; 1x8 and 2x4 resumed as the other: exactly once, the same losses."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.faults.exact import SECONDS, Different, Settings, compare, complete, killed, warm
from scripts.faults.forked import run_many
from scripts.faults.tiny import GLOBAL_BATCH, TRAIN_IMAGES, read_record

ROW = "two ranks killed and resumed; elastic 1x12 <-> 2x6"
TRIALS = 24
SHARE = 1

TOLERANCE = 1e-6  # of the loss of a step
_ALL: Settings = {"epochs": 2, "keep_last": True}
SPREADS: dict[str, Settings] = {
    "1x12": {"per_device": 12, **_ALL},
    "1x4x3": {"per_device": 4, **_ALL},
    "2x6": {"ranks": 2, "per_device": 6, **_ALL},
    "2x2x3": {"ranks": 2, "per_device": 2, "workers": 1, **_ALL},
}
# from, to
CHANGES = [
    ("2x6", "2x6"),
    ("2x2x3", "2x2x3"),
    ("1x12", "2x6"),
    ("2x6", "1x12"),
    ("1x4x3", "2x2x3"),
    ("2x2x3", "1x12"),
    ("1x12", "1x4x3"),
    ("2x6", "2x2x3"),
]
STEPS = 4  # of an epoch; the last has 9 images


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """Each change of the spread, killed after 1 to 7 of 8 optimizer steps."""
    rng = random.Random(seed)
    cases = [(*CHANGES[i % len(CHANGES)], rng.randrange(1, 2 * STEPS)) for i in range(trials)]
    if trials < len(CHANGES):
        cases = [("1x12", "2x6", rng.randrange(1, 2 * STEPS)) for _ in range(trials)]
    names = sorted({"1x12", *(name for case in cases for name in case[:2] if case[0] == case[1])})
    used = {*names, *(name for case in cases for name in case[:2])}
    for name in used:
        warm(folder, **SPREADS[name])
    for outcome in run_many(_whole, ((folder, name) for name in names), timeout=SECONDS):
        if outcome.returncode != 0:
            raise RuntimeError(outcome.output[-2000:])
    numbered = [(folder, number, *case) for number, case in enumerate(cases)]
    outcomes = run_many(trial, numbered, timeout=3 * SECONDS)
    bad = [i for i, outcome in enumerate(outcomes) if outcome.returncode != 0]
    for i in bad:
        print(cases[i], outcomes[i].output[-1500:])
    said = [outcome.output.rsplit("difference ", 1) for outcome in outcomes]
    errors = [float(words[1]) for words in said if len(words) > 1]
    counts = Counter(f"{a} -> {b}" for a, b, _ in cases)
    detail = f"largest difference of a loss {max(errors, default=0.0):.1e}; " + ", ".join(
        f"{change} {count}" for change, count in counts.items()
    )
    return len(cases) - len(bad), len(cases), detail


def control(folder: Path, seed: int) -> bool:
    """Drops from each rank's own generator: one process and two differ in their losses."""
    for name in ("1x12", "2x6"):
        warm(folder, **SPREADS[name])
        complete(folder / name, keyed=False, **SPREADS[name])
    try:
        same_steps(folder / "1x12", folder / "2x6")
    except Different:
        return True
    return False


def trial(folder: Path, number: int, before: str, after: str, step: int) -> None:
    """Kill after `step` optimizer steps, go on otherwise spread. Raises Different."""
    own = folder / f"trial{number}"
    old, new = SPREADS[before], SPREADS[after]
    epoch, done = divmod(step, STEPS)
    # in the middle of the next step, where there is one
    accumulated = GLOBAL_BATCH // (old["per_device"] * old.get("ranks", 1))
    killed(own, (epoch, done * accumulated + accumulated // 2, "start"), **old)
    complete(own, resume="auto", **new)
    if before == after:
        compare(folder / before, own)
    print("difference", same_steps(folder / "1x12", own))


def same_steps(whole: Path, folder: Path) -> float:
    """The steps of two runs, whatever their spreads: samples, pixels, masks, loss.

    Returns the largest difference of a step's loss. Raises Different.
    """
    expected, found = steps_of(whole), steps_of(folder)
    if set(expected) != set(found):
        raise Different(f"steps {sorted(set(expected) ^ set(found))} are of one run alone")
    error = 0.0
    for step, entry in expected.items():
        other = found[step]
        if entry["samples"] != other["samples"]:
            raise Different(f"step {step}: other samples, pixels, masks or token ids")
        error = max(error, abs(entry["loss"] - other["loss"]))
        if not error <= TOLERANCE:
            raise Different(f"step {step}: loss {other['loss']} where {entry['loss']} was")
    for epoch in {epoch for epoch, _ in found}:
        _check_once(found, epoch)
    return error


def steps_of(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """By (epoch, optimizer step): all ranks' samples, and the mean loss over their masked patches.

    Of what was done twice, before a kill and after it, the later counts.
    """
    entries = [entry for entry in read_record(folder) if "sum" in entry]
    resumed = max(entry["since"] for entry in entries)
    steps: dict[tuple[int, int], dict[str, Any]] = {}
    for entry in entries:
        if entry["since"] < resumed <= entry["step"]:
            continue
        key = entry["epoch"], entry["step"]
        step = steps.setdefault(key, {"samples": [], "sum": 0.0, "count": 0})
        step["samples"] += [
            (index, entry["images"][i], entry["mask"][i], entry["token_ids"][i])
            for i, index in enumerate(entry["indices"])
        ]
        step["sum"] += entry["sum"]
        step["count"] += entry["count"]
    for step in steps.values():
        step["loss"] = step["sum"] / step["count"]
        step["samples"].sort()
    return steps


def _check_once(steps: dict[tuple[int, int], dict[str, Any]], epoch: int) -> None:
    """The ranks' union in an epoch is every sample once."""
    seen = [
        sample[0] for key, step in steps.items() if key[0] == epoch for sample in step["samples"]
    ]
    if sorted(seen) != list(range(TRAIN_IMAGES)):
        raise Different(f"epoch {epoch}: samples seen {sorted(seen)}")


def _whole(folder: Path, name: str) -> None:
    complete(folder / name, **SPREADS[name])
