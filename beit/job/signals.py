"""Stop signals of this process: noted by a thread, and an end that comes in any case.

The kernel's signal is written to a pipe by Python itself, also while the main thread stands in a
collective and could run no handler. A thread reads the pipe; the handlers do nothing, except
where the main thread said that it may be interrupted.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any, NamedTuple

from beit.job.exits import of_signal
from beit.job.processes import end_with_parent, kill_descendants

# of two at once the later here counts: of the SIGUSR1 that slurm sends to all, torchrun's agent
# dies, and its ranks get a SIGTERM for that, too
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


class AtOnce(BaseException):
    """Raised in the main thread of another's program by a stop that does not wait.

    It leaves `handled` as a KeyboardInterrupt; of that Lightning would make an exit with code 1.
    """


class StopSignals:
    """The stop signals of this process from `install` to `restore`.

    Args:
        ends_process: whether this process is the run's own (the command line), and may be ended
            from the thread: when nothing has been trained yet, on a second signal, and when the
            boundary is not reached in time. In another's program (`beit.train`) the first two raise
            AtOnce instead, and there is no deadline.
    """

    def __init__(self, *, ends_process: bool) -> None:
        self.ends_process = ends_process
        self.stop: Stop | None = None
        self.seconds = 10.0  # beyond the step under way; see JobSettings.stop_seconds
        self.step_seconds: float | None = None  # None: nothing would be lost by ending at once
        self.interruptible = False
        self.saved = "without a checkpoint"  # what was, in the words of the last line
        self._deadline: float | None = None
        self._holds = 0
        self._parent = os.getppid()
        self._old: dict[int, Any] = {}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._arrivals = select.poll()  # `select` ends at the 1024th file of a process
        self._arrivals.register(self._read, select.POLLIN)
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
        """Within it no deadline ends the process: what a stop is there to save is being written."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if self.stop is not None and not self._holds:
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
        if not self.ends_process and (not self._first(number) or self.step_seconds is None):
            raise AtOnce
        if self.interruptible:
            self.interruptible = False
            self._first(number)
            raise Interrupted

    def _first(self, number: int) -> bool:
        """Whether it belongs to the first request to stop, which then is for the weightiest."""
        now, orphaned = time.monotonic(), self._orphaned()
        before = self.stop or Stop(number, now)
        if now - before.at > SAME_SIGNAL_SECONDS and not orphaned:
            return False
        self.stop = Stop(max(number, before.number, key=NUMBERS.index), before.at)
        return True

    def _orphaned(self) -> bool:
        """Whether the launcher has ended since it was last asked: the kernel tells by a signal."""
        before, self._parent = self._parent, os.getppid()
        return self._parent != before

    def _watch(self) -> None:
        while True:
            for number in self._arrived():
                if number == _END:
                    return
                if number in NUMBERS and self.ends_process:
                    self._note(number)
            late = self._deadline is not None and time.monotonic() >= self._deadline
            if late and not self._holds:
                self._end("the step or what follows it did not end in time")

    def _arrived(self) -> bytes:
        timeout = None
        if self._deadline is not None and not self._holds:
            timeout = 1000 * max(0.0, self._deadline - time.monotonic())
        return os.read(self._read, 64) if self._arrivals.poll(timeout) else b""

    def _note(self, number: int) -> None:
        if not self._first(number):
            self._end("this was the second signal")
        elif self.step_seconds is None:
            self._end("nothing has been trained yet")
        elif self._deadline is None:
            self._deadline = time.monotonic() + self.seconds + self.step_seconds

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


def held() -> AbstractContextManager[None]:
    """`StopSignals.held` of this process, if they are installed."""
    return _current.held() if _current is not None else nullcontext()


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
    except AtOnce:
        raise KeyboardInterrupt from None
    finally:
        # a process that was asked to stop still has to end, whatever holds it
        if outermost and not (ends_process and signals.stop is not None):
            _current = None
            signals.restore()


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
