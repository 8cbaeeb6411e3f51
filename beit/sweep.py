"""A sweep: every member in a process of its own, so that what ends one leaves the others alone."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from beit.errors import UserError
from beit.files import replace_text
from beit.job import exits
from beit.job.processes import PARENT, ended
from beit.stages import Stage, quoted

log = logging.getLogger(__name__)

RECORD = "sweep.json"
METRIC = "val/loss"  # what a sweeper is told of a member, and the table shows, unless told another
# a member writes its last metrics to this file
RESULT = "BEIT_SWEEP_RESULT"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_DONE, _NOT_RUN = "done", "not run"


@dataclass
class Member:
    """One run of a sweep, as in `sweep.json`; what runs before all has a number below 0."""

    number: int
    overrides: list[str]
    folder: str
    state: str = _NOT_RUN
    code: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    stages: dict[str, str] = field(default_factory=dict)  # the state of each that was begun

    @property
    def settings(self) -> list[str]:
        """What makes it this member, however often it is started."""
        return [word for word in self.overrides if not word.startswith("resume=")]


class Sweep:
    """Starts the members one after the other and writes down how each ended.

    A stop signal (SIGINT, SIGTERM, SIGUSR1) is passed on to the member that runs; the rest are not
    run. With resume=auto the members that `sweep.json` has as done are not run again.
    """

    def __init__(self, flags: list[str], *, metric: str = METRIC) -> None:
        self.members: list[Member] = []
        self.metric = metric
        self._flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
        self._before: dict[int, Member] = {}
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped: int | None = None

    def prepare(self, folder: Path, stages: Sequence[Stage]) -> None:
        """Run what all members need, in the sweep's folder `folder`, once.

        Raises UserError where one of them did not end well.
        """
        for number, stage in enumerate(stages, start=1):
            place = folder / stage.name.replace("/", "-")
            self.run(place, -number, stage.words, own_folder=False)
            if self.members[-1].state != _DONE and self._stopped is None:
                raise UserError(f"{stage.name}, which the members need: {self.members[-1].state}")

    def run(
        self,
        folder: Path,
        number: int,
        overrides: list[str],
        stages: Sequence[Stage] = (),
        *,
        own_folder: bool = True,
        again: bool = True,
    ) -> float | None:
        """Member `number`, in its `folder`. Returns its metric, None if it did not get there.

        Args:
            stages: what follows its run, as long as all goes well.
            own_folder: whether the run is put into `folder`, or where its words say.
            again: whether one that failed before is tried again.

        Raises UserError where the sweep's folder holds one that this one does not go on with.
        """
        member = Member(number, overrides, str(folder))
        place, folder = own_folder, folder.parent
        if not self.members:
            self._before = _recorded(folder)
        before = self._before.get(number)
        self._check(folder, member, before)
        if before is not None:
            member.stages, member.metrics = before.stages, before.metrics
            if before.state == _DONE or (not again and before.state != _NOT_RUN):
                member = before
                log.info("member %d, %s before: %s", number, member.state, _words(member))
        self.members.append(member)
        if member is not before and self._stopped is None:
            words = [f"paths.output_dir={quoted(member.folder)}"] if place else []
            first = Stage("", "train", [*overrides, *words])
            self._run(folder, member, [first, *stages])
        self._record(folder)
        return member.metrics.get(self.metric)

    def code(self) -> int:
        """The exit code of the whole: a stop's, or that of what weighs most."""
        if self._stopped is not None:
            return int(exits.of_signal(self._stopped))
        codes = [member.code or 0 for member in self.members]
        return exits.of_all([exits.Exit.FAULT if code < 0 else code for code in codes])

    def table(self) -> str:
        """How each member ended."""
        rows = [("member", "state", self.metric, "settings", "folder")]
        for member in self.members:
            if member.number < 0:
                continue
            value = member.metrics.get(self.metric)
            shown = "-" if value is None else f"{value:.5g}"
            rows.append((str(member.number), member.state, shown, _words(member), member.folder))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(lines)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within it stop signals go to the member, and end the sweep after it."""
        before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = self._stopped or number
        if self._running is not None and self._running.poll() is None:
            self._running.send_signal(number)

    @property
    def stopped(self) -> bool:
        """Whether a signal asked for the end."""
        return self._stopped is not None

    def _check(self, folder: Path, member: Member, before: Member | None) -> None:
        if self._before and "resume=auto" not in member.overrides:
            raise UserError(
                f"{folder} already holds a sweep: give this one another name (name=...), or go on "
                "with that one (resume=auto)"
            )
        if before is not None and before.settings != member.settings:
            raise UserError(
                f"{folder}: member {member.number} was {' '.join(before.settings)}, and is "
                f"{' '.join(member.settings)} now: give this sweep another name (name=...)"
            )

    def _later(self) -> list[Member]:
        """Members of the start before this one whose turn has not come again yet."""
        known = {member.number for member in self.members}
        return [member for number, member in self._before.items() if number not in known]

    def _record(self, folder: Path) -> None:
        _write(folder / RECORD, [asdict(one) for one in [*self.members, *self._later()]])

    def _run(self, folder: Path, member: Member, stages: Sequence[Stage]) -> None:
        """The member's own run and what follows it; what was done before is left alone."""
        began = time.monotonic()
        for stage in stages:
            if member.stages.get(stage.name) == _DONE:
                continue
            member.state = f"{stage.name} running".strip()
            self._record(folder)
            member.code, metrics = self._process(stage, folder / f".{member.number}.json")
            prefix = f"{stage.name}/" if stage.name else ""
            member.metrics |= {f"{prefix}{key}": value for key, value in metrics.items()}
            state = member.stages[stage.name] = _state(member.code)
            member.state = state if state == _DONE else f"{stage.name} {state}".strip()
            if state != _DONE:
                break
        member.seconds = round(time.monotonic() - began, 1)
        if member.code:
            log.error("member %d %s: %s", member.number, member.state, _words(member))

    def _process(self, stage: Stage, result: Path) -> tuple[int, dict[str, float | None]]:
        """(exit code, last metrics) of a command in a process of its own."""
        result.unlink(missing_ok=True)
        words, flags = list(stage.words), self._flags if stage.verb == "train" else []
        if stage.folder and stage.verb == "train":
            words.append(f"paths.output_dir={quoted(stage.folder)}")
        told = {PARENT: f"{os.getpid()}:{int(signal.SIGTERM)}", RESULT: str(result)}
        if Path.cwd() != Path(__file__).resolve().parents[1]:
            told["PYTHONSAFEPATH"] = "1"  # -m would import what lies in the current folder
        # a session of its own: Ctrl-C reaches it once, from us
        self._running = subprocess.Popen(
            [sys.executable, "-m", "beit.cli", stage.verb, *words, *flags],
            env={**os.environ, **told},
            start_new_session=True,
        )
        if self._stopped is not None:  # it came in between
            self._running.send_signal(self._stopped)
        code = self._running.wait()
        self._running = None
        metrics = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        result.unlink(missing_ok=True)
        return code, metrics


def _words(member: Member) -> str:
    return " ".join(member.settings)


def write_result(metrics: dict[str, float]) -> None:
    """Tell the sweep that this run is a member of, if it is one, its last metrics."""
    path = os.environ.get(RESULT)
    if path:
        _write(Path(path), {k: v if math.isfinite(v) else None for k, v in metrics.items()})


def is_member() -> bool:
    """Whether this process belongs to a member of a sweep."""
    return RESULT in os.environ


def _state(code: int) -> str:
    if code == 0:
        return _DONE
    if exits.is_stop(code):
        return f"stopped, exit code {code}"
    return f"failed, exit code {code}" if code > 0 else ended(code)


def recorded(folder: Path) -> list[Member]:
    """The members of the sweep in this folder. Raises UserError where there is none."""
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} holds no sweep ({RECORD}): give the folder of one")
    return [member for number, member in sorted(_recorded(folder).items()) if number >= 0]


def _recorded(folder: Path) -> dict[int, Member]:
    """The members of the sweep that was started in this folder before."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        members = [Member(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): move it away") from error
    return {member.number: member for member in members}


def _write(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(content, indent=2) + "\n")
