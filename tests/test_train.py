"""The chain as a user runs it: every stage, its run folder, evaluate, predict, resume."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import beit
from beit import cli
from beit.checkpoints.file import read_file
from beit.checkpoints.models import read_checkpoint
from beit.data.sources import Digits
from beit.data.views import EvalTransform
from beit.errors import UserError

Words = dict[str, list[str]]
STAGES = ["tokenizer", "pretrain", "finetune"]
PRETRAINED = "{runs}/pretrain/checkpoints/last.safetensors"


def column(run: Path, key: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.safetensors"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_folder_tells_where_it_came_from(runs: Path, stage: str) -> None:
    run = runs / stage
    assert "output_dir" in (run / "config.yaml").read_text()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["commit"]
    assert (
        "global batch 32 = 1 devices x 32 images x 1 accumulated" in (run / "train.log").read_text()
    )
    assert len(column(run, "train/loss")) == 6
    assert last(run).is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_tells_of_its_run(runs: Path, stage: str) -> None:
    content = read_file(last(runs / stage))
    entry = content["beit"]
    assert json.loads(json.dumps(entry)) == entry
    assert content["global_step"] == entry["progress"]["steps"] == 6
    assert entry["progress"]["samples"] == 6 * 32
    assert entry["run_id"] == (runs / stage / "run_id").read_text().strip()
    assert entry["data"]["train"]["images"] == 1437
    assert entry["environment"]["packages"]["torch"]


def test_other_readers_open_a_checkpoint(runs: Path) -> None:
    from safetensors.torch import load_file

    ours = read_checkpoint(last(runs / "pretrain")).state_dict
    theirs = load_file(last(runs / "pretrain"))
    assert ours
    assert all(torch.equal(theirs[f"state_dict.{key}"], value) for key, value in ours.items())


def test_the_best_checkpoint_can_be_used_alone(runs: Path, tmp_path: Path) -> None:
    best = runs / "finetune" / "checkpoints" / "best.safetensors"
    assert len(beit.predict(best, _photos(tmp_path / "photos"))) == 3


def test_the_frozen_tokenizer_is_in_no_checkpoint(runs: Path) -> None:
    children = {key.split(".")[0] for key in read_checkpoint(last(runs / "pretrain")).state_dict}
    assert children == {"backbone", "head"}


def test_pretraining_logs_the_commonest_token_beside_its_accuracy(runs: Path) -> None:
    for stage in ("train", "val"):
        for key in ("mim_acc", "commonest_token_acc", "token_perplexity"):
            assert column(runs / "pretrain", f"{stage}/{key}")


def test_init_from_carries_the_backbone_over(
    runs: Path, tiny: Words, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beit import config, runner

    pretrained = read_checkpoint(last(runs / "pretrain")).part("backbone")
    start = f"init_from={last(runs / 'pretrain')}"
    cfg = config.compose([*tiny["classification"], "name=x", start])
    task, _ = runner.build(cfg, world_size=config.settle_devices(cfg))
    ours = task.backbone.state_dict()
    assert torch.equal(ours["blocks.2.mlp.fc1.weight"], pretrained["blocks.2.mlp.fc1.weight"])
    shared = pretrained["rel_pos_bias.relative_position_bias_table"]
    for i in range(3):
        assert torch.equal(ours[f"blocks.{i}.attn.relative_position_bias_table"], shared)


def test_evaluate_repeats_the_runs_own_validation(runs: Path) -> None:
    metrics = beit.evaluate(last(runs / "finetune"))
    assert metrics["val/loss"] == pytest.approx(column(runs / "finetune", "val/loss")[-1], rel=1e-5)


def test_evaluate_takes_images_of_another_size(runs: Path) -> None:
    """As the network itself does with `any_size`, which resizes its tables at each size it sees."""
    checkpoint = last(runs / "finetune")
    metrics = beit.evaluate(checkpoint, "model.image_size=48", "trainer.limit_val_batches=null")
    network = beit.load_model(checkpoint)
    network.backbone.any_size = True
    view = EvalTransform(image_size=48, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    source = Digits("test")
    images = torch.stack([view(source.load(index)[0]) for index in range(len(source))])
    with torch.no_grad():
        loss = F.cross_entropy(network(images), torch.from_numpy(source.labels))
    assert metrics["val/loss"] == pytest.approx(loss.item(), rel=1e-4)
    with pytest.raises(UserError, match="use weights of the same width"):
        beit.evaluate(checkpoint, "model.image_size=48", "model.width=32")


def test_evaluate_takes_other_data_and_another_trainer(runs: Path) -> None:
    checkpoint = last(runs / "finetune")
    other = beit.evaluate(checkpoint, "data.val.split=train", "trainer=cpu", "seed=0")
    assert other["val/loss"] != beit.evaluate(checkpoint)["val/loss"]
    with pytest.raises(UserError, match="nonsense"):
        beit.evaluate(checkpoint, "data.val.split=nonsense")
    with pytest.raises(UserError, match="no such choice: expected one of cpu, ddp"):
        beit.evaluate(checkpoint, "trainer=nonsense")


def test_evaluate_takes_changes_and_refuses_unknown_keys(runs: Path) -> None:
    fewer = beit.evaluate(last(runs / "finetune"), "trainer.limit_val_batches=1")
    assert fewer["val/loss"] != beit.evaluate(last(runs / "finetune"))["val/loss"]
    with pytest.raises(UserError, match="no such key"):
        beit.evaluate(last(runs / "finetune"), "trainer.limt_val_batches=1")


def _photos(folder: Path) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(255 - pixels).save(folder / "b.jpg")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


def test_predict_writes_one_line_per_image(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    words = [f"checkpoint={last(runs / 'finetune')}", f"images={_photos(tmp_path / 'photos')}"]
    monkeypatch.setattr(sys, "argv", ["beit", "predict", *words, "top_k=3", f"output={output}"])
    assert cli.main() == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["a.png", "b.jpg", "broken.png"]
    assert "broken.png" in lines[2]["error"]
    scores = [entry["score"] for entry in lines[0]["top"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert cli.main() == 2  # the output exists: it is not written over


def test_predict_gives_the_networks_own_scores(runs: Path, tmp_path: Path) -> None:
    from beit.predictor import ImageClassifier

    folder = _photos(tmp_path / "photos")
    record = beit.predict(last(runs / "finetune"), folder / "a.png", top_k=10)[0]
    classifier = ImageClassifier.from_checkpoint(last(runs / "finetune"))
    image = classifier.transform(Image.open(folder / "a.png"))[None]
    with torch.no_grad():
        expected = beit.load_model(last(runs / "finetune"))(image).softmax(-1)[0]
    for entry in record["top"]:
        assert entry["score"] == pytest.approx(expected[entry["index"]].item(), abs=1e-5)


def test_predict_refuses_a_checkpoint_without_classes(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no classes to predict"):
        beit.predict(last(runs / "pretrain"), _photos(tmp_path / "photos"))


def test_a_run_folder_is_never_written_over(runs: Path, tiny: Words) -> None:
    before = {path: path.stat().st_mtime_ns for path in (runs / "finetune").rglob("*")}
    with pytest.raises(UserError, match="already holds a run"):
        beit.train(*tiny["classification"], f"paths.runs_dir={runs}", "name=finetune")
    after = {path: path.stat().st_mtime_ns for path in (runs / "finetune").rglob("*")}
    assert before == after


def test_a_resumed_run_equals_an_uninterrupted_one(runs: Path, tiny: Words, tmp_path: Path) -> None:
    path = f"tokenizer.path={last(runs / 'tokenizer')}"
    words = [*tiny["mim"], path]
    words += [f"paths.runs_dir={tmp_path}", "trainer.max_epochs=3", "model.drop_path_rate=0.5"]
    beit.train(*words, "name=whole", "callbacks.checkpoints.keep=-1")
    first = next((tmp_path / "whole" / "checkpoints").glob("epoch0000*"))
    beit.train(*words, "name=cut", f"resume={first}")
    assert column(tmp_path / "cut", "train/loss") == column(tmp_path / "whole", "train/loss")[3:]
    whole = read_checkpoint(last(tmp_path / "whole")).state_dict
    cut = read_checkpoint(last(tmp_path / "cut")).state_dict
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize(
    ("stage", "words", "expected"),
    [
        ("finetune", ["name=finetune", f"resume={PRETRAINED}"], "another"),
        ("finetune", ["name=new", f"resume={PRETRAINED}"], "task mim"),
        ("finetune", ["name=finetune", "resume=auto", "model.width=26"], "another shape"),
    ],
)
def test_resume_refuses_what_is_not_the_same_run(
    runs: Path, tiny: Words, stage: str, words: list[str], expected: str
) -> None:
    before = (runs / stage / "config.yaml").read_bytes()
    filled = [word.format(runs=runs) for word in words]
    with pytest.raises(UserError, match=expected):
        beit.train(*tiny["classification"], f"paths.runs_dir={runs}", *filled)
    assert (runs / stage / "config.yaml").read_bytes() == before
    assert not (runs / "new").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1"], "seed was 0 and is 1"),
        (["batch.global_size=64"], "batch.global_size was 32 and is 64"),
        (["data.train.split=test"], "data was Digits"),
        (["trainer.max_epochs=3"], r"allow_changes=\[trainer.max_epochs\]"),
        (["seed=1", "allow_changes=[trainer.max_epochs]"], "seed was"),
    ],
)
def test_resume_refuses_another_run_by_name(
    runs: Path, tiny: Words, words: list[str], expected: str
) -> None:
    start = f"init_from={last(runs / 'pretrain')}"
    words = [*tiny["classification"], f"paths.runs_dir={runs}", "name=finetune", *words]
    for more in ([], [start]):  # one command line for the first start and for each that follows
        with pytest.raises(UserError, match=expected):
            beit.train(*words, "resume=auto", *more)
    with pytest.raises(UserError, match="exclude each other"):
        beit.train(*words, "resume=x.safetensors", start)


def test_a_run_is_extended_and_spread_otherwise_when_its_user_allows_it(
    runs: Path, tiny: Words, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(runs / "finetune", tmp_path / "moved", symlinks=True)
    words = [*tiny["classification"], f"paths.runs_dir={tmp_path}", "name=moved", "resume=auto"]
    words += ["batch.per_device=16", "trainer.limit_train_batches=6", "trainer.max_epochs=3"]
    allowed = "allow_changes=[trainer.max_epochs,trainer.limit_train_batches]"
    beit.train(*words, allowed)
    checkpoint = read_checkpoint(last(tmp_path / "moved"))
    assert checkpoint.entry["progress"]["steps"] == 9
    assert checkpoint.entry["run_id"] == read_checkpoint(last(runs / "finetune")).entry["run_id"]


def test_parts_that_would_be_lost_are_refused(runs: Path, tiny: Words) -> None:
    start = f"init_from={last(runs / 'pretrain')}"
    with pytest.raises(UserError, match="gamma_1"):
        beit.train(*tiny["classification"], start, "model.layer_scale=0", "name=x")
    with pytest.raises(UserError, match="pos_embed"):
        beit.train(*tiny["classification"], start, "model.absolute_position=true", "name=x")


def test_a_classifier_passes_its_norm_and_a_fitting_head_on(runs: Path, tiny: Words) -> None:
    from beit import config, runner

    before = read_checkpoint(last(runs / "finetune")).state_dict
    start = f"init_from={last(runs / 'finetune')}"
    for classes, carried in (("10", True), ("12", False)):
        words = [*tiny["classification"], "name=x", start, f"data.num_classes={classes}"]
        cfg = config.compose(words)
        task, _ = runner.build(cfg, world_size=config.settle_devices(cfg))
        after = task.state_dict()
        assert torch.equal(after["head.fc_norm.weight"], before["head.fc_norm.weight"])
        same = before["head.head.weight"].shape == after["head.head.weight"].shape
        assert same is carried
        assert not carried or torch.equal(after["head.head.weight"], before["head.head.weight"])


def test_all_that_was_not_carried_over_is_in_the_log(runs: Path) -> None:
    text = (runs / "finetune" / "train.log").read_text()
    lists = {line.split()[0]: line for line in text.splitlines() if line.startswith(("fr", "not"))}
    for key in ("mask_token", "norm.weight", "head.lm_head.weight"):
        assert key in lists["not"]
    for key in ("head.fc_norm.weight", "head.head.bias"):
        assert key in lists["fresh"]


def test_a_checkpoint_of_another_architecture_is_refused(runs: Path, tiny: Words) -> None:
    start = f"init_from={last(runs / 'pretrain')}"
    with pytest.raises(UserError, match="22"):
        beit.train(*tiny["classification"], start, "model.width=26", "name=x")


def test_a_foreign_file_is_refused_without_running_it(tmp_path: Path, runs: Path) -> None:
    import os
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"state_dict": Hostile()}, tmp_path / "bad2.ckpt")
    for name in ("bad.ckpt", "bad2.ckpt"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(last(runs / "pretrain").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(damaged)
    assert not (tmp_path / "executed").exists()
