"""Contenders in processes of their own, as their users run them."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts.bench.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


class Host:
    """A process that holds contenders of a row and runs one of them when told to.

    It lives until it is closed, so that several of them can take turns.

    Args:
        row: module with `build(settings, names)`, that gives a step for each name.
        keep_freed: as `beit train` does it on a CPU (see `beit.memory`).
    """

    def __init__(
        self, row: str, names: Sequence[str], settings: Settings, *, keep_freed: bool = False
    ) -> None:
        self._names = names
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.bench.host"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self._send(row=row, names=names, settings=asdict(settings), keep_freed=keep_freed)

    def __enter__(self) -> "Host":
        self._receive()  # the steps are built
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()  # closes its input, which ends it
        self._said.close()

    def run(self, name: str) -> dict[str, float]:
        """The step's seconds and whatever it gave, and the memory the process took at most."""
        self._send(run=name)
        return self._receive()

    def seconds(self, name: str) -> float:
        return self.run(name)["seconds"]

    def _send(self, **message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise RuntimeError(f"the process of {self._names} ended:\n{self._said.read()}")
        return json.loads(line)


def memory(process: int | str = "self") -> Mapping[str, float]:
    """MB: what a process holds, what it held at most, and its share of what several hold."""
    status = _fields(Path(f"/proc/{process}/status"))
    shared = _fields(Path(f"/proc/{process}/smaps_rollup"))
    return {"now": status["VmRSS"], "peak": status["VmHWM"], "share": shared["Pss"]}


def _fields(file: Path) -> dict[str, float]:
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines if line[-1] == "kB"}
