"""Processes of this machine: which one, whether it lives, and that none outlives its parent."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

# who started this process, for it to end with: `pid:signal`
PARENT = "BEIT_PARENT"
_SET_PDEATHSIG = 1  # linux/prctl.h
_ENDED = ("Z", "X")


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with the same number by when it was started.

    `started` is in clock ticks since the machine's start, 0 where the system does not tell.
    """

    machine: str
    pid: int
    started: int

    @classmethod
    def this(cls) -> "Process":
        """The process that asks."""
        return cls(_machine(), os.getpid(), _stat(os.getpid())[1])

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, where it can be looked at and killed."""
        return self.machine == _machine() and self.started > 0

    @property
    def state(self) -> str:
        """One letter of the kernel's (T stopped, Z ended), empty where it is gone or elsewhere."""
        state, started = _stat(self.pid) if self.is_here else ("", 0)
        return state if started == self.started else ""

    @property
    def is_gone(self) -> bool:
        """Whether it ran here and has ended."""
        return self.is_here and self.state in ("", *_ENDED)

    def kill(self) -> None:
        """SIGKILL, if it still lives here. A stopped process can only go like this."""
        if not self.is_here or self.is_gone:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def name_to_children(number: int) -> None:
    """Programs started from now on are told to end with this process, by this signal."""
    os.environ[PARENT] = f"{os.getpid()}:{number}"


def end_with_parent_if_told() -> None:
    """End when the process that started this one ends, if it said so. It may have ended already."""
    words = os.environ.pop(PARENT, "").partition(":")
    if not words[0]:
        return
    parent, number = int(words[0]), int(words[2])
    end_with_parent(number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this signal when the parent ends; 0 takes it back. Linux alone.

    What counts is the parent's thread that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, int(number), 0, 0, 0)


def descendants() -> list[int]:
    """Living processes that this one started, and theirs. Linux alone; none elsewhere."""
    children: dict[int, list[int]] = {}
    gone = set()
    for path in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        pid, fields = int(path.name), _fields(int(path.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
        if not fields or fields[0] in _ENDED:
            gone.add(pid)  # what it started may not have another parent yet
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return [pid for pid in found if pid not in gone]


def kill_descendants() -> None:
    """SIGKILL to all processes below this one."""
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ended(returncode: int) -> str:
    """How a child ended, in words: from the return code that `subprocess` gives."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _machine() -> str:
    """The machine as far as processes can see each other: a container is one of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _stat(pid: int) -> tuple[str, int]:
    """(state, start time) of a process; ("", 0) where there is none."""
    fields = _fields(pid)
    return (fields[0], int(fields[19])) if fields else ("", 0)


def _fields(pid: int) -> list[str]:
    """What the kernel tells of a process: state, parent, ...; nothing where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name in brackets may hold anything
