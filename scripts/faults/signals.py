"""SIGTERM, SIGINT and SIGUSR1, to any process of a run, at any time of it."""

import contextlib
import random
import re
import signal
import time
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from beit.job import signals
from beit.job.exits import RunEnd, of_signal
from scripts.faults.forked import Child, Outcome, start_forked, start_ranks
from scripts.faults.tiny import add_callbacks, final, make_images, tiny_run

ROW = "SIGTERM, SIGINT, SIGUSR1 to each process, at random times"
TRIALS = 100
SHARE = 2
PHASES = ("start", "train", "validate", "save", "end")
WITHIN = 11.0  # seconds: ten, and a step
MARKS = "marks"
_TIMEOUT = 90.0


@dataclass(frozen=True)
class Setting:
    """A run that is stopped."""

    task: str = "classification"
    ranks: int = 1
    workers: int = 0
    per_device: int = 12
    ema: bool = False

    def words(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "ranks": self.ranks,
            "workers": self.workers,
            "per_device": self.per_device,
            "ema": self.ema,
            "epochs": 3,
            "save_every": 2,
        }


ALONE = (
    Setting(),
    Setting(workers=2, per_device=4, ema=True),
    Setting(task="mim", workers=1),
)
PAIR = Setting(ranks=2, per_device=6)


@dataclass(frozen=True)
class Trial:
    """A signal, to whom, and when."""

    setting: Setting
    number: signal.Signals
    target: str  # rank 0 | rank 1 | group
    phase: str
    delay: float  # seconds after the phase began
    epoch: int
    twice: bool = False  # a second one after 1.5 s, in a step that takes long


@dataclass
class Sweep:
    """Trials, and the final weights that each setting has when nothing happens."""

    folder: Path
    hashes: dict[Setting, str] = field(default_factory=dict)

    def expected(self, setting: Setting) -> str:
        """Of the uninterrupted run."""
        if setting not in self.hashes:
            folder = self.folder / f"whole{len(self.hashes)}"
            folder.mkdir()
            outcomes = _wait(_start(setting, folder))
            end = final(folder)
            assert end is not None, outcomes[0].output
            self.hashes[setting] = end["final"]
        return self.hashes[setting]


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    rng = random.Random(seed)
    sweep = Sweep(folder)
    passed, failures, slowest = 0, [], 0.0
    for number in range(trials):
        trial = draw(rng, pair=number % 5 == 4)
        reason, seconds = check(trial, sweep, folder / f"{number:03d}")
        passed += not reason
        slowest = max(slowest, seconds)
        failures += [f"{trial}: {reason}"] if reason else []
    detail = f"128 + signal, gone after {slowest:.1f} s at most, resumed to the same weights"
    return passed, trials, "; ".join(failures[:3]) or detail


def control(folder: Path, seed: int) -> bool:
    """Lightning's own handlers in place: another exit code, and no checkpoint at the boundary."""
    folder.mkdir(exist_ok=True)
    trial = Trial(ALONE[0], signal.SIGTERM, "rank 0", "train", 0.05, 1)
    reason, _ = check(trial, Sweep(folder), folder / "theirs", ours=False)
    return "exit code {0}" in reason


def draw(rng: random.Random, *, pair: bool) -> Trial:
    setting = PAIR if pair else rng.choice(ALONE)
    phases = [p for p in PHASES if p != "validate" or setting.task == "classification"]
    twice = not pair and rng.random() < 0.1
    return Trial(
        setting,
        rng.choice(signals.NUMBERS),
        rng.choice(("rank 0", "rank 1", "group") if pair else ("rank 0", "group")),
        "train" if twice else rng.choice(phases),
        rng.uniform(0, 0.3),
        rng.randrange(3),
        twice,
    )


def check(trial: Trial, sweep: Sweep, folder: Path, *, ours: bool = True) -> tuple[str, float]:
    """(what is wrong with how the run ended, empty if nothing is; seconds from signal to end)."""
    make_images(folder / "images")  # a signal is not to cut one short
    children = _start(trial.setting, folder, trial=trial, ours=ours)
    try:
        _await_phase(folder / MARKS, trial, children[0])
        time.sleep(trial.delay)
        _send(trial, children)
        sent = time.monotonic()
        if trial.twice:
            time.sleep(1.5)
            _send(trial, children)
        gone = _await_end(children, sent)
    finally:
        outcomes = _wait(children)
    if gone is None:
        return f"not gone: {outcomes[0].output[-1500:]}", WITHIN
    return _judge(trial, sweep, folder, outcomes), gone


