"""Two ranks of which one is killed, stopped, hangs, raises or is cut off: both end, and say why."""

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
from lightning.pytorch.strategies.launchers import subprocess_script as launcher
from lightning.pytorch.utilities import rank_zero_only

from beit import cli, runner
from beit.data.dataset import KeyedDataset
from beit.job import processes
from beit.job.member import UNWIND
from scripts.faults.forked import free_port
from scripts.faults.tiny import add_callbacks, make_images, tiny_config

ROW = "one of two ranks is killed, stopped, hangs, raises or is cut off"
TRIALS = 32
SHARE = 1

LIMIT = 5.0  # job.rank_timeout_seconds of the trials
_START = 60.0  # a machine under load needs long to begin
_PLACE = 1, 1  # epoch, micro-batch
_SUBREAPER = 36  # linux/prctl.h: orphans become ours, so that they can be counted


@dataclass(frozen=True)
class Trial:
    """One fault: `fault` on `rank` of a job that `starter` (launcher | torchrun) started."""

    fault: str
    rank: int
    starter: str

    def __str__(self) -> str:
        return f"{self.fault} on rank {self.rank} under {self.starter}"


@dataclass(frozen=True)
class Expected:
    """How the job must end: exit code, and words of the last block."""

    code: int
    words: str
    within: float  # seconds after the fault


_SOON = 5.0 + UNWIND
EXPECTED = {
    "SIGKILL": Expected(4, "killed", _SOON),
    "SIGSTOP": Expected(4, "silent for", LIMIT + _SOON),
    "hang": Expected(4, "hangs: no progress", LIMIT + _SOON),
    "raise": Expected(1, "ValueError: planted", _SOON),
    "raise in a data worker": Expected(1, "planted", _SOON),
    "raise in validation": Expected(1, "ValueError: planted", _SOON),
    "raise while rank 0 saves": Expected(1, "ValueError: planted", _SOON),
    "mistake in the input": Expected(2, "planted", _SOON),
    "mistake before they meet": Expected(2, "planted", _SOON),
    "cut network": Expected(4, "silent for", LIMIT + _SOON),
}


def all_trials() -> list[Trial]:
    """Every fault on each rank under each starter, as far as that can be."""
    found = []
    for fault in EXPECTED:
        for rank in (0, 1):
            for starter in ("launcher", "torchrun"):
                if fault == "cut network" and not Network.is_possible():
                    continue
                if fault == "cut network" and (starter == "launcher" or rank == 0):
                    continue  # there are two sides to a cut, both looked at in one trial
                if fault == "mistake before they meet" and (starter == "torchrun" or rank == 0):
                    continue  # torchrun's agent looks after that, and a launcher that never starts
                if fault == "raise while rank 0 saves" and rank == 0:
                    continue
                found.append(Trial(fault, rank, starter))
    return found


class Fault(L.Callback):
    """What happens to this process, at one place of the run; the time of it in `file`."""

    def __init__(self, fault: str, file: Path, cut: Callable[[], None]) -> None:
        self.fault = fault
        self.file = file
        self.cut = cut

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        place = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
        if place != _PLACE:
            return
        if self.fault in ("SIGKILL", "SIGSTOP"):
            self._note()
            os.kill(os.getpid(), getattr(signal, self.fault))
        elif self.fault == "hang":
            self._note()
            time.sleep(10_000)
        elif self.fault == "raise":
            self._note()
            raise ValueError("planted")
        elif self.fault == "mistake in the input":
            self._note()
            raise runner.UserError("planted")
        elif self.fault == "cut network":
            self._note()
            self.cut()

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.fault == "raise in validation":
            self._note()
            raise ValueError("planted")

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        if self.fault == "raise while rank 0 saves":
            if trainer.global_rank == 0:
                time.sleep(30.0)
            self._note()
            raise ValueError("planted")

    def _note(self) -> None:
        self.file.write_text(str(time.time()))


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """(passed, tried, detail) of so many trials, several at a time."""
    chosen = all_trials()
    if trials < len(chosen):
        chosen = random.Random(seed).sample(chosen[:4], trials)
    chosen = [chosen[number % len(chosen)] for number in range(trials)]
    make_images(folder / "images")
    passed, slowest, wrong = 0, 0.0, []
    while chosen:
        batch, chosen = chosen[:4], chosen[4:]
        jobs = [Job(trial, folder, number) for number, trial in enumerate(batch, start=len(chosen))]
        with ThreadPoolExecutor(len(jobs)) as threads:
            complaints = list(threads.map(Job.judge, jobs))
        for job, complaint in zip(jobs, complaints, strict=True):
            slowest = max(slowest, job.seconds)
            passed += not complaint
            if complaint:
                wrong.append(f"{job.trial}: {complaint}")
    skipped = "" if Network.is_possible() else "; cut network skipped: needs root and ip"
    detail = f"all gone at most {slowest:.1f} s after the fault (limit {LIMIT:.0f} s){skipped}"
    return passed, trials, "; ".join([*wrong, detail])


