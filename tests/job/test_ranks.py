"""Two processes that watch each other: whatever happens to one, both end and the cause is told."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from beit.errors import UserError
from beit.job.causes import Cause, is_follow_up, of_exception
from beit.job.exits import Exit, RunEnd
from beit.job.judge import Judge
from beit.job.processes import Process, end_with_parent_if_told, ended, name_to_children
from beit.job.ranks import RankWatch
from beit.job.settings import JobSettings

LIMIT, HEARTBEAT = 1.5, 0.1
SETTINGS = JobSettings(rank_timeout_seconds=LIMIT, heartbeat_seconds=HEARTBEAT)
Part = Callable[[RankWatch], Any]


# --- two processes


def job(folder: Path, first: Part, second: Part) -> tuple[list[int], str]:
    """Rank 0 does `first` and starts rank 1, which does `second`; exit codes, and what was said."""
    with (folder / "output").open("wb", buffering=0) as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            os._exit(_first(first, second, folder))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    other = Process(Process.this().machine, *map(int, (folder / "rank1").read_text().split()))
    deadline = time.monotonic() + 5.0
    while not other.is_gone and time.monotonic() < deadline:
        time.sleep(0.01)
    left = not other.is_gone
    other.kill()
    assert not left, "rank 1 was left behind"
    if (folder / "code1").exists():
        codes.append(int((folder / "code1").read_text()))
    return codes, (folder / "output").read_text()


def _first(first: Part, second: Part, folder: Path) -> int:
    # as a launcher does: rank 1 has the environment of rank 0, but no thread of it
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        os.environ |= json.loads(os.read(read, 4096))
        this = Process.this()
        (folder / "rank1").write_text(f"{this.pid} {this.started}")
        code = _watched(second, first=False)
        (folder / "code1").write_text(str(code))
        os._exit(code)

    def launch_and_work(watch: RankWatch) -> None:
        told = {name: os.environ[name] for name in ("BEIT_RANK_WATCH", "BEIT_PARENT")}
        os.write(write, json.dumps({**told, "LOCAL_RANK": "1"}).encode())
        first(watch)

    return _watched(launch_and_work, first=True)


def _watched(part: Part, *, first: bool) -> int:
    """`part` once both ranks know of each other; as an exit code."""
    watch = RankWatch(SETTINGS, world_size=2, first=first)
    try:
        with watch:
            part(watch)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - a forked process must not go on as pytest
        return 99
    return 0


def together(watch: RankWatch) -> None:
    """Wait until both ranks know of each other."""
    member = watch._member
    assert member is not None
    deadline = time.monotonic() + 20.0
    while member.is_alone and time.monotonic() < deadline:
        time.sleep(0.01)
    strategy = SimpleNamespace(broadcast=lambda told: told)
    watch.setup(SimpleNamespace(strategy=strategy), None, "fit")  # type: ignore[arg-type]


def work(watch: RankWatch, seconds: float = 30.0) -> None:
    """The main thread waits in a collective."""
    together(watch)
    time.sleep(seconds)


def send_self(number: int) -> Part:
    def part(watch: RankWatch) -> None:
        together(watch)
        time.sleep(0.3)  # the other one too
        os.kill(os.getpid(), number)
        time.sleep(30.0)

    return part


def throw(error: BaseException, after: float = 0.3) -> Part:
    def part(watch: RankWatch) -> None:
        together(watch)
        time.sleep(after)
        raise error

    return part


@pytest.mark.parametrize(
    ("first", "second", "code", "words"),
    [
        (work, send_self(signal.SIGKILL), 4, "rank 1{}: its process is gone without a word"),
        (send_self(signal.SIGKILL), work, -9, "rank 0{} gone without a word"),
        (work, send_self(signal.SIGSTOP), 4, "rank 1{}: stopped, silent for"),
        (send_self(signal.SIGSTOP), work, -9, "rank 0{}: stopped, silent for"),
        (work, throw(ValueError("planted")), 1, "rank 1{}: ValueError: planted"),
        (throw(ValueError("planted")), work, 1, "rank 0{}: ValueError: planted"),
        (work, throw(UserError("planted")), 2, "beit: error: rank 1: planted"),
        (
            throw(RuntimeError("[gloo/tcp/pair.cc:553] Connection closed by peer"), after=0.1),
            throw(ValueError("planted"), after=1.0),
            1,
            "rank 1{}: ValueError: planted",
        ),
    ],
    ids=["kill1", "kill0", "stop1", "stop0", "raise1", "raise0", "mistake1", "follow-up"],
)
def test_both_end_and_the_first_cause_is_said_last(
    first: Part, second: Part, code: int, words: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    codes, said = job(tmp_path, first, second)
    assert time.monotonic() - began < LIMIT + 8.0
    assert codes[0] == code
    last = said.splitlines()[-1]
    assert last.startswith("beit: ")
    for part in words.split("{}"):
        assert part in last, said
    if code not in (2, 4):
        assert "Traceback" in said or code == -9


def test_a_job_that_ends_well_says_nothing(tmp_path: Path) -> None:
    codes, said = job(tmp_path, lambda watch: work(watch, 1.8), together)
    assert codes == [0, 0]
    assert said == ""


def test_an_agreed_stop_leaves_as_it_came(tmp_path: Path) -> None:
    codes, said = job(tmp_path, throw(SystemExit(143)), throw(SystemExit(143)))
    assert codes == [143, 143]
    assert said == ""


def test_a_main_thread_that_hangs_is_named_with_its_place(tmp_path: Path) -> None:
    def step(watch: RankWatch, further: bool) -> None:
        together(watch)
        watch._warm["train"] = True
        watch.on_train_batch_start()
        if further:
            watch.on_before_backward()
        time.sleep(30.0)

    codes, said = job(tmp_path, lambda w: step(w, True), lambda w: step(w, False))
    assert codes[0] == 4
    assert "hangs: no progress for" in said
    assert "time.sleep(30.0)" in said


def test_a_data_worker_does_not_hide_the_end_of_its_rank(tmp_path: Path) -> None:
    def with_worker(watch: RankWatch) -> None:
        together(watch)
        if os.fork() == 0:
            time.sleep(8.0)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    _, said = job(tmp_path, work, with_worker)
    assert "rank 1" in said
    assert "gone without a word" in said
    assert time.monotonic() - began < 6.0


def test_a_mistake_before_the_ranks_know_of_each_other_is_told(tmp_path: Path) -> None:
    """Rank 0 would wait for the other one to come until the process group's timeout."""

    def mistaken(watch: RankWatch) -> None:
        raise UserError("planted")

    codes, said = job(tmp_path, lambda watch: time.sleep(30.0), mistaken)
    assert codes[0] == 2
    assert said.splitlines()[-1] == "beit: error: rank 1: planted"


