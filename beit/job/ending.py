"""The end of a lost job on one machine: all processes go, and the first cause is printed last."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from beit.job.causes import Cause
from beit.job.exits import Exit
from beit.job.processes import Process

_STEP = 0.01
# where the output goes nowhere any more the process must still end
_PRINT = 2.0


def end(
    cause: Cause,
    *,
    rank: int,
    peers: dict[int, Process],
    children: list[subprocess.Popen[Any]],
    elsewhere: Callable[[], int],
    patience: float,
) -> NoReturn:
    """End this process with the cause's exit code.

    The lowest rank that is left on the machine waits for the others, kills those that are lost or
    too slow (a stopped process cannot go by itself), and prints the cause.

    Args:
        rank: of this process.
        peers: processes of the other ranks.
        children: what this process started; some may not be known as ranks yet.
        elsewhere: how many ranks are connected still, on other machines too.
        patience: seconds that the others have.
    """
    here = {other: process for other, process in peers.items() if process.is_here}
    lost = here.pop(cause.rank, None) if cause.code == Exit.LOST else None
    if any(other < rank and not process.is_gone for other, process in here.items()):
        _leave(cause.code)
    printed = lost is not None and lost.pid == os.getppid()
    if printed:
        _print(cause)  # who started our parent may wait for nobody else
    if lost is not None:
        lost.kill()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and _any_left([*here.values(), lost], children, elsewhere):
        time.sleep(_STEP)
    for process in here.values():
        process.kill()
    for child in children:
        child.kill()
    if not printed:
        _print(cause)
    _leave(cause.code)


def _any_left(
    processes: list[Process | None],
    children: list[subprocess.Popen[Any]],
    elsewhere: Callable[[], int],
) -> bool:
    here = any(process is not None and not process.is_gone for process in processes)
    return here or any(child.poll() is None for child in children) or elsewhere() > 0


def _print(cause: Cause) -> None:
    """On the terminal and in the run's log, within two seconds or not at all."""
    text = cause.block()

    def show() -> None:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
        record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None)
        for handler in logging.getLogger("beit").handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    thread.join(_PRINT)


def _leave(code: int) -> NoReturn:
    # not sys.exit: the main thread may never come back from a collective
    os._exit(code)