def control(folder: Path, seed: int) -> bool:
    """Without the watch a stopped rank leaves the other one waiting."""
    make_images(folder / "images")
    job = Job(Trial("SIGSTOP", 1, "torchrun"), folder, 0, watched=False, patience=LIMIT)
    return "processes left" in job.judge()


class Job:
    """Two processes of one trial, forked from this one; `judge` waits for their end."""

    def __init__(
        self,
        trial: Trial,
        folder: Path,
        number: int,
        *,
        watched: bool = True,
        patience: float | None = None,
    ) -> None:
        self.trial = trial
        self.seconds = 0.0
        self._expected = EXPECTED[trial.fault]
        self._patience = patience or self._expected.within
        self.folder = folder / f"{os.getpid()}-{time.monotonic_ns()}-{number}"
        self.folder.mkdir(parents=True)
        (self.folder / "images").symlink_to(folder / "images")
        self._output = (self.folder / "output").open("wb", buffering=0)
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        self._network = Network() if trial.fault == "cut network" else None
        address = self._network.address if self._network else "127.0.0.1"
        shared = {"MASTER_ADDR": address, "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        if trial.starter == "torchrun":
            shared |= {"TORCHELASTIC_RUN_ID": "faults", "TORCHELASTIC_USE_AGENT_STORE": "False"}
            shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
            environments = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in (0, 1)]
            if self._network:  # a machine for each
                shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "veth"}
                environments = [{**shared, "RANK": r, "GROUP_RANK": r} for r in "01"]
            started = [self._start(watched, environment) for environment in environments]
        else:
            started = [self._start(watched, {"MASTER_PORT": shared["MASTER_PORT"]}, launches=True)]
        self.pids = dict(enumerate(started))

    def _start(self, watched: bool, environment: dict[str, str], *, launches: bool = False) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        for target in (1, 2):
            os.dup2(self._output.fileno(), target)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if launches:
            _launch_from(lambda: self._train(watched))
        os.environ.update(environment)
        rank = rank_zero_only.rank = int(environment.get("RANK", 0))
        if self._network:
            self._network.enter(rank)
            processes._machine = lambda: f"machine {rank}"
        os._exit(self._train(watched))

    def _train(self, watched: bool) -> int:
        rank = rank_zero_only.rank
        fault = self.trial.fault
        mine = rank == self.trial.rank or fault == "raise while rank 0 saves"
        words = [f"job.rank_timeout_seconds={LIMIT}", "job.heartbeat_seconds=0.5"]
        if self._network:
            words += ["trainer.devices=1", "trainer.num_nodes=2"]
        cfg = tiny_config(self.folder, ranks=2, per_device=6, workers=1, words=words)
        if fault == "raise in a data worker" and mine:
            _break_worker(self.folder / "when")
        if fault == "mistake before they meet" and mine:
            (self.folder / "when").write_text(str(time.time()))
            time.sleep(0.5)
            cfg.init_from = "planted"
        if mine:
            add_callbacks(Fault(fault, self.folder / "when", self._cut), at=1)
        if not watched:
            runner.RankWatch = Unwatched
        return _exit_code(cfg)

    def _cut(self) -> None:
        assert self._network
        self._network.cut()

    def judge(self) -> str:
        """Empty, or what was not as it must be; nothing of the job is left afterwards."""
        try:
            return self._judge()
        finally:
            for pid in self._left():
                os.kill(pid, signal.SIGKILL)
            for pid in list(self.pids.values()):
                _code(pid)
            self._output.close()
            if self._network:
                self._network.remove()

    def _judge(self) -> str:
        when = self._when()
        if when is None:
            return f"the fault never came: {self._tail()}"
        while self._left() and time.time() - when < self._patience:
            time.sleep(0.02)
        self.seconds = time.time() - when
        left = self._left()
        if left:
            return f"{len(left)} processes left after {self.seconds:.0f} s"
        codes = {rank: _code(pid) for rank, pid in self.pids.items()}
        self.pids = {}
        allowed = {rank: {self._expected.code} for rank in codes}
        if self.trial.fault in ("SIGKILL", "SIGSTOP", "hang", "cut network"):
            allowed.setdefault(self.trial.rank, set()).add(-signal.SIGKILL)
        wrong = {rank: code for rank, code in codes.items() if code not in allowed[rank]}
        if wrong:
            return f"exit codes {wrong}: {self._tail()}"
        return self._wrong_words()

    def _wrong_words(self) -> str:
        last = self._tail().rstrip().rpartition("\n")[2]
        named = f"rank {self.trial.rank}" in last or self._network is not None
        return "" if named and self._expected.words in last else f"said last: {self._tail()}"

    def _when(self) -> float | None:
        """When the fault came."""
        deadline = time.time() + _START
        while time.time() < deadline:
            text = (self.folder / "when").read_text() if (self.folder / "when").exists() else ""
            if text:
                return float(text)
            if not self._left():
                return None
            time.sleep(0.02)
        return None

    def _left(self) -> list[int]:
        """Processes of this job that live; they are told by their output."""
        return [pid for pid in processes.descendants() if _writes_to(pid, self.folder / "output")]

    def _tail(self) -> str:
        return (self.folder / "output").read_text(errors="replace")[-3000:]