def test_one_process_has_no_thread_and_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(socket, "socket", refuse)
    before = threading.enumerate()
    with RankWatch(SETTINGS, world_size=1, first=True) as watch:
        watch.on_train_batch_start()
        assert threading.enumerate() == before


def test_ranks_cannot_be_started_from_a_program_without_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`python -c`, a notebook: Lightning would start `python -c` without the program."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    before = threading.enumerate()
    with pytest.raises(UserError, match="put the program into a file"):
        RankWatch(SETTINGS, world_size=2, first=True).__enter__()
    assert threading.enumerate() == before
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has started them
    with RankWatch(SETTINGS, world_size=2, first=True):
        pass


def test_on_another_machine_the_ranks_end_with_the_one_that_started_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    with RankWatch(SETTINGS, world_size=6, first=False, num_nodes=2) as watch:
        assert os.environ["BEIT_PARENT"] == f"{os.getpid()}:{int(signal.SIGKILL)}"
        assert "BEIT_RANK_WATCH" not in os.environ
        member = watch._member
    assert "BEIT_PARENT" not in os.environ
    assert member is not None
    member.children = lambda: [SimpleNamespace(poll=lambda: -9)]  # type: ignore[list-item]
    member._watch_children()
    assert member._cause is not None
    assert (member._cause.rank, member._cause.what) == (4, "killed by SIGKILL")


