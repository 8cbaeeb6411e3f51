"""A disk that fills up: a named error and its exit code, every older checkpoint whole, no debris.

The disk is a tmpfs of some megabytes, mounted for the trial, which takes root.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

from beit.checkpoints.errors import NoSpace
from beit.checkpoints.file import verify, write_file
from beit.errors import UserError
from beit.job.exits import Exit, RunEnd
from scripts.faults.forked import Outcome, run_forked
from scripts.faults.saves import straight_to_its_name
from scripts.faults.tiny import add_callbacks, final, make_images, read_record, tiny_run

ROW = "full disk in checkpoint, log and temporary folder"
TRIALS = 4
SHARE = 1
SKIPPED = "skipped: mounting a small disk needs root"
_TIMEOUT = 120.0


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """(passed, tried, what was seen)."""
    if not _can_mount(folder):
        return 1, 1, SKIPPED
    make_images(folder / "images")
    cases: list[Callable[[Path], str]] = [_fills_up, _too_small, _temporary_full, _log_full]
    wrong = {}
    whole = folder / "whole"
    whole.mkdir()
    (whole / "images").symlink_to(folder / "images")
    run_forked(_run, whole, timeout=_TIMEOUT)
    for number, case in enumerate(cases[:trials]):
        place = folder / str(number)
        place.mkdir()
        (place / "images").symlink_to(folder / "images")
        if problem := case(place):
            wrong[case.__name__.strip("_")] = problem
    tried = len(cases[:trials])
    detail = "; ".join(f"{name}: {problem}" for name, problem in wrong.items())
    return tried - len(wrong), tried, detail or "named, exit code 5, older checkpoints whole"


def control(folder: Path, seed: int) -> bool:
    """Written straight to its name, the full disk destroys the checkpoint that was there."""
    if not _can_mount(folder):
        return True
    with small_disk(folder / "disk", megabytes=3) as disk:
        path = disk / "last.safetensors"
        write_file(path, {"state_dict": {"w": torch.ones(500_000)}})
        _fill(disk)
        with straight_to_its_name(), contextlib.suppress(NoSpace):
            write_file(path, {"state_dict": {"w": torch.ones(600_000)}})
        try:
            verify(path)
        except UserError:
            return True
    return False


def _fills_up(place: Path) -> str:
    """Somebody else fills the disk after the second step; with room again the run goes on."""
    with small_disk(place / "run", megabytes=16) as disk:
        outcome = run_forked(_run, place, ballast=disk, timeout=_TIMEOUT)
        if problem := _unlike(outcome, Exit.NO_SPACE, "no space left for"):
            return problem
        found = list((disk / "checkpoints").iterdir())
        if debris := [path.name for path in found if path.name.endswith(".part")]:
            return f"{debris[0]} stayed behind"
        if len([verify(path) for path in found if not path.is_symlink()]) != 2:
            return f"of two checkpoints there are {[path.name for path in found]}"
        (disk / "ballast").unlink()
        outcome = run_forked(_run, place, resume="auto", timeout=_TIMEOUT)
        return _unlike_whole(outcome, place)


def _too_small(place: Path) -> str:
    """Refused before the first step."""
    with small_disk(place / "run", megabytes=0.25) as disk:
        outcome = run_forked(_run, place, timeout=_TIMEOUT)
        if problem := _unlike(outcome, Exit.NO_SPACE, "are needed"):
            return problem
        if list(disk.glob("checkpoints/*")) or any("loss" in entry for entry in read_record(place)):
            return "a step was taken"
    return ""


def _temporary_full(place: Path) -> str:
    """Nothing of ours is written there: the run does not notice."""
    with small_disk(place / "temporary", megabytes=0.25) as disk:
        _fill(disk)
        outcome = run_forked(_run, place, environment={"TMPDIR": str(disk)}, timeout=_TIMEOUT)
        return _unlike_whole(outcome, place)


def _log_full(place: Path) -> str:
    """A logger never ends a run."""
    (place / "run").mkdir()
    with small_disk(place / "run" / "logs", megabytes=0.25) as disk:
        _fill(disk)
        words = ["logger.csv.save_dir=${paths.output_dir}/logs"]
        outcome = run_forked(_run, place, words=words, timeout=_TIMEOUT)
        return _unlike_whole(outcome, place)


def _run(
    place: Path,
    *,
    ballast: Path | None = None,
    environment: dict[str, str] | None = None,
    **settings: Any,
) -> int:
    """A tiny run, ended as the command line ends it."""
    os.environ.update(environment or {})
    tempfile.tempdir = None
    if ballast is not None:
        add_callbacks(Ballast(ballast))
    try:
        words = ["callbacks.checkpoints.keep=-1", *settings.pop("words", [])]
        tiny_run(place, words=words, **settings)
    except RunEnd as end:
        print(end)
        return int(end.code)
    return 0


class Ballast(L.Callback):
    """Fills a disk once the second checkpoint is written."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            _fill(self.disk)


def _fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _unlike(outcome: Outcome, code: int, told: str) -> str:
    """What is not as it should be with the end of a run."""
    if outcome.returncode != code:
        return f"exit code {outcome.returncode}, not {int(code)}: {outcome.output[-300:]}"
    return "" if told in outcome.output else f"not said: {told}"


def _unlike_whole(outcome: Outcome, place: Path) -> str:
    """The same of a run that should have ended as if nothing had been."""
    if problem := _unlike(outcome, Exit.DONE, ""):
        return problem
    ours, theirs = final(place), final(place.parent / "whole")
    assert ours is not None
    assert theirs is not None
    same = all(ours[key] == theirs[key] for key in ("final", "optimizer", "step"))
    return "" if same else "other weights than the whole run's"


@contextlib.contextmanager
def small_disk(folder: Path, *, megabytes: float) -> Iterator[Path]:
    """A tmpfs of so many megabytes."""
    folder.mkdir(exist_ok=True)
    size = f"size={int(megabytes * 1024)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _can_mount(folder: Path) -> bool:
    if os.geteuid() != 0:
        return False
    try:
        with small_disk(folder / "probe", megabytes=0.1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
