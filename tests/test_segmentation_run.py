"""Segmentation as a user runs it: train, evaluate, predict, go on; on pictures made here."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import beit
from beit import cli
from beit.callbacks.metrics_file import read_metrics
from beit.checkpoints.models import read_checkpoint
from beit.errors import UserError
from beit.evaluation.windows import MultiScale
from beit.security import targets

CLASSES = ["sky", "ground", "thing", "nothing"]  # the last one is never there
COLOURS = np.array([[90, 160, 240], [120, 90, 40], [220, 30, 60]])
WORDS = [
    "task=segmentation",
    "data=segmentation_folders",
    f"data.classes=[{','.join(CLASSES)}]",
    "data.ids.palette=[[0,0,255],[0,255,0],[255,0,0],[9,9,9]]",
    "model=micro",
    "model.width=22",
    "model.num_heads=2",
    "model.depth=3",
    "model.drop_path_rate=0.3",
    "pyramid=micro",
    "pyramid.taps=[0,1,1,2]",
    "head.main.channels=8",
    "views.train.short_side=36",
    "views.eval.short_side=original",
    "batch.global_size=4",
    "batch.per_device=4",
    "loader.num_workers=0",
    "optim.warmup_steps=1",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
    "logger=default",
]


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.safetensors"


def draw(folder: Path, split: str, count: int) -> None:
    """Sky above ground with a thing on it, 44x60 and other sizes; a strip has no label."""
    rng = np.random.default_rng(len(split))
    for i in range(count):
        height, width = 44 + 3 * (i % 2), 60 + 5 * (i % 3)
        labels = np.zeros((height, width), dtype=np.uint8)
        labels[height // 2 :] = 1
        top, left = rng.integers(8, 30), rng.integers(0, 40)
        labels[top : top + 12, left : left + 16] = 2
        noise = rng.integers(-30, 30, (height, width, 3))
        pixels = (COLOURS[labels] + noise).clip(0, 255).astype(np.uint8)
        labels[:, :2] = 255
        for kind, array in (("images", pixels), ("annotations", labels)):
            path = folder / kind / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder, "train", 9)
    draw(folder, "val", 5)
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    words = [*WORDS, f"paths.data_dir={pictures}", f"paths.runs_dir={folder}", "name=whole"]
    beit.train(*words, "callbacks.checkpoints.keep=-1")
    return folder / "whole"


def test_the_run_folder_has_scores_and_pictures(run: Path) -> None:
    rows = read_metrics(run / "metrics.csv")
    for key in ("train/loss", "train/pixel_acc", "val/miou", "val/mean_acc", "val/pixel_acc"):
        values = [float(row[key]) for row in rows if row.get(key)]
        assert len(values) == (6 if key.startswith("train") else 3), key
    names = {path.name.partition("-step")[0] for path in (run / "figures").glob("*.png")}
    assert names == {"segmentation", "class_iou", "curves.png"}
    assert (run / "checkpoints" / "best.safetensors").exists()
    log = (run / "train.log").read_text()
    assert "SlidingWindow(window=(32, 32), stride=(21, 21)" in log


def test_tensorboard_has_its_pictures_and_tables(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("segmentation", "class_iou"):
        assert [event.step for event in events.Images(name)] == [1, 3, 5], name
    for name in ("val/miou", "iou/sky"):
        assert [event.step for event in events.Scalars(name)] == [1, 3, 5], name
    tables = events.Tensors("classes/text_summary")
    assert [event.step for event in tables] == [1, 3, 5]
    assert all(name in tables[-1].tensor_proto.string_val[0].decode() for name in CLASSES)


def test_evaluate_repeats_the_runs_validation_with_each_class(run: Path) -> None:
    metrics = beit.evaluate(last(run))
    found = [row for row in read_metrics(run / "metrics.csv") if row["step"] == "5"]
    logged = {key: value for row in found for key, value in row.items() if value}
    for key in ("val/miou", "val/mean_acc", "val/pixel_acc"):
        assert metrics[key] == pytest.approx(float(logged[key]), rel=1e-5)
    rows = metrics["per_class"]
    assert [row["class"] for row in rows] == CLASSES
    there = [row["iou"] for row in rows if row["iou"] is not None]
    assert metrics["val/miou"] == pytest.approx(np.mean(there), abs=1e-5)
    for row in rows:
        if row["iou"] is not None:
            assert float(logged[f"iou/{row['class']}"]) == pytest.approx(row["iou"], abs=1e-5)
    with (run / "classes.csv").open() as file:
        written = list(csv.DictReader(file))
    for row, text in zip(rows, written, strict=True):
        assert text["iou"] == ("" if row["iou"] is None else str(row["iou"]))
        assert int(text["pixels"]) == row["pixels"]
    assert rows[0]["pixels"] + rows[1]["pixels"] + rows[2]["pixels"] < 5 * 47 * 70


def test_evaluate_takes_another_inference_and_other_data(run: Path, pictures: Path) -> None:
    plain = beit.evaluate(last(run))
    scales = beit.evaluate(last(run), "inference=multiscale", "inference.short_side=40")
    assert scales["val/miou"] != plain["val/miou"]
    elsewhere = [f"data.val.{kind}={pictures}/{kind}/train" for kind in ("images", "annotations")]
    other = beit.evaluate(last(run), *elsewhere)
    assert other["per_class"][0]["pixels"] > plain["per_class"][0]["pixels"]


def test_two_processes_measure_what_one_does(run: Path) -> None:
    # the group brings its own precision along
    words = [f"checkpoint={last(run)}", "trainer=ddp_cpu", "trainer.precision=32-true"]
    words += ["batch.per_device=2"]
    command = [sys.executable, "-m", "beit.cli", "evaluate", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[0]) == beit.evaluate(last(run))


def photos(folder: Path, pictures: Path) -> Path:
    for i, place in enumerate(["a.png", "below/a.png", "below/b.png", "below/b.jpg"]):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.open(pictures / "images" / "val" / f"{i}.png").save(folder / place)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


def test_predict_writes_overlay_ids_and_areas(run: Path, pictures: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "photos", pictures), tmp_path / "out"
    records = beit.predict(last(run), folder, output=output)
    assert [Path(r["path"]).name for r in records if "error" in r] == ["broken.png"]
    made = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    stems = ["a", "below/a", "below/b.jpg", "below/b.png"]
    assert made == sorted(f"{s}{end}" for s in stems for end in (".overlay.png", ".png", ".json"))
    record = next(r for r in records if r["path"].endswith("below/a.png"))
    ids = np.asarray(Image.open(output / "below/a.png"))
    image = np.asarray(Image.open(folder / "below/a.png")).astype(int)
    assert ids.shape == image.shape[:2]
    assert ids.dtype == np.uint8
    for area in record["areas"]:
        assert area["pixels"] == (ids == CLASSES.index(area["class"])).sum()
        assert area["share"] == pytest.approx(area["pixels"] / ids.size, abs=1e-6)
    assert sum(area["pixels"] for area in record["areas"]) == ids.size
    assert json.loads((output / "below/a.json").read_text()) == record
    palette = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 0], [9, 9, 9]])
    blended = np.asarray(Image.open(output / "below/a.overlay.png")).astype(int)
    assert np.abs(blended - (image + palette[ids]) / 2).max() <= 1


def test_predict_gives_the_networks_own_classes(run: Path, pictures: Path, tmp_path: Path) -> None:
    picture = pictures / "images" / "val" / "0.png"
    beit.predict(last(run), picture, output=tmp_path)
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    model: Any = beit.load_model(last(run))
    with torch.no_grad():
        expected = model.predict((pixels - mean) / std, pixels.shape[1:])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0.png")), expected.numpy())


def test_predict_goes_over_the_image_as_it_is_told(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    picture = pictures / "images" / "val" / "0.png"
    words = ["inference=multiscale", "inference.ratios=[0.75,1.5]", "inference.short_side=44"]
    beit.predict(last(run), picture, *words, output=tmp_path)
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    model: Any = beit.load_model(last(run))
    size = model.backbone.image_size
    scales = MultiScale(
        size,
        stride=[side * 2 // 3 for side in size],
        windows_per_pass=4,
        short_side=44,
        ratios=[0.75, 1.5],
        flip=True,
    )
    with torch.no_grad():
        normal = (pixels - mean) / std
        expected = scales(model.coarse_logits, normal, tuple(pixels.shape[1:]))
        plain = model.predict(normal, pixels.shape[1:])
    found = np.asarray(Image.open(tmp_path / "0.png"))
    assert np.array_equal(found, expected.numpy())
    assert not np.array_equal(found, plain.numpy())


def test_whole_images_where_the_model_is_told_to_take_any(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = pictures / "images" / "val"  # of several sizes
    for give in (lambda *words: beit.predict(last(run), folder, *words, output=tmp_path),
                 lambda *words: beit.evaluate(last(run), *words)):  # fmt: skip
        with pytest.raises(UserError, match=r"images of 32x32 px|those of 32x32 px alone"):
            give("inference=whole")
        assert not list(tmp_path.iterdir())
    records = beit.predict(
        last(run), folder, "inference=whole", "model.any_size=true", output=tmp_path
    )
    assert len(records) == 5
    assert all("areas" in record for record in records)


def test_two_processes_count_each_image_once(run: Path) -> None:
    """Five images over two processes: the same scores and pixels, to the last digit."""
    words = ["trainer=ddp_cpu", "trainer.precision=32-true", "batch.per_device=2"]
    command = [sys.executable, "-m", "beit.cli", "evaluate", f"checkpoint={last(run)}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(line) == beit.evaluate(last(run))


def test_evaluate_takes_the_classes_by_number_and_says_so(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"'sky', and of the data 'ground': .* checkpoint's order"):
        beit.evaluate(last(run), "data.classes=[ground,sky,thing,nothing]")
    assert "by their numbers" not in caplog.text
    beit.evaluate(last(run), "data.classes=[sky,ground,stone,nothing]")
    assert "class 2 of the checkpoint is 'thing', and of the data 'stone'" in caplog.text
    with pytest.raises(UserError, match=r"num_classes 4: .* has 3 classes .*give as many"):
        beit.evaluate(last(run), "data.classes=[sky,ground,thing]", "data.ids.palette=auto")


def test_evaluate_refuses_words_that_nothing_would_read(run: Path, runs: Path) -> None:
    with pytest.raises(UserError, match=r"inference=whole: .*of task classification, has no inf"):
        beit.evaluate(last(runs / "finetune"), "inference=whole")
    for folder, task in ((run, "segmentation"), (runs / "finetune", "classification")):
        with pytest.raises(UserError, match=f"the checkpoint is of task {task}"):
            beit.evaluate(last(folder), "task=segmentation")


def test_predict_builds_networks_and_transforms_alone(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the run's config is changed, a stranger's file gets nothing else built."""
    for allowed, left in (("NETWORKS", "network"), ("TRANSFORMS", "transform")):
        with monkeypatch.context() as patch:
            patch.setattr(targets, allowed, ("beit.nowhere.",))
            for words in ([], ["inference=multiscale"]):
                with pytest.raises(UserError, match=f"it is no part of a {left}"):
                    beit.predict(last(run), pictures, *words, output=tmp_path)


