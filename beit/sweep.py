"""A sweep: every member in a process of its own, so that what ends one leaves the others alone."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from beit.errors import UserError
from beit.files import replace_text
from beit.job import exits
from beit.job.processes import PARENT, ended

log = logging.getLogger(__name__)

RECORD = "sweep.json"
METRIC = "val/loss"  # what a sweeper is told of a member, and what the table shows
# a member writes its last metrics to this file
RESULT = "BEIT_SWEEP_RESULT"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_DONE, _NOT_RUN = "done", "not run"


@dataclass
class Member:
    """One run of a sweep, as it stands in `sweep.json`."""

    number: int
    overrides: list[str]
    folder: str
    state: str = _NOT_RUN
    code: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def settings(self) -> list[str]:
        """What makes it this member, however often it is started."""
        return [word for word in self.overrides if not word.startswith("resume=")]


class Sweep:
    """Starts the members one after the other and writes down how each ended.

    A stop signal (SIGINT, SIGTERM, SIGUSR1) is passed on to the member that runs; the rest are not
    run. With resume=auto the members that `sweep.json` has as done are not run again.
    """

    def __init__(self, flags: list[str]) -> None:
        self.members: list[Member] = []
        self._flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
        self._before: dict[int, Member] = {}
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped: int | None = None

    def run(self, folder: Path, number: int, overrides: list[str]) -> float | None:
        """Member `number`, in its `folder`. Returns its metric, None if it did not get there.

        Raises UserError where the sweep's folder holds one that this one does not go on with.
        """
        member = Member(number, overrides, str(folder))
        folder = folder.parent
        if not self.members:
            self._before = _recorded(folder)
        before = self._before.get(number)
        self._check(folder, member, before)
        if before is not None and before.state == _DONE:
            member = before
            log.info("member %d was done before: %s", number, " ".join(member.settings))
        self.members.append(member)
        if member.state != _DONE and self._stopped is None:
            self._run(folder, member)
        _write(folder / RECORD, [asdict(one) for one in [*self.members, *self._later()]])
        return member.metrics.get(METRIC)

    def code(self) -> int:
        """The exit code of the whole: a stop's, or that of what weighs most."""
        if self._stopped is not None:
            return int(exits.of_signal(self._stopped))
        codes = [member.code or 0 for member in self.members]
        return exits.of_all([exits.Exit.FAULT if code < 0 else code for code in codes])

    def table(self) -> str:
        """How each member ended."""
        rows = [("member", "state", METRIC, "settings", "folder")]
        for member in self.members:
            value = member.metrics.get(METRIC)
            shown = "-" if value is None else f"{value:.5g}"
            words = " ".join(member.settings)
            rows.append((str(member.number), member.state, shown, words, member.folder))
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

    def _run(self, folder: Path, member: Member) -> None:
        result = folder / f".{member.number}.json"
        result.unlink(missing_ok=True)
        member.state = "running"
        _write(folder / RECORD, [asdict(one) for one in [*self.members, *self._later()]])
        place = member.folder.replace("\\", "\\\\").replace("'", "\\'")
        words = [*member.overrides, f"paths.output_dir='{place}'", *self._flags]
        told = {PARENT: f"{os.getpid()}:{int(signal.SIGTERM)}", RESULT: str(result)}
        if Path.cwd() != Path(__file__).resolve().parents[1]:
            told["PYTHONSAFEPATH"] = "1"  # -m would import what lies in the current folder
        began = time.monotonic()
        # a session of its own: Ctrl-C reaches it once, from us
        self._running = subprocess.Popen(
            [sys.executable, "-m", "beit.cli", "train", *words],
            env={**os.environ, **told},
            start_new_session=True,
        )
        if self._stopped is not None:  # it came in between
            self._running.send_signal(self._stopped)
        member.code = self._running.wait()
        self._running = None
        member.seconds = round(time.monotonic() - began, 1)
        member.state = _state(member.code)
        if result.exists():
            member.metrics = json.loads(result.read_text(encoding="utf-8"))
            result.unlink()
        if member.code:
            log.error("member %d %s: %s", member.number, member.state, " ".join(member.settings))


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
