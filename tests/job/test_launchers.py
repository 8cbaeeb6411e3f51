"""Two ranks under those who start them: Lightning's own launcher, and torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
Words = dict[str, list[str]]
LAUNCHERS = {
    "lightning": [],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"],
}


class Job:
    """`beit train` on two ranks, in a session of its own."""

    def __init__(self, launcher: str, words: list[str], folder: Path) -> None:
        self.run = folder / "run"
        self.output = folder / "output"
        modules = [*LAUNCHERS[launcher], "beit.cli"]
        command = [sys.executable, *(word for m in modules for word in _option(m)), "train"]
        command += [*words, f"paths.runs_dir={folder}", "name=run", "resume=auto"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def rank(self, number: int) -> int:
        """The process of a rank that the launcher started, once a checkpoint is there."""
        deadline = time.monotonic() + 200
        while not list((self.run / "checkpoints").glob("epoch*.safetensors")):
            assert time.monotonic() < deadline, self.output.read_text()[-3000:]
            assert self.process.poll() is None, self.output.read_text()[-3000:]
            time.sleep(0.05)
        wanted = f"LOCAL_RANK={number}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            parent = _read(path / "stat").rpartition(b")")[2].split()[1:2]
            started_by_it = parent == [str(self.process.pid).encode()]
            if started_by_it and wanted in _read(path / "environ").split(b"\0"):
                return int(path.name)
        raise AssertionError(f"no rank {number}: {self.output.read_text()[-3000:]}")

    def end(self) -> tuple[int, str]:
        """(exit code, output); nothing is left behind."""
        try:
            code = self.process.wait(200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return code, self.output.read_text()


def _option(module: str) -> list[str]:
    return [module] if module.startswith("--") else ["-m", module]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture
def words(tiny: Words) -> list[str]:
    own = ["trainer=ddp_cpu", "batch.per_device=16", "callbacks.checkpoints.every_n_steps=4"]
    mine = [word for word in tiny["classification"] if "limit_train" not in word]
    return [*mine, *own, "trainer.max_steps=40", "loader.num_workers=1"]


def test_a_signal_to_a_rank_that_lightning_started_ends_the_job(words, tmp_path) -> None:
    job = Job("lightning", words, tmp_path)
    os.kill(job.rank(1), signal.SIGTERM)
    code, output = job.end()
    assert code == 143, output[-3000:]
    assert "stopped by SIGTERM (rank 1) after step" in output


def test_torchrun_goes_on_where_a_killed_rank_left_off(words, tmp_path) -> None:
    job = Job("torchrun", words, tmp_path)
    os.kill(job.rank(1), signal.SIGKILL)
    code, output = job.end()
    assert code == 0, output[-3000:]
    assert output.count("starts at step 0") <= 2  # the first start alone, of each rank
    assert "resuming from" in output
    assert list((job.run / "checkpoints").glob("*step0000040.safetensors"))