def test_predict_names_a_device_that_is_not_there(run: Path, tmp_path: Path) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"device={device}: expected auto, cpu, or a GPU"):
            beit.predict(last(run), tmp_path, output=tmp_path, device=device)


def test_predict_changes_nothing_else(run: Path, runs: Path, tmp_path: Path) -> None:
    for word in ("model.depth=4", "trainer=gpu", "inferences=x"):
        with pytest.raises(UserError, match=r"inference, views\.eval, model\.any_size can be ch"):
            beit.predict(last(run), tmp_path, word, output=tmp_path)
    with pytest.raises(UserError, match="task classification has nothing to change here"):
        beit.predict(last(runs / "finetune"), tmp_path, "inference=whole")


def test_nothing_is_written_over_unless_told(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    picture = pictures / "images" / "val" / "0.png"
    words = ["beit", "predict", f"checkpoint={last(run)}", f"images={picture}"]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 2  # without a folder
    monkeypatch.setattr(sys, "argv", [*words, f"output={tmp_path}"])
    assert cli.main() == 0
    before = (tmp_path / "0.json").stat().st_mtime_ns
    assert cli.main() == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert (tmp_path / "0.json").stat().st_mtime_ns == before
    monkeypatch.setattr(sys, "argv", [*words, f"output={tmp_path}", "overwrite=true"])
    assert cli.main() == 0
    assert (tmp_path / "0.json").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inference=whole"], r"model\.any_size=true, or inference=sliding"),
        (["inference.window=64"], r"inference\.window 64x64: this model takes windows of 32x32 px"),
        (
            ["inference.window=30", "model.any_size=true"],
            "multiples of the model's patches of 4 px",
        ),
        (["inference.stride=0"], "stride 0: expected one number"),
        (["model.image_size=4"], "a grid of 1x1 patches is too small for the pyramid"),
        (["inference.windows_per_pass=1000000000"], "attention alone needs"),
        (
            ["batch.global_size=1", "batch.per_device=1"],
            "UPerNet cannot train on one image at a time",
        ),
    ],
)
def test_what_validation_cannot_do_is_told_before_there_is_a_run(
    pictures: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        beit.train(*WORDS, f"paths.data_dir={pictures}", f"paths.runs_dir={tmp_path}/runs", *words)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_never_validates_says_so(pictures: Path, tmp_path: Path) -> None:
    for name, interval in (("never", 1.0), ("once", 1)):
        words = [f"paths.data_dir={pictures}", f"paths.runs_dir={tmp_path}", f"name={name}"]
        steps = ["trainer.max_steps=1", f"+trainer.val_check_interval={interval}"]
        beit.train(*WORDS, *words, *steps)
        log = (tmp_path / name / "train.log").read_text()
        assert ("no validation was due within the run's 1 steps" in log) == (name == "never")
        assert (tmp_path / name / "classes.csv").exists() == (name == "once")


def test_a_resumed_run_equals_an_uninterrupted_one(run: Path, pictures: Path) -> None:
    first = next((run / "checkpoints").glob("epoch0000*"))
    words = [*WORDS, f"paths.data_dir={pictures}", f"paths.runs_dir={run.parent}"]
    beit.train(*words, "name=cut", f"resume={first}")
    whole, cut = (read_checkpoint(last(run.parent / n)).state_dict for n in ("whole", "cut"))
    assert set(whole) == set(cut)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_another_run_starts_from_its_weights(run: Path, pictures: Path) -> None:
    from beit import config, runner

    other = [word for word in WORDS if not word.startswith(("data.classes", "data.ids"))]
    words = [*other, "data.classes=[a,b,c]", "name=x", f"init_from={last(run)}"]
    cfg = config.compose([*words, f"paths.data_dir={pictures}"])
    task, _ = runner.build(cfg, world_size=config.settle_devices(cfg))
    before, after = read_checkpoint(last(run)).state_dict, task.state_dict()
    for key in ("backbone.blocks.0.mlp.fc1.weight", "pyramid.fpn1.0.weight"):
        assert torch.equal(before[key], after[key])
    assert after["head.conv_seg.weight"].shape[0] == 3  # of the new classes, fresh


def test_a_task_without_classes_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no classes to predict"):
        beit.predict(last(runs / "pretrain"), tmp_path, output=tmp_path)
