"""Stop signals of this process: noted by a thread, and an end that comes in any case.

The kernel's signal is written to a pipe by Python itself, also while the main thread stands in a
collective and could run no handler. A thread reads the pipe; the handlers do nothing, except
where the main thread said that it may be interrupted.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from beit.job.exits import of_signal
from beit.job.processes import end_with_parent

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# one Ctrl-C may reach a process twice, from the terminal and through its launcher
SAME_SIGNAL_SECONDS = 1.0
_END = 255  # on the pipe: no signal's number
# of the first step nobody knows how long it takes: compilers and libraries warm up in it
FIRST_STEP_SECONDS = 60.0


class Stop(NamedTuple):
    """A signal that asked this process to stop."""

    number: int
    at: float  # time.monotonic()

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name


class Interrupted(BaseException):
    """Raised in the main thread by a stop signal, where that said it may be interrupted."""

    end: BaseException | None = None  # what the run ends with, once its state is saved


class StopSignals:
    """The stop signals of this process from `install` to `restore`.

    Args:
        ends_process: whether this process is the run's own (the command line), and may be ended
            from the thread: when nothing has been trained yet, on a second signal, and when the
            boundary is not reached in time. In another's program (`beit.train`) the first and the
            last raise KeyboardInterrupt instead, and there is no deadline.
    """

    def __init__(self, *, ends_process: bool) -> None:
        self.ends_process = ends_process
        self.stop: Stop | None = None
        self.seconds = 10.0  # beyond the step under way; see JobSettings.stop_seconds
        self.step_seconds: float | None = None  # None: nothing would be lost by ending at once
        self.interruptible = False
        self.saved = "without a checkpoint"  # what was, in the words of the last line
        self._deadline: float | None = None
        self._held = False
        self._old: dict[int, Any] = {}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="beit-signals", daemon=True)

    def install(self) -> None:
        """Handlers in place of those that are there. Main thread only."""
        for number in NUMBERS:
            self._old[number] = signal.signal(number, self._handle)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()

    def restore(self) -> None:
        """The handlers that were there before; a signal meanwhile finds one or the other."""
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._deadline = None
        self._wake(end=True)
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def may_take(self, step_seconds: float) -> None:
        """From now on a stop waits for the boundary, for so long and `seconds` more."""
        self.step_seconds = step_seconds

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it no deadline ends the process: a checkpoint is being written."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self.stop is not None:
                self.end_within(self.seconds + (self.step_seconds or 0.0))

    @contextmanager
    def may_interrupt(self) -> Iterator[None]:
        """Within it a stop raises Interrupted in the main thread."""
        self.interruptible = True
        try:
            if self.stop is not None:
                raise Interrupted
            yield
        finally:
            self.interruptible = False

    def end_within(self, seconds: float) -> None:
        """The process ends by then, whatever still holds it."""
        if self.ends_process:
            self._deadline = time.monotonic() + seconds
            self._wake()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.ends_process:
            now, first = time.monotonic(), self.stop
            self.stop = first or Stop(number, now)
            second = first is not None and now - first.at > SAME_SIGNAL_SECONDS
            if second or self.step_seconds is None:
                raise KeyboardInterrupt
        if self.interruptible:
            self.interruptible = False
            self.stop = self.stop or Stop(number, time.monotonic())
            raise Interrupted

    def _watch(self) -> None:
        while True:
            for number in self._arrived():
                if number == _END:
                    return
                if number in NUMBERS and self.ends_process:
                    self._note(number)
            late = self._deadline is not None and time.monotonic() >= self._deadline
            if late and not self._held:
                self._end("the step or what follows it did not end in time")

    def _arrived(self) -> bytes:
        timeout = None
        if self._deadline is not None and not self._held:
            timeout = max(0.0, self._deadline - time.monotonic())
        if select.select([self._read], [], [], timeout)[0]:
            return os.read(self._read, 64)
        return b""

    def _note(self, number: int) -> None:
        now = time.monotonic()
        # the handler may have been faster
        if self.stop is None or now - self.stop.at < SAME_SIGNAL_SECONDS:
            self.stop = self.stop or Stop(number, now)
            step = self.step_seconds
            if step is None:
                self._end("nothing has been trained yet")
            elif self._deadline is None:
                self._deadline = self.stop.at + self.seconds + step
        else:
            self._end("this was the second signal")

    def _end(self, why: str) -> None:
        """End this process and all that it started, from whatever thread."""
        assert self.stop is not None
        line = f"beit: {self.stop.name}: ended at once, {self.saved}: {why}\n"
        _say(line)
        kill_descendants()
        os._exit(of_signal(self.stop.number))

    def _wake(self, *, end: bool = False) -> None:
        os.write(self._write, bytes([_END if end else 0]))


_current: StopSignals | None = None


def current() -> StopSignals | None:
    """Those that are installed in this process."""
    return _current


@contextmanager
def handled(*, ends_process: bool) -> Iterator[None]:
    """Within it stop signals are ours, in the main thread; elsewhere nobody may say so.

    Within another one of these it changes nothing.
    """
    global _current
    outermost = _current is None and threading.current_thread() is threading.main_thread()
    if outermost:
        signals = StopSignals(ends_process=ends_process)
        signals.install()
        _current = signals
    try:
        yield
    except Interrupted as interruption:
        raise (interruption.end or KeyboardInterrupt()) from None
    finally:
        # a process that was asked to stop still has to end, whatever holds it
        if outermost and not (ends_process and signals.stop is not None):
            _current = None
            signals.restore()


def descendants() -> list[int]:
    """Processes that this one started, and theirs. Linux alone; none elsewhere."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat") if sys.platform == "linux" else ():
        try:
            # the name in brackets may hold anything
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill_descendants() -> None:
    """SIGKILL to all processes below this one."""
    for pid in descendants():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, line.encode())


_forked_by_main = False


def _before_fork() -> None:
    global _forked_by_main
    _forked_by_main = threading.current_thread() is threading.main_thread()


def _in_child() -> None:
    """A data worker: a signal to the whole group is its parent's business, whose end is its own."""
    global _current
    if _current is None:
        return
    signal.set_wakeup_fd(-1)
    _current = None
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    if _forked_by_main:  # the kernel means the thread that forked, not the process
        end_with_parent(signal.SIGKILL)


os.register_at_fork(before=_before_fork, after_in_child=_in_child)
