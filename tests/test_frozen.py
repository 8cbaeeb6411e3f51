"""`beit evaluate evaluation=...` as a user calls it, on checkpoints of every kind."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import beit
from beit import cli
from beit.callbacks.figures import curves
from beit.data.labelled import LabelledData
from beit.data.loading import LoaderSettings
from beit.data.sources import Digits, few_labels
from beit.data.views import EvalTransform
from beit.errors import UserError
from beit.evaluation.choosing import Report
from beit.evaluation.features import Compute
from beit.evaluation.linear_probe import LinearProbe
from beit.frozen import _panels

FEW = [
    "data=digits",
    "labels_per_class=10",
    "loader.num_workers=0",
    "loader.check_images=3",
    "trainer.precision=32-true",
]
PROBE = ["evaluation=linear_probe", "evaluation.l2=[1e-2]", "evaluation.poolings=[mean]", *FEW]
KNN = ["evaluation=knn", "evaluation.k=[3]", *FEW]


def last(runs: Path, stage: str) -> Path:
    return runs / stage / "checkpoints" / "last.safetensors"


def test_the_words_are_the_evaluation_by_hand(runs: Path) -> None:
    found = beit.evaluate(last(runs, "pretrain"), *PROBE)
    network = beit.load_model(last(runs, "pretrain"))
    imagenet: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    data = LabelledData.of(
        few_labels(Digits("train"), per_class=10, seed=0),
        Digits("test"),
        transform=EvalTransform(image_size=32, **imagenet),
        num_classes=10,
        loader=LoaderSettings(64, 64, num_workers=0, seed=0),
    )
    by_hand = LinearProbe(l2=[1e-2], poolings=["mean"])(network, data, Compute(torch.device("cpu")))
    assert found["rows"] == by_hand.rows
    assert [row["layer"] for row in found["rows"]] == [1, 2, 3]
    best = max(found["rows"], key=lambda row: row["held_out_acc"])
    assert {key: found[key] for key in best} == best
    assert found["chosen_on"] == "20 of the 100 training images, held out"
    assert found["measured_on"] == "360 validation images"


def test_what_is_kept_in_a_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "probe"
    words = [f"checkpoint={last(runs, 'pretrain')}", *PROBE, f"output={folder}"]
    monkeypatch.setattr(sys, "argv", ["beit", "evaluate", *words, "compare_random=true"])
    assert cli.main() == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "held_out_acc" in printed.err  # the table
    kept = json.loads((folder / "linear_probe.json").read_text())
    assert {key: kept[key] for key in found} == found
    assert kept["data"]["train"]["images"] == 100
    assert kept["settings"]["l2"] == [1e-2]
    with (folder / "linear_probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["checkpoint"] * 3 + ["random"] * 3
    assert [float(row["val_acc"]) for row in rows] == [row["val_acc"] for row in found["rows"]]
    assert found["random"]["val_acc"] != found["val_acc"]
    assert Image.open(folder / "linear_probe.png").size[0] > 300
    before = (folder / "linear_probe.json").stat().st_mtime_ns
    assert cli.main() == 2  # nothing is written over
    assert (folder / "linear_probe.json").stat().st_mtime_ns == before
    monkeypatch.setattr(sys, "argv", ["beit", "evaluate", *words, "overwrite=true"])
    assert cli.main() == 0
    assert "random" not in json.loads((folder / "linear_probe.json").read_text())


def test_other_layouts_are_the_same_network(runs: Path, tmp_path: Path) -> None:
    ours = beit.evaluate(last(runs, "finetune"), *KNN)
    beit.convert(last(runs, "finetune"), "huggingface", tmp_path / "hf")
    assert beit.evaluate(tmp_path / "hf", *KNN) == ours
    assert ours["rows"][0].keys() == {"layer", "pooling", "k", "held_out_acc", "val_acc"}


def test_a_bare_encoder(runs: Path, tmp_path: Path) -> None:
    """Its config is no training run's."""
    from beit.interop import convert
    from beit.interop.weights import Weights

    weights: Weights = convert.read(last(runs, "pretrain"))
    bare = weights.changed(kind="backbone", head={}, pooling="none")
    convert.write(bare, "ours", tmp_path / "bare.safetensors")
    found = beit.evaluate(tmp_path / "bare.safetensors", *PROBE)
    assert found["rows"] == beit.evaluate(last(runs, "pretrain"), *PROBE)["rows"]


