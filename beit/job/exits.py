"""How a process of a run ends: the exit codes, the one table of them, and the exceptions behind."""

import signal
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes. A stop by a signal is 128 + its number, as shells have it."""

    DONE = 0
    FAULT = 1
    MISTAKE = 2
    NOT_FINITE = 3
    LOST = 4
    NO_SPACE = 5
    SIGINT = 128 + signal.SIGINT
    SIGUSR1 = 128 + signal.SIGUSR1
    SIGTERM = 128 + signal.SIGTERM


# help text and docs are made of this
MEANINGS: dict[Exit, str] = {
    Exit.DONE: "done",
    Exit.FAULT: "a fault of the program",
    Exit.MISTAKE: "a mistake in the input (one line says which)",
    Exit.NOT_FINITE: "the loss or its gradient was not finite",
    Exit.LOST: "another process of the job was lost (killed, stopped, cut off, silent)",
    Exit.NO_SPACE: "no space left on a disk",
    Exit.SIGINT: "stopped by SIGINT (Ctrl-C)",
    Exit.SIGUSR1: "stopped by SIGUSR1",
    Exit.SIGTERM: "stopped by SIGTERM",
}

# of several processes or members: the first of these that occurred is the whole job's
_BY_WEIGHT = (
    Exit.SIGTERM,
    Exit.SIGINT,
    Exit.SIGUSR1,
    Exit.FAULT,
    Exit.NO_SPACE,
    Exit.LOST,
    Exit.NOT_FINITE,
    Exit.MISTAKE,
)


class RunEnd(Exception):
    """A run ends before its end, as it should: nothing is to be handled but the exit code.

    The message is one line; the command line prints it and exits with `code`.
    """

    code = Exit.FAULT
    told = False  # the message is in the run's log, and on the console with it


def table() -> str:
    """The codes and their meanings, a line each."""
    return "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())


def of_all(codes: list[int]) -> int:
    """The exit code of a sweep of these members' codes: a stop first, then the worst."""
    for code in _BY_WEIGHT:
        if code in codes:
            return int(code)
    return next((Exit.FAULT for code in codes if code), Exit.DONE)


def of_signal(number: int) -> Exit:
    """The exit code of a stop by this signal."""
    return Exit(128 + number)


def is_stop(code: int) -> bool:
    """Whether a process that ended so was asked to."""
    return code in (Exit.SIGINT, Exit.SIGUSR1, Exit.SIGTERM)
