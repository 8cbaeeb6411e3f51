"""SIGKILL at every micro-batch: the resumed run is the one that was not killed, bit for bit."""

import collections
import random
from pathlib import Path

from scripts.faults.exact import SECONDS, Different, Settings, compare, complete, killed, warm
from scripts.faults.forked import run_many
from scripts.faults.tiny import micro_batches

ROW = "SIGKILL at every micro-batch"
TRIALS = 264  # of 357
SHARE = 2

_ACCUMULATED = {"per_device": 4}  # three micro-batches a step
SETTINGS: dict[str, Settings] = {
    "plain": {"epochs": 3},
    "1 worker, accumulated": {"epochs": 3, "workers": 1, **_ACCUMULATED},
    "2 workers, accumulated, bf16": {
        "epochs": 3,
        "workers": 2,
        "precision": "bf16-mixed",
        **_ACCUMULATED,
    },
    "EMA, accumulated, last batch kept": {
        "epochs": 3,
        "ema": True,
        "keep_last": True,
        **_ACCUMULATED,
    },
    "2 workers, EMA, bf16, last batch kept": {
        "epochs": 3,
        "workers": 2,
        "ema": True,
        "keep_last": True,
        "precision": "bf16-mixed",
    },
    "1 worker, bf16, dropout, a save in two steps": {
        "epochs": 3,
        "workers": 1,
        "precision": "bf16-mixed",
        "save_every": 2,
        "words": ["model.drop_rate=0.1", "model.attention_drop_rate=0.1"],
    },
    # the third epoch reads the tokens that the first one wrote, and a killed one both
    "1 worker, token cache": {
        "epochs": 3,
        "workers": 1,
        "words": ["views_per_image=2", "token_cache=${paths.output_dir}/tokens"],
    },
    # one kill at each micro-batch
    "classification, mixup": {
        "task": "classification",
        "epochs": 2,
        "words": ["mixing=mixup_cutmix"],
        **_ACCUMULATED,
    },
    "tokenizer": {
        "task": "tokenizer",
        "epochs": 2,
        "words": ["task.revival.every_steps=2"],
        **_ACCUMULATED,
    },
}


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """Kill and resume at `trials` places, all of them if there are no more."""
    names = list(SETTINGS) if trials > len(SETTINGS) else [random.Random(seed).choice([*SETTINGS])]
    wholes = {name: folder / f"whole{number}" for number, name in enumerate(names)}
    for name, whole in wholes.items():
        warm(whole, **SETTINGS[name])
    for outcome in run_many(_whole, wholes.items(), timeout=SECONDS):
        if outcome.returncode != 0:
            raise RuntimeError(outcome.output[-2000:])
    places = [(name, place) for name in names for place in _places(name, wholes[name])]
    if trials < len(places):
        places = random.Random(seed).sample(places, trials)
    cases = [
        (folder / f"trial{number}", wholes[name], SETTINGS[name], place)
        for number, (name, place) in enumerate(places)
    ]
    outcomes = run_many(kill_and_resume, cases, timeout=3 * SECONDS)
    bad = [i for i, outcome in enumerate(outcomes) if outcome.returncode != 0]
    for i in bad:
        print(places[i], outcomes[i].output[-1500:])
    counts = collections.Counter(name for name, _ in places)
    detail = ", ".join(f"{name} {count}" for name, count in counts.items())
    if bad:
        detail = f"differs: {places[bad[0]]}; {detail}"
    return len(places) - len(bad), len(places), detail


def control(folder: Path, seed: int) -> bool:
    """Draws from global generators: the same run twice is the same, a resumed one is not."""
    settings = {"keyed": False, "epochs": 1}
    warm(folder, **settings)
    complete(folder / "whole", **settings)
    place = 0, 1 + seed % 2, "start"
    try:
        kill_and_resume(folder / "trial", folder / "whole", settings, place)
    except Different:
        return True
    return False


def kill_and_resume(
    folder: Path, whole: Path, settings: Settings, place: tuple[int, int, str]
) -> None:
    """One trial. Raises Different."""
    killed(folder, place, **settings)
    complete(folder, resume="auto", **settings)
    compare(whole, folder)


def _whole(name: str, folder: Path) -> None:
    complete(folder, **SETTINGS[name])


def _places(name: str, whole: Path) -> list[tuple[int, int, str]]:
    """Where a run can be killed: at the start, at the end and before the step of a micro-batch."""
    entries = micro_batches(whole)
    order = sorted((epoch, batch) for epoch, batch, _ in entries)
    steps = {key: entries[(*key, 0)]["step"] for key in order}
    last = {step: key for key, step in steps.items()}  # of each step
    everywhere = [(*key, "start") for key in order]
    if SETTINGS[name].get("task", "mim") != "mim":
        return everywhere
    ends = [(*key, "end") for key in order]
    return [*everywhere, *ends, *((*key, "step") for key in last.values())]
