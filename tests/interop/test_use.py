"""Converted files in use: the command line, refusals to write, prediction, a recorded config."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import beit
from beit import cli
from beit.data.views import EvalTransform
from beit.errors import UserError
from beit.interop import convert
from beit.interop.checks import networks
from beit.interop.decoder import Labels
from beit.recorded import from_checkpoint


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
        (["to=timm", "taps=1,x"], "taps=1,x: expected whole numbers with commas between them"),
        (["to=timm", "taps=3,2,1,0"], "taps [3, 2, 1, 0] must be 4 blocks"),
        (["to=timm", "taps=0,1,2,3"], "is no segmentation model"),
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


@pytest.mark.parametrize("layout", ["unilm", "huggingface", "ours"])
def test_segments_and_scores_of_a_foreign_file(layout, tmp_path, kit):
    """Of images as large as the window: the bilinearly enlarged logits of the file's network."""
    weights = kit.make("segmentation").changed(labels=Labels(reduce_zero=True))
    source = kit.save(weights, layout, tmp_path)
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    values = generator.integers(0, 6, (24, 24), dtype=np.uint8)
    for name, array in (("images", pixels), ("annotations", values)):
        for split in ("train", "val"):
            (tmp_path / name / split).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / name / split / "a.png")
    (record,) = beit.predict(source, tmp_path / "images" / "val", output=tmp_path / "out")
    found = np.asarray(Image.open(record["files"]["ids"]))

    plain = weights.preprocessing
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (plain.mean, plain.std))
    network = beit.load_model(source)
    with torch.no_grad():
        expected = network((image - mean)[None] / std)[0].argmax(0).numpy()
    assert np.array_equal(found, expected)
    assert {area["class"] for area in record["areas"]} <= set(weights.classes)

    words = [f"paths.data_dir={tmp_path}", "loader.num_workers=0", "batch.per_device=1"]
    scores = beit.evaluate(source, *words, "batch.global_size=1", "trainer.precision=32-true")
    counted = values > 0  # in ADE20K's manner 0 is none
    hits = (values[counted] - 1 == expected[counted]).mean()
    assert scores["val/pixel_acc"] == pytest.approx(hits, abs=1e-6)


def test_the_config_of_a_converted_file_is_a_runs(tmp_path, kit):
    """evaluate takes it: another data set and a changed key compose with it."""
    for kind in ("mim", "classification, CLS"):
        (tmp_path / kind).mkdir()
        path = kit.save(kit.make(kind, "shared"), "ours", tmp_path / kind)
        cfg = from_checkpoint(path, ["data=digits", "batch.per_device=16"])
        assert cfg.model.width == 22
        assert cfg.loader.batch_size_per_device == 16