def test_lightnings_own_watch_over_children_steps_back(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    observer = _ChildProcessObserver(os.getpid(), [child], sleep_period=1)
    observer.start()
    watch = RankWatch(SETTINGS, world_size=2, first=True)
    assert watch._children() == [child]
    observer.join(10.0)  # it would have killed this process
    assert not observer.is_alive()


# --- the judgement


class Clock:
    """Ranks of which each says what it is told to; time passes by hand."""

    def __init__(self, ranks: int) -> None:
        self.judge, self.now = Judge(limit=60.0, heartbeat=1.0), 0.0
        for rank in range(ranks):
            self.judge.registered(rank, replace(Process.this(), pid=0), f"host{rank}", 0.0)

    def pass_time(self, seconds: int, places: dict[int, tuple[int, bool]]) -> Cause | None:
        """Each second those ranks say where they are: (ticks, inside a step)."""
        for _ in range(seconds):
            self.now += 1.0
            for rank, (ticks, in_step) in places.items():
                self.judge.beat(rank, self.now, ticks=ticks, in_step=in_step)
            cause = self.judge.verdict(self.now)
            if cause is not None:
                return cause
        return None


def error(rank: int, what: str = "ValueError: x", follow_up: bool = False) -> Cause:
    return Cause(rank, 1, what, follow_up=follow_up)


def test_the_one_who_is_behind_in_a_step_hangs() -> None:
    clock = Clock(3)
    assert clock.pass_time(60, {0: (8, True), 1: (7, True), 2: (8, True)}) is None
    cause = clock.pass_time(5, {0: (8, True), 1: (7, True), 2: (8, True)})
    assert cause is not None
    assert (cause.rank, cause.code) == (1, Exit.LOST)
    assert "hangs" in cause.what


@pytest.mark.parametrize(
    "places",
    [
        {0: (8, True), 1: (7, False)},  # saving, or the first step
        {0: (7, True), 1: (7, True)},  # all in the same place: the process group's timeout
    ],
)
def test_a_long_phase_is_not_taken_for_a_hang(places: dict[int, tuple[int, bool]]) -> None:
    assert Clock(2).pass_time(1000, places) is None


def test_a_slow_step_is_not_taken_for_a_hang() -> None:
    clock = Clock(2)
    for ticks in range(0, 20, 2):  # each tick takes 50 s on rank 1, and rank 0 waits
        assert clock.pass_time(50, {0: (ticks + 2, True), 1: (ticks, True)}) is None


def test_at_the_same_place_the_one_outside_the_collective_hangs() -> None:
    clock = Clock(2)
    for second in range(70):
        for rank, waits in ((0, True), (1, False)):
            clock.judge.beat(rank, second, ticks=7, in_step=True, waits=waits)
    cause = clock.judge.verdict(70.0)
    assert cause is not None
    assert cause.rank == 1


def test_silence_counts_from_the_last_word_and_not_while_the_judge_was_stopped() -> None:
    clock = Clock(2)
    clock.pass_time(10, {0: (1, True), 1: (1, True)})
    assert clock.pass_time(50, {0: (1, False)}) is None
    clock.judge.paused(100.0)
    clock.now += 100.0
    assert clock.pass_time(10, {0: (1, False)}) is None
    cause = clock.pass_time(1, {0: (1, False)})
    assert cause is not None
    assert (cause.rank, cause.what) == (1, "silent for 61 s")


@pytest.mark.parametrize("found", ["lost", "raised", "silent", "left", "nothing"])
def test_what_follows_from_another_ranks_end_is_not_the_cause(found: str) -> None:
    clock = Clock(2)
    everyone = {0: (1, False), 1: (1, False)}
    heard = {0: (1, False)} if found == "silent" else everyone
    clock.pass_time(5, everyone)
    clock.pass_time(5, heard)
    clock.judge.raised(error(0, "RuntimeError: Connection closed by peer", follow_up=True), 10.0)
    assert clock.pass_time(2, heard) is None
    if found == "lost":
        clock.judge.lost(1, clock.now)
    elif found == "raised":
        clock.judge.raised(error(1), clock.now)
    elif found == "left":
        clock.judge.left(1, 143)
    cause = clock.pass_time(10, heard)
    assert cause is not None
    assert cause.rank == (0 if found == "nothing" else 1)
    assert cause.code == {"raised": 1, "nothing": 1, "left": 143}.get(found, Exit.LOST)


@pytest.mark.parametrize(
    ("returncode", "code", "what"),
    [
        (-9, 4, "killed by SIGKILL"),
        (2, 2, "ended with exit code 2"),
        (143, 143, "ended with exit code 143"),
        (77, 4, "ended with exit code 77"),
        (0, 4, "ended with exit code 0"),
    ],
)
def test_a_child_that_ended_before_it_registered(returncode: int, code: int, what: str) -> None:
    clock = Clock(1)
    clock.judge.ended(1, returncode, 0.0)
    cause = clock.pass_time(2, {0: (0, False)})
    assert cause is not None
    assert (cause.rank, cause.code, cause.what) == (1, code, what)


def test_who_took_leave_is_not_missed() -> None:
    clock = Clock(2)
    clock.judge.left(1, 0)
    clock.judge.lost(1, 1.0)
    clock.judge.ended(1, 0, 1.0)
    assert clock.pass_time(1000, {0: (1, False)}) is None


# --- the parts


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), False),
        (ValueError("Connection closed by peer"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),
    ],
)
def test_errors_of_collectives_are_told_from_others(raised: Exception, expected: bool) -> None:
    assert is_follow_up(raised) is expected