def test_health_needs_no_labels(runs: Path, tmp_path: Path) -> None:
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    words = ["evaluation=health", "data=unlabelled", f"paths.data_dir={tmp_path}", *FEW[2:]]
    found = beit.evaluate(last(runs, "pretrain"), *words)
    assert found["measured_on"] == "6 training images"
    assert 1 <= found["predicted_token_perplexity"] <= found["vocab_size"]
    assert all(1 <= row["rankme"] <= 22.01 for row in found["rows"])
    assert all(0 < row["attention_share"] <= 1.001 for row in found["rows"])
    assert "vocab_size" not in beit.evaluate(last(runs, "finetune"), *words)


@pytest.mark.parametrize(
    ("stage", "words", "expected"),
    [
        ("pretrain", ["evaluation=linear_prob", *FEW], "did you mean linear_probe"),
        ("pretrain", ["evaluation=knn"], "specify 'data'"),
        ("pretrain", [*KNN, "evaluation.layers=[9]"], "has layers 1 to 3"),
        ("pretrain", [*KNN, "evaluation.k=[100]"], "k 100 is larger than the 80 labelled images"),
        ("pretrain", [*KNN, "evaluation.temprature=1"], "did you mean evaluation.temperature"),
        ("pretrain", [*KNN, "evaluation.k=many"], "evaluation.k=many: expected a list"),
        ("pretrain", [*KNN, "optim.lr=1"], "optim.lr is not a key of this config"),
        ("pretrain", [*KNN, "data.val=null"], "no validation images"),
        ("pretrain", [*KNN, "trainer.devices=2"], "on one device"),
        ("pretrain", [*KNN, "trainer.precision=foo"], "trainer.precision=foo: expected one of"),
        ("pretrain", [*PROBE, "labels_per_class=1"], "none can be held out"),
        ("pretrain", [*PROBE, "data.num_classes=2000"], "fewer than the 2000 classes"),
        ("pretrain", ["evaluation=knn", "data=unlabelled", "paths.data_dir=."], "no labels"),
        ("tokenizer", KNN, "without a vision transformer"),
        ("pretrain", ["output=x"], "output=x is of evaluation=... alone"),
    ],
)
def test_mistakes_are_one_line_before_any_feature(
    runs: Path,
    stage: str,
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def extract(*_: Any, **__: Any) -> None:
        raise AssertionError("features were worked out")

    for module in ("knn", "linear_probe", "health"):
        if module != "health":
            monkeypatch.setattr(f"beit.evaluation.{module}.extract", extract)
    monkeypatch.chdir(tmp_path)
    if "data=unlabelled" in words:
        words = [*words[:-1], "paths.data_dir=photos"]
        (tmp_path / "photos").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "a.png")
        words += ["data.val=${data.train}"]
    command = ["beit", "evaluate", f"checkpoint={last(runs, stage)}", "output=out", *words]
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main() == 2
    assert not (tmp_path / "out").exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert expected in lines[-1]
    assert lines[-1].startswith("beit: error: ")
    assert len(lines) == 1


def test_a_single_class_is_nothing_to_tell_apart(runs: Path, tmp_path: Path) -> None:
    for number in range(4):
        place = tmp_path / ("train" if number else "val") / "one" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(place)
    words = ["evaluation=knn", "evaluation.k=[1]", "data=folder", f"paths.data_dir={tmp_path}"]
    with pytest.raises(UserError, match="all of one class"):
        beit.evaluate(last(runs, "pretrain"), *words)


def test_python_says_the_same(runs: Path) -> None:
    with pytest.raises(UserError, match="has layers 1 to 3"):
        beit.evaluate(last(runs, "pretrain"), *KNN, "evaluation.layers=[4]")


def test_a_random_network_is_drawn_dashed_in_the_colour_of_the_checkpoint() -> None:
    series = {"accuracy": {"cls": ([1.0, 2.0], [0.3, 0.4]), "mean": ([1.0, 2.0], [0.2, 0.5])}}
    report = Report("probe", [], {}, series)
    figure = curves(dict(_panels({"checkpoint": report, "random": report})), dashed=" (random)")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) == {"cls", "cls (random)", "mean", "mean (random)"}
    for name in ("cls", "mean"):
        solid, dashed = lines[name], lines[f"{name} (random)"]
        assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
        assert solid.get_color() == dashed.get_color()
    assert lines["cls"].get_color() != lines["mean"].get_color()
