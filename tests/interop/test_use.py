"""Converted and foreign files in use: the command line, prediction, a new run's start, pixels."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from PIL import Image
from transformers import AutoImageProcessor, BeitImageProcessorPil

import beit
from beit import cli
from beit.checkpoints.models import initialise
from beit.data.views import EvalTransform
from beit.errors import UserError
from beit.interop import convert
from beit.interop.weights import Preprocessing, networks
from beit.models.heads import ClassificationHead
from beit.models.position import resize_relative_table

ROOT = Path(__file__).parents[2]
TABLE = "relative_position_bias_table"


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["beit", *map(str, words)])
    code = cli.main()
    out, err = capsys.readouterr()
    return code, out, err


def test_the_verb(tmp_path, kit, monkeypatch, capsys):
    source, output = kit.save(kit.make(), "timm", tmp_path), tmp_path / "out" / "hf"
    words = ["convert", f"source={source}", "to=huggingface", f"output={output}"]
    code, out, err = run(monkeypatch, capsys, *words)
    assert (code, out) == (0, f"{output}\n")
    assert "loaded" in err
    assert "timm" in err
    kit.assert_same(convert.read(output), kit.make())
    code, _, err = run(monkeypatch, capsys, *words)
    assert code == 2
    assert "exists already" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["to=jax"], "expected one of ours, timm, huggingface, unilm"),
        (["to=ours", "output={}/x.pth"], "has the suffix .safetensors"),
        (["to=timm", "output={}/x.pth"], "a folder of files"),
        (["to=timm", "sauce=x"], "not a setting of convert"),
        (["to=timm", "image_size=24x"], "expected a whole number"),
        (["to=timm", "norm_eps=2"], "between 0 and 1"),
        (["to=timm", "normalize=odd"], "expected one of half, imagenet"),
        (["to=timm", "classes=/absent"], "cannot be read as text"),
        (["to=timm", "source={}/absent"], "nothing at"),
    ],
)
def test_mistakes_are_one_line(words, expected, tmp_path, kit, monkeypatch, capsys):
    source = kit.save(kit.make(), "huggingface", tmp_path)
    given = {"source": f"source={source}", "output": f"output={tmp_path}/x"}
    given |= {word.partition("=")[0]: word.format(tmp_path) for word in words}
    code, _, err = run(monkeypatch, capsys, "convert", *given.values())
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]  # nothing half written


@pytest.mark.parametrize(
    ("make", "to", "words"),
    [
        ({"kind": "mim", "positions": "shared"}, "timm", "neither a mask_token nor a head"),
        ({"mask_token": True}, "timm", "no mask_token: to leave it behind say allow=mask_token"),
        ({"mask_token": True}, "unilm", "no mask_token: to leave it behind say allow=mask_token"),
        ({"final_norm": True}, "timm", "both norm and fc_norm"),
        ({"final_norm": True}, "unilm", "both norm and fc_norm"),
        ({"final_norm": True}, "huggingface", "both norm and fc_norm"),
        ({"size": (24, 40)}, "huggingface", r"image_size \[24, 40\] is not square"),
        ({"kind": "mim", "final_norm": False}, "unilm", "ends with a norm"),
        ({"kind": "mim", "final_norm": False}, "huggingface", "final norm and a mask token"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(make, to, words, tmp_path, kit):
    with pytest.raises(UserError, match=words):
        kit.save(kit.make(**make), to, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parts_are_left_behind_where_that_is_allowed(tmp_path, kit):
    weights = kit.make("mim", "shared")
    source, allow = kit.save(weights, "ours", tmp_path), ["mask_token", "lm_head"]
    report = beit.convert(source, "timm", tmp_path / "t", allow=allow)
    assert "lm_head" in str(report)
    found = convert.read(tmp_path / "t")
    assert (found.kind, found.pooling) == ("backbone", "cls")
    assert set(weights.backbone) - set(found.backbone) == {"mask_token"}


def test_prediction_from_a_foreign_folder(tmp_path, kit):
    weights = kit.make()
    folder = kit.save(weights, "huggingface", tmp_path)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (record,) = beit.predict(folder, tmp_path / "image.png", top_k=5)
    plain = weights.preprocessing
    image = EvalTransform(
        image_size=24,
        mean=plain.mean,
        std=plain.std,
        crop_pct=plain.crop_pct,
        crop_mode=plain.crop_mode,
        interpolation=plain.interpolation,
    )(Image.fromarray(pixels))
    backbone, head = networks(weights)
    backbone.load_state_dict(weights.backbone)
    head.load_state_dict(weights.head)
    with torch.no_grad():
        best = head.eval()(backbone.eval()(image[None]))[0].softmax(0).argmax()
    assert record["top"][0]["index"] == best
    assert record["top"][0]["class"] == weights.classes[best]


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_the_processor_makes_our_pixels(interpolation, crop_pct, crop_mode, tmp_path, kit):
    plain = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), interpolation, crop_pct, crop_mode)
    weights = kit.make(size=56).changed(preprocessing=plain)
    folder = kit.save(weights, "huggingface", tmp_path)
    # what is cut off must be even: of an odd rest they cut half rounded down, we to the nearest
    height, width = (62, 88) if crop_pct == 0.9 else (90, 70)
    smooth = np.add.outer(np.arange(height), np.arange(width))[..., None] * np.array([1, 0.5, 0.8])
    image = Image.fromarray(smooth.astype(np.uint8))
    ours = EvalTransform(
        image_size=56,
        mean=plain.mean,
        std=plain.std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
    )(image)
    processor = BeitImageProcessorPil.from_pretrained(folder)
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert type(AutoImageProcessor.from_pretrained(folder)).__name__.startswith(
        "BeitImageProcessor"
    )
    found = convert.read(folder).preprocessing
    assert int(56 / found.crop_pct) == int(56 / crop_pct)  # 0.9 is written as 62 pixels
    assert replace(found, crop_pct=crop_pct) == plain


def finetuning_task(kit, size, classes=5):
    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, _ = networks(kit.make(size=size))
            self.head = ClassificationHead(22, classes)

    return Task()


@pytest.mark.parametrize("layout", ["unilm", "huggingface", "ours"])
def test_a_run_starts_from_pretrained_files_of_others(layout, tmp_path, kit):
    weights = kit.make("mim", "shared")
    task = finetuning_task(kit, 40)
    path = kit.save(weights, layout, tmp_path)
    # as within a training run, where no second config can be composed
    with initialize_config_dir(config_dir=str(ROOT / "configs"), version_base="1.3"):
        report = initialise(task, path)
    expected = resize_relative_table(weights.backbone[f"rel_pos_bias.{TABLE}"], (3, 3), (5, 5))
    for block in task.backbone.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, expected)
    key = "blocks.2.mlp.fc1.weight"
    assert torch.equal(task.backbone.state_dict()[key], weights.backbone[key])
    assert len(report.resized) == 3
    assert report.copied
    assert "head.lm_head.weight" in report.unexpected
    assert {"head.head.weight", "head.fc_norm.weight"} <= set(report.missing)


@pytest.mark.parametrize("classes", [5, 4])
def test_a_run_starts_from_finetuned_files_of_others(classes, tmp_path, kit):
    weights, task = kit.make(), finetuning_task(kit, 24, classes)
    report = initialise(task, kit.save(weights, "timm", tmp_path))
    assert torch.equal(task.head.fc_norm.weight, weights.head["fc_norm.weight"])
    carried = classes == 5  # a head of other classes begins anew
    assert ("head.head.weight" in report.loaded) == carried
    assert ("head.head.weight" in report.missing) != carried


def test_the_report_of_a_start_names_what_was_assumed(tmp_path, kit, caplog):
    path = tmp_path / "bare.pth"
    torch.save({"model": kit.make().released()}, path)
    with caplog.at_level("INFO", logger="beit"):
        initialise(finetuning_task(kit, 24), path)
    assert "normalize=imagenet" in caplog.text


@pytest.fixture
def script():
    return runpy.run_path(str(ROOT / "scripts" / "verify_official.py"))


def fabricated(kit, tmp_path, script, name="beit_base_patch16_224_pt22k_ft22kto1k"):
    """A small file of the official layout under a released name, an image, and its logits."""
    weights = kit.make().changed(classes=None)
    path, image = tmp_path / f"{name}.pth", tmp_path / "image.png"
    torch.save({"model": weights.released()}, path)
    pixels = np.random.default_rng(2).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    return weights, path, image, script["compute_logits"](weights, image, 1e-6)


def test_verification_of_a_fabricated_release(tmp_path, kit, script, capsys):
    weights, path, image, logits = fabricated(kit, tmp_path, script)
    count = sum(value.numel() for value in weights.released().values())
    published = {path.stem: (tuple(logits[:3].tolist()), int(logits.argmax()))}
    script["PARAMETERS"][22, 24, "classification", 5] = count
    script["PUBLISHED"].update(published)
    assert script["main"]([str(path), "--image", str(image)]) == 0
    assert capsys.readouterr().out.count(": ok,") == 4
    assert script["main"]([str(path)]) == 0
    assert "not checked, give --image" in capsys.readouterr().out
    script["PARAMETERS"][22, 24, "classification", 5] = count + 1
    assert script["main"]([str(path), "--image", str(image)]) == 1
    assert "parameters: WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["logit", "class", "epsilon"])
def test_verification_tells_other_logits(wrong, tmp_path, kit, script, capsys):
    weights, path, image, logits = fabricated(kit, tmp_path, script)
    three, best = logits[:3].tolist(), int(logits.argmax())
    if wrong == "logit":
        three[1] += 0.002
    elif wrong == "class":
        best = (best + 1) % 5
    else:
        three = script["compute_logits"](weights, image, 1e-12)[:3].tolist()
        assert max(abs(a - b) for a, b in zip(three, logits[:3].tolist())) < 1e-3
    script["PUBLISHED"][path.stem] = (tuple(three), best)
    code = script["main"]([str(path), "--image", str(image)])
    out = capsys.readouterr().out
    assert code == (0 if wrong == "epsilon" else 1)
    assert ("logits: WRONG" in out) == (wrong != "epsilon")
    assert script["main"]([str(tmp_path / "absent.pth")]) == 2


def test_known_parameter_counts(script):
    """Of the released models, built without memory."""
    from beit.interop.weights import Architecture, Weights

    for (width, size, what, outputs), count in script["PARAMETERS"].items():
        kind, _, absolute = what.partition(" ")
        mim = kind == "mim"
        arch = Architecture(
            image_size=(size, size),
            patch_size=16,
            width=width,
            depth=12 if width == 768 else 24,
            num_heads=width // 64,
            mlp_hidden=4 * width,
            absolute_position=bool(absolute),
            relative_position="none" if absolute else "shared" if mim else "per_block",
            layer_scale=0.0 if absolute else 0.1,
            mask_token=mim,
            final_norm=mim,
        )
        key = "lm_head.weight" if mim else "head.weight"
        with torch.device("meta"):
            head = {key: torch.empty(outputs, width)}
            pooling = "none" if mim else "mean"
            parts = networks(Weights(kind, arch, {}, head, pooling))
        assert sum(p.numel() for part in parts for p in part.parameters()) == count


def test_the_config_of_a_converted_file_is_a_runs(tmp_path, kit):
    """evaluate takes it: another data set and a changed key compose with it."""
    from beit.recorded import from_checkpoint

    for kind in ("mim", "classification, CLS"):
        (tmp_path / kind).mkdir()
        path = kit.save(kit.make(kind, "shared"), "ours", tmp_path / kind)
        cfg = from_checkpoint(path, ["data=digits", "batch.per_device=16"])
        assert cfg.model.width == 22
        assert cfg.loader.batch_size_per_device == 16
