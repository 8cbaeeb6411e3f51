"""Stop signals of real processes: each test forks one and sends it some."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beit.job import signals
from beit.job.processes import end_with_parent
from beit.job.signals import Interrupted, StopSignals, handled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
Body = Callable[[StopSignals], None]


class Child:
    """A forked process that has its stop signals handled while it does `body`."""

    def __init__(self, body: Body, *, ends_process: bool = True) -> None:
        read, self._write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(_run(body, ends_process, self._write))
        os.close(self._write)
        os.read(read, 1)  # it is ready
        self.started = time.monotonic()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, float]:
        """(exit code, seconds since it was ready)."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), time.monotonic() - self.started


def _run(body: Body, ends_process: bool, ready: int) -> int:
    try:
        with handled(ends_process=ends_process):
            own = signals.current()
            own.ready = lambda: os.write(ready, b".")
            body(own)
    except KeyboardInterrupt:
        return 7
    return 0


def _goes(pid: int) -> bool:
    """Whether a process is gone within two seconds; a zombie has no working directory."""
    deadline = time.monotonic() + 2.0
    while Path(f"/proc/{pid}/cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}/cwd").exists()


def _train(seconds: float, *, step: float = 0.2) -> Body:
    """Waits for a stop as training does, then for so many seconds."""

    def body(own: StopSignals) -> None:
        own.may_take(step)
        own.seconds = 0.3
        own.ready()
        while own.stop is None:
            time.sleep(0.01)
        time.sleep(seconds)

    return body


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_before_training_the_end_is_at_once_and_takes_all_along(tmp_path, number) -> None:
    def body(own: StopSignals) -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        own.ready()
        time.sleep(60)

    child = Child(body)
    child.send(number)
    code, seconds = child.end()
    assert code == 128 + number
    assert seconds < 1.0
    assert _goes(int((tmp_path / "pid").read_text()))


def test_in_training_it_is_only_noted() -> None:
    child = Child(_train(0.0))
    child.send(signal.SIGTERM)
    assert child.end()[0] == 0


def test_past_the_deadline_the_process_is_ended_wherever_it_stands() -> None:
    child = Child(_train(60))
    child.send(signal.SIGUSR1)
    code, seconds = child.end()
    assert code == 138
    assert 0.45 < seconds < 1.5  # 0.3, and a step of 0.2


def test_a_main_thread_that_never_comes_back_is_no_obstacle() -> None:
    def body(own: StopSignals) -> None:
        own.may_take(0.2)
        own.seconds = 0.3
        # as in a collective: the signal arrives, and no handler of Python's runs
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
        own.ready()
        time.sleep(60)

    child = Child(body)
    child.send(signal.SIGTERM)
    code, seconds = child.end()
    assert code == 143
    assert seconds < 1.5


def test_a_second_signal_ends_at_once_but_not_the_echo_of_the_first() -> None:
    child = Child(_train(60, step=50))
    for _ in range(3):
        child.send(signal.SIGINT)
        time.sleep(0.2)
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
    time.sleep(0.6)
    child.send(signal.SIGTERM)
    code, seconds = child.end()
    assert code == 130  # of the first
    assert seconds < 3.0


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGTERM, signal.SIGUSR1), 138),  # torchrun's agent died of it
        ((signal.SIGUSR1, signal.SIGTERM), 138),
        ((signal.SIGTERM, signal.SIGINT), 130),
    ],
)
def test_what_a_launcher_makes_of_a_signal_counts_for_less(numbers: list[int], code: int) -> None:
    child = Child(_train(60))
    for number in numbers:
        child.send(number)
        time.sleep(0.1)
    assert child.end()[0] == code


def test_the_end_of_the_launcher_is_no_second_signal(tmp_path) -> None:
    """Torchrun's agent dies of SIGUSR1; a loaded machine takes its time for that."""

    def body(own: StopSignals) -> None:
        end_with_parent(signal.SIGTERM)
        own.may_take(50)
        (tmp_path / "pid").write_text(str(os.getpid()))
        own.ready()
        while own.stop is None:
            time.sleep(0.01)
        time.sleep(2.5)
        (tmp_path / "saved").touch()

    launcher = os.fork()
    if launcher == 0:
        Child(body)
        (tmp_path / "ready").touch()
        time.sleep(60)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    rank = int((tmp_path / "pid").read_text())
    os.kill(rank, signal.SIGUSR1)
    time.sleep(1.5)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    deadline = time.monotonic() + 5.0
    while Path(f"/proc/{rank}/cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "saved").exists()


def test_a_checkpoint_that_is_being_written_is_waited_for() -> None:
    def body(own: StopSignals) -> None:
        _train(0.0)(own)
        with own.held():
            time.sleep(1.0)

    child = Child(body)
    child.send(signal.SIGTERM)
    code, seconds = child.end()
    assert code == 0
    assert seconds > 1.0


def test_waiting_may_be_interrupted_where_it_is_said() -> None:
    def body(own: StopSignals) -> None:
        own.may_take(50)
        try:
            with own.may_interrupt():
                own.ready()
                time.sleep(60)
        except Interrupted:
            os._exit(9)

    child = Child(body)
    child.send(signal.SIGTERM)
    code, seconds = child.end()
    assert code == 9
    assert seconds < 1.0


def test_in_anothers_program_the_second_is_a_keyboard_interrupt() -> None:
    child = Child(_train(60), ends_process=False)
    child.send(signal.SIGTERM)
    time.sleep(1.2)
    child.send(signal.SIGTERM)
    assert child.end()[0] == 7


def test_data_workers_ignore_the_group_and_end_with_their_parent(tmp_path) -> None:
    def body(own: StopSignals) -> None:
        own.may_take(50)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch's workers have their own
            (tmp_path / "pid").write_text(str(os.getpid()))
            own.ready()
            time.sleep(60)
        time.sleep(60)

    child = Child(body)
    worker = int((tmp_path / "pid").read_text())
    for number in signals.NUMBERS:
        os.kill(worker, number)
    time.sleep(0.1)
    assert Path(f"/proc/{worker}/cwd").exists()
    child.send(signal.SIGKILL)
    child.end()
    assert _goes(worker)


def test_the_handlers_that_were_there_come_back() -> None:
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    with handled(ends_process=False):
        assert signals.current() is not None
        with handled(ends_process=True):  # within another it changes nothing
            assert not signals.current().ends_process
        assert signals.current() is not None
    assert signals.current() is None
    assert {number: signal.getsignal(number) for number in signals.NUMBERS} == before
    wakeup = signal.set_wakeup_fd(-1)
    assert wakeup == -1
