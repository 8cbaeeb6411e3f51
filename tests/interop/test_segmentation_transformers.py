"""BeitForSemanticSegmentation: its names of versions 4 and 5, its settings, its fault."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import BeitConfig, BeitForSemanticSegmentation, BeitImageProcessor

import beit
from beit.errors import UserError
from beit.interop import convert
from beit.interop.decoder import Labels
from beit.interop.weights import Settings

SIZES = {
    "hidden_size": 22,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 88,
    "image_size": 24,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "use_relative_position_bias": True,
    "out_indices": [2, 3, 4, 5],
    "auxiliary_channels": 7,
}
SURFACES = ["road", "sky", "tree", "wall", "bed"]


def theirs(kit, **changes):
    """A random model of transformers, its statistics too."""
    labels = {"id2label": dict(enumerate(SURFACES)), "num_labels": 5}
    model = BeitForSemanticSegmentation(BeitConfig(**{**SIZES, **labels, **changes}))
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kit.as_trained(model)
    return model.eval()


@pytest.fixture(params=["v4", "v5"])
def save(request):
    """Writes a model with the names of a version, of which 4 knows only its own."""
    if request.param == "v5" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 cannot write the names of version 5")

    def write(model, folder):
        model.save_pretrained(folder)  # in version 4's names
        if request.param == "v5":
            tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(tensors, folder / "model.safetensors")
        return folder

    return write


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_auxiliary_head": False}, {"auxiliary_num_convs": 2}, {"use_mean_pooling": False}],
)
def test_what_transformers_writes(changes, save, kit, tmp_path):
    """Read, and written again: the same tensors, their counters and statistics among them."""
    model = theirs(kit, **changes)
    found = convert.read(save(model, tmp_path / "their"))
    assert (found.kind, found.classes, found.decoder.taps) == (
        "segmentation",
        SURFACES,
        (2, 3, 4, 5),
    )
    assert len(found.decoder.auxiliary) == model.config.use_auxiliary_head
    convert.write(found, "huggingface", tmp_path / "again")
    again = BeitForSemanticSegmentation.from_pretrained(tmp_path / "again").state_dict()
    for key, value in model.state_dict().items():
        assert again[key].dtype == value.dtype, key
        assert torch.equal(again[key], value), key


@torch.no_grad()
def test_the_blocks_that_transformers_computes_with(save, kit, tmp_path):
    """Its fault: [2, 3, 4, 5] is after blocks 1, 2, 3 and 4, counted from 1; released is 3 to 6.

    With the fault allowed for, by taps= two before, our logits are its own.
    """
    model, images = theirs(kit), torch.randn(3, 3, 24, 24)
    folder = save(model, tmp_path / "their")
    logits = model(images).logits
    report = convert.read(folder).report
    assert "the blocks two before: if it was trained there, say taps=0,1,2,3" in str(report)
    as_released = beit.load_model(folder).coarse_logits(images)
    assert kit.difference(as_released, logits) > 0.1
    beit.convert(folder, "ours", tmp_path / "w.safetensors", taps=[0, 1, 2, 3])
    network = beit.load_model(tmp_path / "w.safetensors")
    torch.testing.assert_close(network.coarse_logits(images), logits, rtol=0, atol=1e-5)
    resized = torch.nn.functional.interpolate(logits, (24, 24), mode="bilinear")
    torch.testing.assert_close(network(images), resized, rtol=0, atol=1e-5)
    beit.convert(tmp_path / "w.safetensors", "huggingface", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["out_indices"] == [0, 1, 2, 3]


@torch.no_grad()
def test_reading_the_older_name_of_the_blocks(kit, tmp_path):
    """`segmentation_indices`, as the config of old folders has it."""
    theirs(kit).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["segmentation_indices"] = config.pop("out_indices")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert.read(tmp_path).decoder.taps == (2, 3, 4, 5)


@pytest.mark.parametrize(("reduced", "ignored"), [(True, 250), (False, -100)])
def test_settings_travel(reduced, ignored, kit, tmp_path):
    """What their config and processor say arrives, by their own loader, and comes back."""
    weights = kit.make("segmentation")
    weights = weights.changed(labels=Labels(reduce_zero=reduced, ignore_index=ignored))
    folder = kit.save(weights, "huggingface", tmp_path)
    model = BeitForSemanticSegmentation.from_pretrained(folder)
    assert [model.config.id2label[i] for i in range(5)] == weights.classes
    assert model.config.semantic_loss_ignore_index == ignored
    assert model.config.auxiliary_loss_weight == 0.3
    processor = BeitImageProcessor.from_pretrained(folder)
    assert processor.do_reduce_labels == reduced
    assert (processor.size["height"], processor.size["width"]) == (24, 24)
    assert (tuple(processor.image_mean), processor.resample) == ((0.4, 0.5, 0.6), 2)
    found = convert.read(folder)
    kit.assert_same(found, weights)
    assert found.preprocessing == weights.preprocessing
    convert.write(found, "ours", tmp_path / "w.safetensors")
    assert convert.read(tmp_path / "w.safetensors").labels == weights.labels
    path = folder / "preprocessor_config.json"
    old = json.loads(path.read_text())
    old["reduce_labels"] = old.pop("do_reduce_labels")  # as older versions called it
    path.write_text(json.dumps(old))
    assert convert.read(folder).labels.reduce_zero == reduced


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool_scales": [1, 2, 3, 5]}, r"pool_scales is \[1, 2, 3, 5\]; expected \[1, 2, 3, 6\]"),
        ({"auxiliary_concat_input": True}, "auxiliary_concat_input is True"),
        ({"use_auxiliary_head": False}, "use_auxiliary_head is False"),
        ({"out_indices": None}, "has no segmentation_indices"),
        ({"out_indices": [2, 3, 4]}, r"taps \[2, 3, 4\] must be 4 blocks"),
        ({"out_indices": [3, 4, 5, 6]}, r"blocks are 0 to 5: say taps="),
        ({"out_indices": [2, 3, 4, -1]}, "a list of whole numbers"),
        ({"id2label": {"0": "a"}}, "id2label has 1 classes, and the classifier beside it 5"),
        ({"semantic_loss_ignore_index": 0.5}, "semantic_loss_ignore_index is 0.5"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, words, kit, tmp_path):
    path = kit.save(kit.make("segmentation"), "huggingface", tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words) as caught:
        convert.read(path.parent)
    assert "\n" not in str(caught.value)


def test_a_head_that_the_config_tells_of_and_that_is_missing(kit, tmp_path):
    """Without it the file would pass for a backbone."""
    folder = kit.save(kit.make("segmentation"), "huggingface", tmp_path)
    found = convert.read(folder)
    tensors = {f"beit.{k}": v for k, v in found.backbone.items()}
    save_file(
        {"beit.embeddings.patch_embeddings.projection.weight": torch.zeros(1), **tensors},
        folder / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"BeitForSemanticSegmentation, .* have no decode_head\.\*"):
        convert.read(folder)


def test_other_blocks_of_a_read_folder(kit, tmp_path):
    weights = kit.make("segmentation")
    folder = kit.save(weights, "huggingface", tmp_path)
    found = convert.read(folder, Settings(taps=(0, 1, 4, 5)))
    kit.assert_same(found, weights.changed(decoder=replace(weights.decoder, taps=(0, 1, 4, 5))))
    assert "two before" not in str(found.report)