class Network:
    """Two machines as far as the network goes: namespaces with a cable between them."""

    address = "10.213.7.1"

    def __init__(self) -> None:
        self._names = [f"beit-{os.getpid()}-{side}" for side in "ab"]
        self.remove()
        one, other = self._names
        for name in self._names:
            _ip(f"netns add {name}")
            _ip(f"-n {name} link set lo up")
        _ip(f"link add veth netns {one} type veth peer name veth netns {other}")
        for name, address in ((one, self.address), (other, "10.213.7.2")):
            _ip(f"-n {name} addr add {address}/24 dev veth")
            _ip(f"-n {name} link set veth up")

    def enter(self, side: int) -> None:
        """This process is on that side from now on."""
        with open(f"/run/netns/{self._names[side]}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        _ip(f"-n {self._names[0]} addr del {self.address}/24 dev veth")

    def remove(self) -> None:
        """Take it down, what an earlier one left too."""
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    @staticmethod
    def is_possible() -> bool:
        """Whether this user may make one."""
        return os.geteuid() == 0 and shutil.which("ip") is not None


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


class Unwatched(runner.RankWatch):
    """The watch put away."""

    def __enter__(self) -> "Unwatched":
        return self


def _exit_code(cfg: Any) -> int:
    """As the command line's."""
    try:
        runner.fit(cfg)
    except runner.UserError as error:
        return cli._refuse(error)
    except BaseException:  # noqa: BLE001 - this process must not go on as its parent
        traceback.print_exc()
        return 1
    return 0


def _break_worker(file: Path) -> None:
    """From now on a data worker of this process raises at its 20th sample."""
    get, calls = KeyedDataset.__getitem__, []

    def get_or_raise(self: KeyedDataset, key: Any) -> Any:
        calls.append(key)
        if len(calls) == 20:
            file.write_text(str(time.time()))
            raise ValueError("planted")
        return get(self, key)

    KeyedDataset.__getitem__ = get_or_raise  # type: ignore[method-assign]


class Forked:
    """What Lightning's launcher takes for the process it started: one that was waiting for it."""

    def __init__(self, function: Callable[[], int]) -> None:
        self.returncode: int | None = None
        read, self._write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._write)
            with os.fdopen(read) as file:
                text = file.read()
            if not text:
                os._exit(0)
            os.environ.update(json.loads(text))
            rank_zero_only.rank = int(os.environ["LOCAL_RANK"])
            os._exit(function())
        os.close(read)

    def begin(self, environment: dict[str, str]) -> "Forked":
        os.write(self._write, json.dumps(environment).encode())
        os.close(self._write)
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self.pid, 0
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _launch_from(function: Callable[[], int]) -> None:
    """Have Lightning's launcher start its second rank by a fork of this process as it is now."""
    waiting = Forked(function)

    def start(command: Any, env: dict[str, str], cwd: Any) -> Forked:
        return waiting.begin(env)

    launcher.subprocess = SimpleNamespace(Popen=start)  # type: ignore[assignment]


def _writes_to(pid: int, file: Path) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/2") == str(file)
    except OSError:
        return False


def _code(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0
