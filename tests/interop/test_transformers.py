"""What transformers writes, with the names of version 4 and of version 5."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
)

import beit
from beit.errors import UserError
from beit.interop import convert
from beit.interop.huggingface_names import renamed
from beit.interop.weights import Settings

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


@pytest.fixture(params=["v4", "v5"])
def names(request):
    """Version 4 has no other names than its own."""
    if request.param == "v5" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 cannot write the names of version 5")
    return request.param


def v5_file(model, folder):
    """Its own module names, which `save_pretrained` would turn into version 4's."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


@torch.no_grad()
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
        ({"model_type": "vit"}, "the config.json of another model"),
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