def test_a_program_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        name_to_children(signal.SIGKILL)
        if os.fork() == 0:
            end_with_parent_if_told()
            this = Process.this()
            (tmp_path / "child").write_text(f"{this.pid} {this.started}")
            (tmp_path / "ready").touch()
            time.sleep(30.0)
            os._exit(0)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    child = Process(Process.this().machine, *map(int, (tmp_path / "child").read_text().split()))
    deadline = time.monotonic() + 5.0
    while not child.is_gone:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_is_not_taken_for_a_later_one_of_its_number() -> None:
    this = Process.this()
    assert this.state == "R"
    assert not this.is_gone
    assert replace(this, started=this.started - 1).is_gone
    replace(this, started=this.started - 1).kill()  # not us
    elsewhere = replace(this, machine="another")
    assert not elsewhere.is_here
    assert not elsewhere.is_gone
    elsewhere.kill()


def test_return_codes_in_words() -> None:
    assert [ended(code) for code in (3, -11)] == ["ended with exit code 3", "killed by SIGSEGV"]


def test_the_block_of_a_cause() -> None:
    cause = Cause(3, 4, "killed by SIGKILL", step=7, epoch=1, host="node2", pid=12)
    last = "rank 3 (host node2, pid 12), step 7, epoch 1: killed by SIGKILL\n"
    assert cause.block() == f"beit: the job ends, exit code 4: {last}"
    assert replace(cause, detail="a\nb").block().splitlines()[:-1] == [
        "beit: first cause: rank 3 (host node2, pid 12):",
        "    a",
        "    b",
    ]


def test_what_a_data_worker_raised_is_told_in_one_line() -> None:
    caught = ValueError("Caught ValueError in worker 0.\nTraceback:\n  a\nValueError: planted")
    cause = of_exception(caught, rank=1, pid=7, step=3, epoch=0)
    assert cause.what == "ValueError: Caught ValueError in worker 0. ... ValueError: planted"


def test_a_runs_own_end_keeps_its_code() -> None:
    from beit.job.causes import code_of

    class NotFinite(RunEnd):
        code = Exit.NOT_FINITE

    assert code_of(NotFinite("x")) == 3
    assert [code_of(SystemExit(c)) for c in (0, None, 5, "text")] == [0, 0, 5, 1]
    assert code_of(KeyboardInterrupt()) == 130


@pytest.mark.parametrize("limit", [3.0, float("nan"), 0.0])
def test_a_limit_below_some_heartbeats_is_refused(limit: float) -> None:
    with pytest.raises(UserError, match="rank_timeout_seconds"):
        JobSettings(rank_timeout_seconds=limit)
