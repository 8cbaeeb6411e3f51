"""Two gloo processes with the same global batch give the same losses as one process."""

import sys
from pathlib import Path

import pytest

import beit
from beit.callbacks.metrics_file import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.faults.forked import run_ranks

Words = dict[str, list[str]]


def run(words: list[str], folder: Path, name: str, ranks: int = 1) -> list[float]:
    """`beit train WORDS` in processes of its own; the losses of its steps."""
    words = [*words, f"paths.runs_dir={folder}", f"name={name}"]
    words += ["trainer=ddp_cpu"] if ranks > 1 else []
    for outcome in run_ranks(ranks, beit.train, *words, timeout=300.0):
        assert outcome.returncode == 0, outcome.output[-3000:]
    rows = read_metrics(folder / name / "metrics.csv")
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_are_one(runs: Path, tiny: Words, tmp_path: Path) -> None:
    path = f"tokenizer.path={runs}/tokenizer/checkpoints/last.safetensors"
    words = [*tiny["mim"], path, "model.drop_path_rate=0.5"]
    one = run(words, tmp_path, "one")
    two = run([*words, "batch.per_device=16"], tmp_path, "two", ranks=2)
    halves = ["batch.per_device=8", "trainer.limit_train_batches=6"]
    run([*words, *halves], tmp_path, "split", ranks=2)
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
