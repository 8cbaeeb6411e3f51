"""Hostile configs, command lines, checkpoints and pickles: each must be refused, and nothing run.

A case is one command in a process and a folder of its own. Its payload makes the file MARKER, or
writes where no run may write. Passed: exit code 2, one line, and the folder as it was.
"""

import contextlib
import importlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit import building, cli, config
from beit.security import composing, folders, limits, secrets, targets
from scripts.faults.forked import Outcome, run_forked
from scripts.faults.hostile_configs import MARKER, RUN, SECRET, Case, config_cases
from scripts.faults.hostile_files import file_cases

ROW = "hostile configs, checkpoints, pickles"
MINE = ["--config-dir", ".", "experiment=mine"]


def warm_up() -> None:
    """Before forking: a child that imported all this by itself would take seconds."""
    importlib.import_module("beit.face")
    config.check(config.compose(RUN[1:]))


def cases() -> list[Case]:
    """All of them, in order."""
    return [*config_cases(), *file_cases()]


def attack(case: Case, folder: Path, protect: bool = True) -> tuple[Outcome, list[str]]:
    """Run a case in a folder; its end, and what there is in the folder that was not before."""
    folder.mkdir(parents=True)
    place = folder / "place"
    place.mkdir()
    words = [*case.verb, *case.words]
    with contextlib.chdir(place) if hasattr(contextlib, "chdir") else _chdir(place):
        if case.experiment:
            (place / "experiment").mkdir()
            text = f"# @package _global_\n{case.experiment}\n"
            (place / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
            words += MINE
        case.prepare()
    before = set(folder.rglob("*"))
    outcome = run_forked(_command, words, place, protect, timeout=120, environment=case.environment)
    return outcome, sorted(path.name for path in set(folder.rglob("*")) - before)


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _command(words: list[str], place: Path, protect: bool) -> int:
    os.chdir(place)
    sys.path.insert(0, str(place))
    sys.dont_write_bytecode = True
    sys.argv = ["beit", *words]
    if not protect:
        _switch_off()
    return cli.main()


def _switch_off() -> None:
    """As it was: Hydra builds what it is told to."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    for module, name in (
        (composing, "check_composed"),
        (composing, "check_words"),
        (composing, "check_recorded"),
        (targets, "check_nodes"),
        (targets, "check_only"),
        (folders, "check_folders"),
        (secrets, "check_secrets"),
        (limits, "check_resolved_size"),
        (building, "check_arguments"),
        (building, "check_values"),
        (config, "check"),
    ):
        setattr(module, name, nothing)


def _fault(case: Case, outcome: Outcome, left: list[str]) -> str:
    """What was wrong with the answer to a case; empty where it was refused as it must be."""
    lines = [line for line in outcome.output.splitlines() if line.strip()]
    if MARKER in left:
        return "executed"
    if left:
        return f"left {left[:3]}"
    if outcome.returncode != 2:
        return f"exit code {outcome.returncode}: {lines[-1:]}"
    if len(lines) != 1 or not lines[0].startswith("beit: error: "):
        return f"{len(lines)} lines: {lines[:2]}"
    return "the secret was printed" if SECRET in outcome.output else ""


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """As many of the cases, drawn by the seed where not all."""
    chosen = cases()
    if trials < len(chosen):
        chosen = random.Random(seed).sample(chosen, trials)
    warm_up()
    faults, slowest = [], 0.0
    for number, case in enumerate(chosen):
        outcome, left = attack(case, folder / str(number))
        slowest = max(slowest, outcome.seconds)
        if fault := _fault(case, outcome, left):
            faults.append(f"{case.name}: {fault}")
    passed = len(chosen) - len(faults)
    return passed, len(chosen), "; ".join(faults[:5]) or f"none ran, {slowest:.1f} s at most"


def control(folder: Path, seed: int) -> bool:
    """With the checks switched off a payload does run."""
    case = next(case for case in cases() if case.name.endswith(": torch.load"))
    return MARKER in attack(case, folder / "unprotected", protect=False)[1]


TRIALS = 1000  # all of them
SHARE = 5
