"""Weights in several files beside an index, as transformers saves large models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BeitConfig, BeitForImageClassification

import beit
from beit.errors import UserError
from beit.interop import convert


@torch.no_grad()
def test_what_transformers_writes_in_several_files(tmp_path):
    sizes = {"hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 88, "image_size": 24, "patch_size": 8, "num_labels": 4}
    model = BeitForImageClassification(BeitConfig(**sizes, use_relative_position_bias=True)).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    images = torch.randn(2, 3, 24, 24)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        found = beit.load_model(path)(images)
        torch.testing.assert_close(found, model(images).logits, rtol=0, atol=1e-5)


@pytest.fixture(params=["safetensors", "bin"])
def parted(request, tmp_path, kit):
    """(folder, index, content of the index) of weights in two files."""
    folder = kit.save(kit.make(), "huggingface", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = ("model", "safetensors")
    if request.param == "bin":
        stem, suffix = ("pytorch_model", "bin")
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    places = {key: names[number % 2] for number, key in enumerate(tensors)}
    for name in names:
        part = {key: value for key, value in tensors.items() if places[key] == name}
        save = save_file if suffix == "safetensors" else torch.save
        save(part, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    content = {"metadata": {}, "weight_map": places}
    index.write_text(json.dumps(content))
    return folder, index, content


def test_both_kinds_of_parts_are_put_together(parted, kit):
    kit.assert_same(convert.read(parted[0]), kit.make())


def test_a_part_alone_is_told_from_the_whole(parted):
    part = next(parted[0].glob("*-of-*"))
    with pytest.raises(UserError, match=r"is one part of several: give its folder"):
        convert.read(part)


def test_a_damaged_or_missing_part_is_named(parted):
    part = sorted(parted[0].glob("*-of-*"))[1]
    part.write_bytes(part.read_bytes()[:500])
    with pytest.raises(UserError, match=rf"{part.name}.*damaged"):
        convert.read(parted[0])
    part.unlink()
    with pytest.raises(UserError, match=rf"names {part.name}, which is no file beside it"):
        convert.read(parted[0])


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({}, "names 0 files"),
        ({"x": "../hf/config.json"}, "no file beside it"),
        ({"x": "/etc/passwd"}, "no file beside it"),
        ({"x": 7}, "no file beside it"),
        ({"x": ".."}, "no file beside it"),
        ({"x": "{index}"}, "damaged|refused"),
        ({"y.weight": "{part}"}, r"lists y\.weight, which its files do not hold"),
        ({str(i): str(i) for i in range(1001)}, "names 1001 files"),
    ],
)
def test_an_index_that_is_none(places, words, parted):
    folder, index, content = parted
    part = next(iter(content["weight_map"].values()))
    names = {"{index}": index.name, "{part}": part}
    changed = {key: names.get(str(name), name) for key, name in places.items()}
    index.write_text(json.dumps({"weight_map": changed}))
    with pytest.raises(UserError, match=words) as caught:
        convert.read(folder)
    assert "\n" not in str(caught.value)
