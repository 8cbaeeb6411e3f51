import csv

import pytest

from beit.callbacks.metrics_file import MetricsFile, read_metrics


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_new_columns(tmp_path):
    log = MetricsFile(str(tmp_path / "run"))
    log.log_metrics({"train/loss": 2.5, "epoch": 0}, step=3)
    log.log_metrics({"val/loss": 1.25, "epoch": 0}, step=3)
    log.log_metrics({"train/loss": 0.1 + 0.2, "epoch": 1}, step=7)
    path = tmp_path / "run" / "metrics.csv"
    assert path.read_text().splitlines()[0] == "step,epoch,train/loss,val/loss"
    assert [(r["step"], r["train/loss"], r["val/loss"]) for r in rows(path)] == [
        ("3", "2.5", ""),
        ("3", "", "1.25"),
        ("7", "0.30000000000000004", ""),
    ]
    assert read_metrics(path) == rows(path)
    assert [p.name for p in path.parent.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("tail", ["", "5,0,0.", "5,0,0.5"], ids=["whole", "torn", "torn at end"])
def test_a_second_start_keeps_what_the_first_wrote(tmp_path, tail):
    first = MetricsFile(str(tmp_path))
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step), "epoch": 0}, step=step)
    with first.path.open("a") as file:
        file.write(tail)  # killed in the middle of a row
    second = MetricsFile(str(tmp_path))
    second.log_metrics({"train/loss": 20.0, "epoch": 0}, step=2)
    second.log_metrics({"val/acc": 0.5, "epoch": 0}, step=2)
    assert [(r["step"], r["train/loss"], r["val/acc"]) for r in rows(second.path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", ""),
        ("2", "20.0", ""),
        ("2", "", "0.5"),
    ]


def test_through_the_trainer(tmp_path, fit):
    fit(callbacks=[], logger=MetricsFile(str(tmp_path)))
    logged = rows(tmp_path / "metrics.csv")
    assert sum(bool(r["train/loss"]) for r in logged) == 8  # 2 epochs of 4 steps
    assert [r["val/loss"] for r in logged if r["val/loss"]] == ["1.5", "1.5"]
