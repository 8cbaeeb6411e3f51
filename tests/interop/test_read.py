"""What others write, and what nobody should: recognition by content, refusals."""

import argparse
import io
import json
import os
import pickle

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)

import beit
from beit.errors import UserError
from beit.interop import convert
from beit.interop.huggingface_names import renamed
from beit.interop.released import index_grid
from beit.interop.weights import Settings
from beit.models.position import relative_position_index

SIZES = {
    "hidden_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 88,
    "image_size": 24,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}


def theirs(opener, **changes):
    """A random model of transformers."""
    model = opener(BeitConfig(**{**SIZES, **changes}))
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def v5_file(model, folder):
    """Its own module names, which `save_pretrained` would turn into version 4's."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


@torch.no_grad()
@pytest.mark.parametrize("names", ["v4", "v5"])
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_transformers_classifiers(names, mean_pooling, tmp_path):
    changes = {
        "use_relative_position_bias": True,
        "use_mean_pooling": mean_pooling,
        "num_labels": 4,
    }
    model = theirs(BeitForImageClassification, **changes, id2label=dict(enumerate("abcd")))
    folder = tmp_path / "their"
    if names == "v4":
        model.save_pretrained(folder)
    else:
        v5_file(model, folder)
    weights = convert.read(folder)
    assert f"({names} names)" in str(weights.report)
    assert weights.classes == list("abcd")
    images = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(
        beit.load_model(folder)(images), model(images).logits, rtol=0, atol=1e-5
    )
    convert.convert(folder, "huggingface", tmp_path / "again", Settings())
    again = BeitForImageClassification.from_pretrained(tmp_path / "again").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key], value), key


@torch.no_grad()
@pytest.mark.parametrize("names", ["v4", "v5"])
@pytest.mark.parametrize("bias", ["shared_", ""])
def test_transformers_pretraining_models(names, bias, tmp_path):
    changes = {f"use_{bias}relative_position_bias": True, "use_mask_token": True, "vocab_size": 13}
    model = theirs(BeitForMaskedImageModeling, **changes)
    folder = tmp_path / "their"
    if names == "v4":
        model.save_pretrained(folder, safe_serialization=True)
    else:
        v5_file(model, folder)
    images, mask = torch.randn(3, 3, 24, 24), torch.rand(3, 3, 3) < 0.4
    expected = model(images, bool_masked_pos=mask.flatten(1)).logits[mask.flatten(1)]
    torch.testing.assert_close(beit.load_model(folder)(images, mask), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_bare_model_of_transformers(suffix, tmp_path):
    model = theirs(BeitModel, use_absolute_position_embeddings=True, layer_scale_init_value=0.0)
    model.config.save_pretrained(tmp_path)
    if suffix == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path)
    encoder, images = beit.load_model(tmp_path), torch.randn(2, 3, 24, 24)
    out = model(images)
    torch.testing.assert_close(encoder(images), out.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.pooled(images), out.pooler_output, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_default_epsilon_of_transformers_is_kept(tmp_path):
    model = theirs(BeitForImageClassification, layer_norm_eps=1e-2, num_labels=3)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(
        beit.load_model(tmp_path)(images), model(images).logits, rtol=0, atol=1e-5
    )


def test_the_backbone_of_a_segmentation_model_of_transformers(tmp_path):
    changes = {"use_relative_position_bias": True, "out_indices": [0, 1, 2, 3], "num_labels": 6}
    model = theirs(BeitForSemanticSegmentation, **changes)
    model.save_pretrained(tmp_path)
    weights = convert.read(tmp_path)
    assert weights.kind == "backbone"
    reason, left = next(iter(weights.report.left.items()))
    assert "segmentation" in reason
    assert any(key.startswith("decode_head.") for key in left)
    table = model.state_dict()["beit.layers.1.relative_position_bias.relative_position_bias_table"]
    assert torch.equal(weights.backbone["blocks.1.attn.relative_position_bias_table"], table)


def test_a_double_norm_is_refused(tmp_path):
    model = theirs(BeitForMaskedImageModeling, use_mask_token=True, use_mean_pooling=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="normalises twice"):
        convert.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected one of gelu"),
        ({"image_size": [24, 40]}, r"image_size \[24, 40\] is not square"),
        ({"num_attention_heads": 11}, r"bias_table has shape \[28, 2\].*\[28, 11\]"),
        ({"hidden_size": "22"}, "hidden_size is '22'; expected a whole number"),
        ({"id2label": {"0": "a"}}, "id2label has 1 classes, and the classifier beside it 5"),
        ({"model_type": "vit"}, "is of another model"),
        ({"intermediate_size": 44}, r"fc1.weight has shape \[88, 22\].*\[44, 22\]"),
        ({"num_hidden_layers": 4}, "lacks blocks"),
        ({"num_hidden_layers": 2}, "nothing here explains blocks"),
        ({"use_shared_relative_position_bias": True}, "one of two"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, words, tmp_path, kit):
    path = kit.save(kit.make(), "huggingface", tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        convert.read(path.parent)


def test_names_of_a_key_bias_are_nobodys():
    key = "layers.0.attention.k_proj.bias"
    assert list(renamed({key: torch.zeros(2)}, "x")) == [key]
    with pytest.raises(UserError, match="lacks a part of q, k and v"):
        renamed({"layers.0.attention.q_proj.weight": torch.zeros(2, 2)}, "x")


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
    weights, path = official(kit, tmp_path, WRAPS["bare"], "backbone, mean")
    tensors = torch.load(path, weights_only=True)
    inner = {f"backbone.{k}": v for k, v in tensors.items() if not k.startswith("fc_norm")}
    heads = {
        "backbone.fpn1.0.weight": torch.zeros(2),
        "decode_head.conv_seg.weight": torch.zeros(2),
        "auxiliary_head.conv_seg.bias": torch.zeros(2),
    }
    torch.save({"state_dict": {**inner, **heads}, "meta": {"CLASSES": ("wall",)}}, path)
    found = convert.read(path)
    assert (found.kind, found.pooling) == ("backbone", "none")
    assert set(found.backbone) == set(weights.backbone)
    assert list(found.report.left.values()) == [list(heads)]
    assert "decode_head.conv_seg.weight" in str(found.report)
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
    torch.save({"state_dict": {**inner, **heads, "odd_head.weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"explains odd_head\.weight.*allow=odd_head"):
        convert.read(path)


def test_timms_own_files(tmp_path):
    arguments = {"img_size": 24, "patch_size": 8, "embed_dim": 22, "depth": 3, "num_heads": 2}
    model = timm.create_model("beit_base_patch16_224", **arguments, num_classes=5).eval()
    for file in ("bare.pth", "train.pth", "bare.safetensors"):
        path, state = tmp_path / file, model.state_dict()
        if file == "bare.safetensors":
            save_file(state, path)
        else:
            torch.save(state if file == "bare.pth" else {"arch": "x", "state_dict": state}, path)
        found = convert.read(path)
        assert found.report.layout == "timm"
        images = torch.randn(2, 3, 24, 24)
        with torch.no_grad():
            got, expected = beit.load_model(path)(images), model(images)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    folder = tmp_path / "hub"
    labels = {"label_names": list("vwxyz")}
    timm.models.save_for_hf(model, folder, model_config=labels, safe_serialization=True)
    found = convert.read(folder)
    assert found.classes == list("vwxyz")
    assert found.preprocessing.crop_pct == 0.9
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 7}))
    with pytest.raises(UserError, match="num_classes is 7, and the head beside it has 5"):
        convert.read(folder)


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["entry", "args", "plain pickle", "folder"])
def test_a_hostile_pickle_does_not_run(where, tmp_path, kit):
    target, path = tmp_path / "ran", tmp_path / "w.pth"
    tensors = kit.make().released()
    if where == "folder":
        config = kit.save(kit.make(), "huggingface", tmp_path) / "config.json"
        (config.parent / "model.safetensors").unlink()
        torch.save({"x": Hostile(target)}, config.parent / "pytorch_model.bin")
        path = config.parent
    elif where == "plain pickle":
        path.write_bytes(pickle.dumps(Hostile(target)))
    else:
        beside = argparse.Namespace(x=Hostile(target)) if where == "args" else Hostile(target)
        torch.save({"model": tensors, "args": beside}, path)
    for open_it in (convert.read, beit.load_model):
        with pytest.raises(UserError, match=r"refused|damaged"):
            open_it(path)
    assert not target.exists()
    if where == "entry":  # as it would have
        torch.load(path, weights_only=False)
        assert target.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"encoder.weight": torch.zeros(1), "decoder.bias": torch.zeros(1)},
            "no layout.*encoder.weight",
        ),
        ({"model": {"cls_token": 3}}, "holds more than tensors by name: cls_token is int"),
        ([torch.zeros(1)], "holds list"),
        ({}, "first tensors are none"),
    ],
)
def test_files_of_no_known_layout(content, words, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=words) as caught:
        convert.read(path)
    assert "w.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
    if "no layout" in str(caught.value):
        for word in ("ours", "unilm", "timm", "Hugging Face", "segmentation"):
            assert word in str(caught.value)


@pytest.mark.parametrize("layout", ["unilm", "timm", "huggingface", "ours"])
def test_files_cut_short_are_named(layout, tmp_path, kit):
    path = kit.save(kit.make(), layout, tmp_path)
    file = path / "model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=file.name):
            convert.read(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nothing at .*absent"):
        convert.read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        convert.read(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        beit.load_model(tmp_path / "absent.pth")


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


def test_a_wrong_number_of_class_names_names_both(tmp_path, kit):
    path = kit.save(kit.make(), "ours", tmp_path)
    with pytest.raises(UserError, match="4 class names for a head of 5 classes"):
        convert.read(path, Settings(classes=list("abcd")))


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
