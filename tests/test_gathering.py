"""A sweep's table against means worked out by hand, with members that did not get to the end."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from beit import gathering
from beit.errors import UserError
from beit.sweep import Member


def sweep(folder: Path, members: list[tuple[list[str], str, dict[str, float | None]]]) -> None:
    entries = []
    for number, (words, state, metrics) in enumerate(members):
        place = folder / str(number)
        place.mkdir(parents=True)
        entries.append(asdict(Member(number, words, str(place), state, 0, metrics)))
    (folder / "sweep.json").write_text(json.dumps(entries))


def made(folder: Path) -> gathering.Table:
    sweep(
        folder,
        [
            (["data=x", "optim.lr=0.1", "seed=0"], "done", {"val/acc1": 0.5, "train/loss": 7.0}),
            (["data=x", "optim.lr=0.1", "seed=1"], "done", {"val/acc1": 0.7, "val/loss": None}),
            (["data=x", "optim.lr=0.2", "seed=0"], "killed by SIGKILL", {"val/acc1": 0.9}),
            (["data=x", "optim.lr=0.2", "seed=1"], "done", {"val/acc1": 0.2}),
            (["data=x", "optim.lr=0.3", "seed=0"], "failed, exit code 3", {}),
        ],
    )
    (folder / "0" / "metrics.csv").write_text("step,val/acc1,val/loss\n0,0.6,3\n1,,1\n2,0.5,2\n")
    (folder / "0" / "finetune").mkdir()
    (folder / "0" / "finetune" / "metrics.csv").write_text("step,val/acc1\n0,0.8\n")
    return gathering.gather(folder)


def test_seeds_are_averaged_and_the_failed_are_shown(tmp_path: Path) -> None:
    table = made(tmp_path)
    lines = table.markdown().splitlines()
    assert lines[0] == "| optim.lr | runs | val/acc1 | state |"
    assert lines[2] == "| 0.1 | 2 | 0.6 (0.5 to 0.7) | done |"
    assert lines[3] == "| 0.2 | 2 | 0.2 | 1 killed by SIGKILL, 1 done |"
    assert lines[4] == "| 0.3 | 1 | - | failed, exit code 3 |"
    assert len(lines) == 5
    assert (tmp_path / "gathered.md").read_text() == table.markdown() + "\n"


def test_the_csv_has_every_metric(tmp_path: Path) -> None:
    made(tmp_path)
    with (tmp_path / "gathered.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    assert first["seeds"] == "0 1"
    assert [float(first[f"val/acc1 {part}"]) for part in ("mean", "min", "max")] == pytest.approx(
        [0.6, 0.5, 0.7]
    )
    assert float(first["val/acc1 std"]) == pytest.approx(0.2 / 2**0.5)
    assert (first["val/acc1 best mean"], first["val/loss best mean"]) == ("0.6", "1.0")
    assert first["finetune/val/acc1 best mean"] == "0.8"
    assert not any(name.startswith(("train/", "seed ")) for name in first)
    assert rows[2]["val/acc1 runs"] == "0"


def test_a_sweep_that_was_moved_is_gathered_from_where_it_lies(tmp_path: Path) -> None:
    made(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    table = gathering.gather(tmp_path / "there")
    assert table.rows[0].values["finetune/val/acc1 best"] == [0.8]


def test_the_picture(tmp_path: Path) -> None:
    made(tmp_path)
    assert Image.open(tmp_path / "gathered.png").size[0] > 100


def test_rows_that_are_no_numbers_are_drawn_too(tmp_path: Path) -> None:
    sweep(
        tmp_path,
        [
            (["experiment=a"], "done", {"val/acc1": 0.5}),
            (["experiment=b"], "done", {"val/acc1": 0.6}),
        ],
    )
    assert gathering.gather(tmp_path).written[-1].name == "gathered.png"


def test_what_cannot_be_gathered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no sweep"):
        gathering.gather(tmp_path)
    made(tmp_path)
    with pytest.raises(UserError, match=r"no run that is done has val/acc2: did you mean val/acc1"):
        gathering.gather(tmp_path, metrics=["val/acc2"])