def _judge(trial: Trial, sweep: Sweep, folder: Path, outcomes: list[Outcome]) -> str:
    codes = {outcome.returncode for outcome in outcomes}
    text = "".join(outcome.output for outcome in outcomes)
    code = int(of_signal(trial.number))
    finished = final(folder) is not None and codes == {0}
    allowed = {code, 143} if trial.phase == "start" and trial.setting.ranks > 1 else {code}
    if not (codes <= allowed and code in codes) and not finished:
        return f"exit code {codes} instead of {code}: {text[-1500:]}"
    saved = re.search(r"stopped by .* after step (\d+): checkpoint (\S+);", text)
    told = saved or finished or "ended at once" in text
    if not told:
        return f"nothing was said: {text[-1500:]}"
    trained = trial.phase in ("train", "validate", "save") and not trial.twice
    if trained and not (saved or finished):
        return f"no checkpoint: {text[-1500:]}"
    if saved and f"step{int(saved[1]):07d}" not in saved[2]:
        return f"the checkpoint is not of the last step: {saved[0]}"
    if finished:
        return ""
    resumed = _wait(_start(trial.setting, folder, resume="auto"))
    end = final(folder)
    if end is None or any(outcome.returncode for outcome in resumed):
        return f"did not resume: {resumed[0].output[-1500:]}"
    if saved and Path(saved[2]).name not in "".join(outcome.output for outcome in resumed):
        return "another checkpoint was resumed from"
    return "" if end["final"] == sweep.expected(trial.setting) else "other weights in the end"


def _start(
    setting: Setting,
    folder: Path,
    *,
    trial: Trial | None = None,
    ours: bool = True,
    resume: str | None = None,
) -> list[Child]:
    arguments = (folder, setting.words(), trial, ours, resume)
    if setting.ranks == 1:
        return [start_forked(_train, *arguments)]
    return start_ranks(setting.ranks, _train, *arguments)


def _train(
    folder: Path, settings: dict[str, Any], trial: Trial | None, ours: bool, resume: str | None
) -> int:
    """A run with the exit code of the command line."""
    from beit.console import log_to_console

    log_to_console()
    if trial is not None:
        add_callbacks(Marks(folder, trial))
    with _handlers(ours):
        with contextlib.suppress(FileExistsError):
            (folder / MARKS).open("x").close()  # from here on we are asked, not the kernel
        try:
            tiny_run(folder, resume=resume, **settings)
        except RunEnd as end:
            return int(end.code)
    return 0


@contextlib.contextmanager
def _handlers(ours: bool) -> Iterator[None]:
    if ours:
        with signals.handled(ends_process=True):
            yield
        return
    with unittest.mock.patch("beit.job.stopping.take_over"):
        with unittest.mock.patch("beit.job.signals.handled", _unhandled):
            yield


@contextlib.contextmanager
def _unhandled(*, ends_process: bool) -> Iterator[None]:
    yield


class Marks(L.Callback):
    """Writes where the run is, and makes each part last long enough to be met."""

    def __init__(self, folder: Path, trial: Trial | None) -> None:
        self.path = folder / MARKS
        self.trial = trial

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._mark(trainer, "train")
        time.sleep(5.0 if self.trial and self.trial.twice else 0.03)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._mark(trainer, "validate")
        time.sleep(0.2)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self._mark(trainer, "save")
        time.sleep(0.1)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._mark(trainer, "end")
        time.sleep(0.1)

    def _mark(self, trainer: L.Trainer, phase: str) -> None:
        if trainer.global_rank == 0:
            with self.path.open("a") as file:
                file.write(f"{phase} {trainer.current_epoch}\n")


def _await_phase(marks: Path, trial: Trial, child: Child) -> None:
    """Until the run is in the trial's phase; in one that it never reaches, until its end."""
    wanted = trial.phase if trial.phase == "end" else f"{trial.phase} {trial.epoch}"
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        if marks.exists() and (trial.phase == "start" or wanted in marks.read_text()):
            return
        if not _alive(child.pid):
            return
        time.sleep(0.01)


def _send(trial: Trial, children: list[Child]) -> None:
    with contextlib.suppress(ProcessLookupError):
        if trial.target == "group":
            for child in children:
                child.send_all(trial.number)
        else:
            children[int(trial.target[-1])].send(trial.number)


def _await_end(children: list[Child], sent: float) -> float | None:
    """Seconds until all processes were gone, data workers too; None if some stay.

    Before the ranks know of each other it is their launcher that ends the others: as torchrun's
    agent does, SIGTERM.
    """
    asked = False
    while time.monotonic() < sent + WITHIN:
        living = [child for child in children if _alive(child.pid)]
        if 0 < len(living) < len(children) and time.monotonic() > sent + 2.0 and not asked:
            asked = True
            for child in living:
                child.send(signal.SIGTERM)
        if not living and not any(session(child.pid) for child in children):
            return time.monotonic() - sent
        time.sleep(0.02)
    return None


def _wait(children: list[Child]) -> list[Outcome]:
    deadline = time.monotonic() + _TIMEOUT
    return [child.wait(max(0.0, deadline - time.monotonic())) for child in children]


def _alive(pid: int) -> bool:
    return _stat(Path(f"/proc/{pid}/stat"))[0] not in ("", "Z", "X")


def session(leader: int) -> list[int]:
    """Living processes of a session: those that a child started, too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        state, session = _stat(path)
        if session == leader and state not in ("Z", "X"):
            found.append(int(path.parent.name))
    return found


def _stat(path: Path) -> tuple[str, int]:
    """(state, session) of a process; ("", 0) where there is none."""
    try:
        fields = path.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[3])
