"""Files as the official release has them: containers, grids, what they do not tell."""

import argparse
import io

import pytest
import torch
from rich.console import Console

import beit
from beit.errors import UserError
from beit.interop import convert
from beit.interop.released import index_grid
from beit.interop.weights import Settings
from beit.models.position import relative_position_index


def official(kit, tmp_path, wrap, kind="classification, mean", **changes):
    """A file as the release has it: index buffers, no word of ours."""
    weights = kit.make(kind, **changes)
    tensors = torch.load(kit.save(weights, "unilm", tmp_path), weights_only=True)["model"]
    path = tmp_path / "official.pth"
    torch.save(wrap(tensors), path)
    return weights, path


ARGS = argparse.Namespace(model="beit", imagenet_default_mean_and_std=True, device="cuda")
WRAPS = {
    "model": lambda t: {"model": t},
    "module": lambda t: {"module": t},
    "bare": lambda t: t,
    "training": lambda t: {"model": t, "optimizer": {"state": {}}, "epoch": 3, "args": ARGS},
    "parallel": lambda t: {"model": {f"module.{k}": v for k, v in t.items()}},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", ["mim", "classification, mean", "classification, CLS"])
def test_official_files(kind, wrap, tmp_path, kit):
    positions = "shared" if kind == "mim" else "per_block"
    weights, path = official(kit, tmp_path, WRAPS[wrap], kind, positions=positions)
    found = convert.read(path)
    kit.assert_same(found.changed(classes=weights.classes), weights)
    assert "unilm" in found.report.layout
    assert len(found.report.recomputed) == (1 if kind == "mim" else 3)
    assert found.preprocessing.mean == ((0.485, 0.456, 0.406) if wrap == "training" else (0.5,) * 3)
    assert bool(found.report.notes) == (wrap != "training")


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 4), (4, 4)])
def test_the_grid_is_read_off_the_index(grid):
    assert index_grid(relative_position_index(grid)) == grid


def test_official_files_of_other_grids(tmp_path, kit):
    weights, path = official(kit, tmp_path, WRAPS["model"], size=(24, 40))
    assert convert.read(path).architecture.image_size == (24, 40)
    stripped = {k: v for k, v in weights.released().items() if "index" not in k}
    torch.save({"model": stripped}, path)
    with pytest.raises(UserError, match="48 rows, which no square grid explains: say image_size"):
        convert.read(path)
    found = convert.read(path, Settings(image_size=(24, 40)))
    assert found.architecture.grid == (3, 5)
    with pytest.raises(UserError, match="it has 48"):
        convert.read(path, Settings(image_size=(40, 40)))


def test_heads_are_asked_for_where_nothing_tells(tmp_path, kit):
    weights, path = official(kit, tmp_path, WRAPS["model"], positions="absolute")
    with pytest.raises(UserError, match="say num_heads"):
        convert.read(path)
    found = convert.read(path, Settings(num_heads=2))
    kit.assert_same(found.changed(classes=weights.classes), weights)


def test_the_backbone_of_an_official_segmentation_checkpoint(tmp_path, kit):
    """By itself, or with the pyramid, but without a head."""
    weights, path = official(kit, tmp_path, WRAPS["bare"], "backbone, mean")
    tensors = torch.load(path, weights_only=True)
    inner = {f"backbone.{k}": v for k, v in tensors.items() if not k.startswith("fc_norm")}
    torch.save({"state_dict": inner}, path)
    found = convert.read(path)
    assert (found.kind, found.pooling) == ("backbone", "none")
    assert set(found.backbone) == set(weights.backbone)
    images = torch.randn(2, 3, 24, 24)
    for to in ("ours", "huggingface", "unilm"):
        output = tmp_path / {"ours": "o.safetensors", "unilm": "u.pth"}.get(to, "h")
        convert.convert(path, to, output, Settings())
        model = beit.load_model(output)
        with torch.no_grad():
            assert torch.equal(model(images), beit.load_model(path)(images))
        with pytest.raises(UserError, match="no pooling"):
            model.pooled(images)
    with pytest.raises(UserError, match="neither norm nor fc_norm"):
        convert.convert(path, "timm", tmp_path / "t", Settings())
    torch.save({"state_dict": {**inner, "backbone.fpn1.0.weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"explains pyramid\.fpn1.*allow=pyramid"):
        convert.read(path)
    report = convert.read(path, Settings(allow=("pyramid",))).report
    assert report.unexpected == ["pyramid.fpn1.0.weight"]


def test_missing_and_unexplained_tensors(tmp_path, kit):
    weights, path = official(kit, tmp_path, WRAPS["bare"])
    tensors = torch.load(path, weights_only=True)
    without = {k: v for k, v in tensors.items() if k != "blocks.1.mlp.fc2.bias"}
    torch.save(without, path)
    with pytest.raises(UserError, match=r"lacks blocks\.\*\.mlp\.fc2\.bias"):
        convert.read(path)
    torch.save({**tensors, "cls_pt_layers.0.norm1.weight": torch.zeros(22)}, path)
    with pytest.raises(UserError, match=r"explains cls_pt_layers.*allow=cls_pt_layers"):
        convert.read(path)
    found = convert.read(path, Settings(allow=("cls_pt_layers",)))
    kit.assert_same(found.changed(classes=weights.classes), weights)
    assert found.report.unexpected == ["cls_pt_layers.0.norm1.weight"]


def test_the_report_is_one_table(tmp_path, kit):
    _, path = official(kit, tmp_path, WRAPS["model"])
    report = convert.read(path).report
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    for text in (str(report), console.export_text()):
        for word in (
            "unilm",
            "loaded",
            "recomputed",
            "index buffers",
            "note",
            "normalize=imagenet",
        ):
            assert word in text
