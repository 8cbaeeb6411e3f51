"""What nobody should read, and what is not what it seems: one line that tells why."""

import argparse
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import beit
from beit.errors import UserError
from beit.interop import convert
from beit.interop.weights import Settings


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


def test_a_wrong_number_of_class_names_names_both(tmp_path, kit):
    path = kit.save(kit.make(), "ours", tmp_path)
    with pytest.raises(UserError, match="4 class names for a head of 5 classes"):
        convert.read(path, Settings(classes=list("abcd")))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_told(odd, tmp_path, kit):
    weights = kit.make()
    path = kit.save(weights, "timm", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["blocks.1.norm1.bias"][3] = odd
    save_file(tensors, path / "model.safetensors")
    report = convert.read(path).report
    assert report.warnings == ["NaN or infinite numbers in blocks.1.norm1.bias"]
    for text in (str(report), "\n".join(report.remarks())):
        assert text.count("infinite") == 1
        assert [line[:7] for line in text.splitlines() if "infinite" in line] == ["warning"]
    assert "infinite" not in str(convert.read(kit.save(weights, "unilm", tmp_path)).report)


TABLE = "blocks.0.attn.relative_position_bias_table"


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "head.weight": torch.tensor(5.0)}, r"head\.weight has shape \[\]"),
        (lambda t: {**t, "head.weight": t["head.weight"].T}, r"shape \[22, 5\].*\[22, 22\]"),
        (lambda t: {**t, TABLE: torch.tensor(5.0)}, f"{TABLE} is missing, or no tensor"),
        (lambda t: {**t, TABLE: (9 * t[TABLE]).to(torch.int8)}, "is torch.int8.*quantised"),
        (lambda t: {**t, TABLE: t[TABLE].to_sparse()}, "sparse weights are not read"),
        (lambda t: {k: v for k, v in t.items() if k != "head.bias"}, r"lacks head\.bias"),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("fc_norm.")},
            r"lacks fc_norm \(mean pooling\) or norm",
        ),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("blocks.2.")},
            "entry beit tells of a depth of 3, and its tensors are of 2",
        ),
    ],
)
def test_tensors_that_are_not_what_they_seem(change, words, tmp_path, kit):
    path = kit.save(kit.make(), "unilm", tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "model": change(content["model"])}, path)
    with pytest.raises(UserError, match=words) as caught:
        convert.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_a_head_that_the_config_tells_of_and_that_is_missing(layout, tmp_path, kit):
    """Without it the file would pass for a backbone."""
    file = kit.save(kit.make(), layout, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    left = {k: v for k, v in tensors.items() if not k.startswith(("classifier.", "head."))}
    assert len(left) == len(tensors) - 2
    save_file(left, file)
    with pytest.raises(UserError, match=r"have no classifier\.\*|has 0 classes"):
        convert.read(file.parent)


def test_a_plain_vision_transformer_is_none_of_ours(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"no layout that is known.*attn\.q_bias"):
        convert.read(tmp_path / "vit.pth")


def test_a_file_beside_the_weights(tmp_path, kit):
    folder = kit.save(kit.make(), "huggingface", tmp_path)
    with pytest.raises(UserError, match=r"config\.json holds no weights: give its folder"):
        convert.read(folder / "config.json")
    (folder / "config.json").unlink()
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=r"has no config\.json|beside it lies no config\.json"):
            convert.read(path)


@pytest.mark.parametrize("layout", ["unilm", "timm", "huggingface", "ours"])
@pytest.mark.parametrize(
    ("said", "words"),
    [({"num_heads": 11}, "num_heads=11"), ({"image_size": (48, 48)}, r"image_size=\(48, 48\)")],
)
def test_settings_that_contradict_the_file(said, words, layout, tmp_path, kit):
    path = kit.save(kit.make(), layout, tmp_path)
    with pytest.raises(UserError, match=words):
        convert.read(path, Settings(**said))
