"""Trials in child processes: everything is imported once, and a trial is a fork of that.

A run then costs about a second instead of ten. One thread each: after a fork the thread pools of
torch's kernels are gone, and what would use them waits for ever.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import torch


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    returncode: int  # as of `subprocess`: -9 where SIGKILL ended it
    pid: int
    seconds: float
    timed_out: bool  # it was killed by us
    output: str  # the last 200,000 characters of what it printed


@dataclass
class Child:
    """A forked process, the leader of its own session."""

    pid: int
    output: IO[bytes]
    started: float = field(default_factory=time.monotonic)

    def send(self, number: int) -> None:
        """A signal to the child alone."""
        os.kill(self.pid, number)

    def send_all(self, number: int) -> None:
        """A signal to the child and all processes that it started."""
        os.killpg(self.pid, number)

    def wait(self, timeout: float) -> Outcome:
        """Its end, forced after `timeout` seconds; what it leaves behind is killed."""
        timed_out = not self._ends_within(timeout)
        if timed_out:
            self.send(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        with contextlib.suppress(ProcessLookupError):
            self.send_all(signal.SIGKILL)  # workers notice only seconds later that they are alone
        seconds = time.monotonic() - self.started
        code = os.waitstatus_to_exitcode(status)
        with self.output:
            size = self.output.seek(0, os.SEEK_END)
            self.output.seek(max(0, size - 200_000))
            text = self.output.read().decode(errors="replace")
        return Outcome(code, self.pid, seconds, timed_out, text)

    def _ends_within(self, timeout: float) -> bool:
        handle = os.pidfd_open(self.pid)
        try:
            return bool(select.select([handle], [], [], timeout)[0])
        finally:
            os.close(handle)


def run_forked(
    function: Callable[..., Any], /, *args: Any, timeout: float, **kwargs: Any
) -> Outcome:
    """Call `function` in a child and wait for its end; its result counts only as an exit code."""
    return start_forked(function, *args, **kwargs).wait(timeout)


def start_forked(
    function: Callable[..., Any],
    /,
    *args: Any,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> Child:
    """A child that calls `function`, with `environment` on top of ours.

    An int that it returns is the exit code, an exception is printed and 1.
    """
    torch.set_num_threads(1)
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the child's, closed by `wait`
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_child(output, environment or {})
        os._exit(_exit_code(function, args, kwargs))
    return Child(pid, output)


def run_many(
    function: Callable[..., Any], cases: Iterable[tuple[Any, ...]], *, timeout: float
) -> list[Outcome]:
    """`function(*case)` in a child for each case, as many at a time as there are cores."""
    jobs = os.cpu_count() or 1
    running: list[tuple[int, Child]] = []
    outcomes: dict[int, Outcome] = {}

    def finish_first() -> None:
        number, child = running.pop(0)
        outcomes[number] = child.wait(max(0.0, child.started + timeout - time.monotonic()))

    for number, case in enumerate(cases):
        if len(running) == jobs:
            finish_first()
        running.append((number, start_forked(function, *case)))
    while running:
        finish_first()
    return [outcomes[number] for number in sorted(outcomes)]


def run_ranks(
    count: int, function: Callable[..., Any], /, *args: Any, timeout: float, **kwargs: Any
) -> list[Outcome]:
    """One child per rank, as torchrun would start them; their ends, in the order of the ranks."""
    deadline = time.monotonic() + timeout
    children = start_ranks(count, function, *args, **kwargs)
    return [child.wait(max(0.0, deadline - time.monotonic())) for child in children]


def start_ranks(
    count: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> list[Child]:
    """One child per rank, each with torchrun's variables in its environment."""
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "faults",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    return [
        start_forked(
            function,
            *args,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **kwargs,
        )
        for rank in range(count)
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _become_child(output: IO[bytes], environment: dict[str, str]) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    # Lightning read the rank when it was imported
    rank_zero_only.rank = int(environment.get("RANK", 0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    _forget_logging()


def _forget_logging() -> None:
    """What the parent did before, another run or a test, must not decide what the child says."""
    logger = logging.getLogger("beit")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def _exit_code(function: Callable[..., Any], args: Any, kwargs: Any) -> int:
    code: Any = 1
    try:
        code = function(*args, **kwargs)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if code is None:
        return 0
    return code & 0xFF if type(code) is int else 0
