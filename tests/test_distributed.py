"""Two gloo processes with the same global batch give the same losses as one process."""

import subprocess
import sys
from pathlib import Path

import pytest

from beit.callbacks.metrics_file import read_metrics

Words = dict[str, list[str]]


def run(words: list[str], folder: Path, name: str) -> list[float]:
    """`beit train WORDS` as the user's shell would start it; the losses of its steps."""
    command = [sys.executable, "-m", "beit.cli", "train", *words]
    command += [f"paths.runs_dir={folder}", f"name={name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(folder / name / "metrics.csv")
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def test_two_processes_are_one(runs: Path, tiny: Words, tmp_path: Path) -> None:
    path = f"tokenizer.path={runs}/tokenizer/checkpoints/last.safetensors"
    words = [*tiny["mim"], path, "model.drop_path_rate=0.5"]
    one = run(words, tmp_path, "one")
    two = run([*words, "trainer=ddp_cpu", "batch.per_device=16"], tmp_path, "two")
    halves = ["trainer=ddp_cpu", "batch.per_device=8", "trainer.limit_train_batches=6"]
    run([*words, *halves], tmp_path, "split")
    assert len(one) == 6
    assert two == pytest.approx(one, abs=2e-6)
    # of an accumulated step the log has the last micro-batch; the weights tell whether it was right
    from beit.checkpoints.models import read_checkpoint

    weights = [
        read_checkpoint(tmp_path / name / "checkpoints" / "last.safetensors").state_dict
        for name in ("one", "two", "split")
    ]
    for key, expected in weights[0].items():
        for other in weights[1:]:
            assert (other[key] - expected).abs().max() < 2e-5, key
