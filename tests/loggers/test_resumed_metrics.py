"""A run that is killed and goes on leaves the metrics.csv of one that was not."""

import csv
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.faults.forked import run_forked
from scripts.faults.tiny import tiny_config, tiny_run

SETTINGS = {
    "epochs": 3,
    "per_device": 6,  # two micro-batches a step
    "words": ["logger=csv", "callbacks=default", "callbacks.curves=null"],
}
MEASURED = ("throughput/", "memory/")  # differ from run to run


def metrics(folder):
    """(step, metric) -> value; each may stand there once."""
    found = {}
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch") and not name.startswith(MEASURED):
                    key = int(row["step"]), name
                    assert key not in found
                    found[key] = value
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_config(folder, **SETTINGS)  # composed once, for all the forks
    outcome = run_forked(tiny_run, folder, timeout=300, **SETTINGS)
    assert outcome.returncode == 0, outcome.output
    return metrics(folder)


@pytest.mark.parametrize(
    "place",
    [(0, 1, "end"), (1, 2, "start"), (1, 5, "end"), (2, 0, "start")],
    ids=["in the first step", "within an epoch", "at its end", "between epochs"],
)
def test_each_metric_stands_once_and_is_equal(whole, place, tmp_path):
    killed = run_forked(tiny_run, tmp_path, timeout=300, kill_at=place, **SETTINGS)
    assert killed.returncode == -signal.SIGKILL, killed.output
    again = run_forked(tiny_run, tmp_path, timeout=300, resume="auto", **SETTINGS)
    assert again.returncode == 0, again.output
    assert metrics(tmp_path) == whole
