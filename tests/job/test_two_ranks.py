"""Two ranks below torchrun's own agent, forked instead of started anew: what both must agree on."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from beit.checkpoints import keeper
from beit.console import log_to_console
from beit.job import signals
from beit.job.exits import RunEnd

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.faults.forked import Child, free_port, run_ranks, start_forked
from scripts.faults.signals import session
from scripts.faults.tiny import Kill, add_callbacks, final, make_images, tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]
PAIR = {"task": "classification", "ranks": 2, "per_device": 6}


class Linger(L.Callback):
    """Steps that take long enough to be met, and where each rank is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        (self.folder / f"rank{trainer.global_rank}").write_text(str(os.getpid()))
        time.sleep(0.05)


def agent(folder: Path, backend: str, restarts: int, *added: L.Callback, **settings: Any) -> int:
    """As `torchrun --nproc-per-node=2 --max-restarts=...`; exit code as torchrun's."""

    def rank() -> None:
        rank_zero_only.rank = int(os.environ["RANK"])
        first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        add_callbacks(*(one for one in added if first_start or not isinstance(one, Kill)))
        with signals.handled(ends_process=True):
            try:
                tiny_run(folder, resume="auto", **PAIR, **settings)
            except RunEnd as end:
                raise SystemExit(int(end.code)) from end

    log_to_console()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=restarts,
        run_id="test",
        rdzv_backend=backend,
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0, "timeout": 60} if backend == "static" else {"is_host": True},
        start_method="fork",
        monitor_interval=0.05,
    )
    try:
        elastic_launch(config, rank)()
    except ChildFailedError as error:
        print(error)
        return 1
    return 0


class OnRankOne(Kill):
    """SIGKILL to rank 1 alone."""

    def _maybe(self, trainer: L.Trainer, where: str) -> None:
        if trainer.global_rank == 1:
            super()._maybe(trainer, where)


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_torchrun_restarts_a_job_after_the_loss_of_a_rank(tmp_path: Path, backend: str) -> None:
    """`static` is torchrun with --master-addr and --master-port, `c10d` with --standalone."""
    make_images(tmp_path / "images")
    killed = OnRankOne(1, 0, "start")
    child = start_forked(agent, tmp_path, backend, 2, killed, epochs=2, save_every=1)
    outcome = child.wait(120.0)
    assert outcome.returncode == 0, outcome.output[-3000:]
    assert outcome.output.count("resuming from") == 1, outcome.output[-3000:]
    end = final(tmp_path)
    assert end is not None
    assert end["step"] == 6


@pytest.mark.parametrize(
    ("target", "code", "stop"),
    [
        ("rank 1", 1, r"SIGUSR1 \(rank 1\)"),  # torchrun's own for any failure; it tells the 138
        ("agent", -signal.SIGUSR1, r"SIGTERM \(rank .\)"),  # it ends without a word: 138 in a shell
        ("all", -signal.SIGUSR1, r"SIGUSR1 \(rank .\)"),  # as slurm sends it, with both
    ],
)
def test_sigusr1_below_torchrun(tmp_path: Path, target: str, code: int, stop: str) -> None:
    make_images(tmp_path / "images")
    child = start_forked(agent, tmp_path, "c10d", 0, Linger(tmp_path), epochs=300, save_every=0)
    _await(tmp_path / "rank1", child)
    _await(tmp_path / "rank0", child)
    if target == "all":
        child.send_all(signal.SIGUSR1)
    else:
        pid = int((tmp_path / "rank1").read_text()) if target == "rank 1" else child.pid
        os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + 60.0
    while set(session(child.pid)) - {child.pid} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(session(child.pid)) - {child.pid}
    outcome = child.wait(30.0)
    assert outcome.returncode == code, outcome.output[-3000:]
    saved = re.search(rf"stopped by {stop} after step \d+: checkpoint (\S+);", outcome.output)
    assert saved, outcome.output[-3000:]
    assert Path(saved[1]).exists()
    if target == "rank 1":
        assert re.search(r"exitcode\s+: 138", outcome.output)


def _await(file: Path, child: Child) -> None:
    deadline = time.monotonic() + 120.0
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        assert Path(f"/proc/{child.pid}/cwd").exists()  # no zombie
        time.sleep(0.02)
    time.sleep(0.3)  # into the training


def test_the_minutes_of_rank_0_are_every_ranks(tmp_path: Path) -> None:
    """Each rank has a clock: by their own they would part, one to save and one to train."""

    def rank() -> None:
        times = iter(range(0, 10_000, 31))
        first = os.environ["RANK"] == "0"
        clock = SimpleNamespace(monotonic=lambda: float(next(times)) if first else 0.0)
        keeper.time = clock  # type: ignore[attr-defined]
        words = ["callbacks.checkpoints.every_minutes=1", "callbacks.checkpoints.keep=-1"]
        tiny_run(tmp_path, epochs=3, save_every=0, words=words, **PAIR)

    make_images(tmp_path / "images")
    outcomes = run_ranks(2, rank, timeout=120.0)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes[0].output[-3000:]
    files = sorted((tmp_path / "run" / "checkpoints").glob("epoch*"))
    steps = [int(re.search(r"step(\d+)", file.name)[1]) for file in files]
    assert len(steps) >= 3
    assert steps[-1] == 9
    assert any(step % 3 for step in steps)  # within an epoch, too
