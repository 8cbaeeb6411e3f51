"""Segmentation models: the released layout by names and shapes, what is told, what is refused."""

from dataclasses import replace

import literal_unilm
import pytest
import torch

import beit
from beit.errors import UserError
from beit.interop import convert
from beit.interop.checks import networks
from beit.interop.decoder import Decoder, Head, Labels, usual_taps
from beit.interop.segmentation import to_unilm
from beit.interop.weights import Architecture, Settings, Weights
from beit.models.position import relative_position_index
from beit.recorded import from_checkpoint

WIDTH, CLASSES, GRID = 22, 5, 3


def released(depth, width, heads, size):
    """Our network of a released model, without memory."""
    arch = Architecture(
        image_size=(size, size),
        patch_size=16,
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_hidden=4 * width,
        absolute_position=False,
        relative_position="per_block",
        layer_scale=0.1,
        mask_token=False,
        final_norm=False,
    )
    heads = Head.of("UPerNetHead", channels=width), (Head.of("FCNHead"),)
    decoder = Decoder(*heads, taps=usual_taps(depth, []), pyramid=True)
    with torch.device("meta"):
        head = {"head.conv_seg.weight": torch.empty(150, width, 1, 1)}
        return decoder, networks(Weights("segmentation", arch, {}, head, "none", decoder=decoder))


@pytest.mark.parametrize(
    ("depth", "width", "heads", "size", "count", "taps"),
    [
        (12, 768, 12, 640, 163_407_980, (3, 5, 7, 11)),
        (24, 1024, 16, 640, 441_271_084, (7, 11, 15, 23)),
    ],
)
def test_the_released_names_and_shapes(depth, width, heads, size, count, taps):
    decoder, parts = released(depth, width, heads, size)
    assert decoder.taps == taps
    ours = {to_unilm(k, auxiliary=1): v for part in parts for k, v in part.state_dict().items()}
    theirs = literal_unilm.segmentation_shapes(width, depth, heads, size // 16, 150)
    theirs = {k: shape for k, shape in theirs.items() if not k.endswith("position_index")}
    assert {key: tuple(value.shape) for key, value in ours.items()} == theirs
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    counted = sum(value.numel() for key, value in ours.items() if not key.endswith(buffers))
    assert counted == count


def fabricated():
    """A file of the released layout, by the literal list, with random numbers."""
    generator = torch.Generator().manual_seed(3)
    shapes = literal_unilm.segmentation_shapes(WIDTH, 12, 2, GRID, CLASSES, patch=8, auxiliary=7)
    tensors = {}
    for key, shape in shapes.items():
        if key.endswith("position_index"):
            tensors[key] = relative_position_index((GRID, GRID))
        elif key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(160_000)
        elif key.endswith("running_var"):
            tensors[key] = torch.rand(shape, generator=generator) + 0.5
        else:
            tensors[key] = 0.3 * torch.randn(shape, generator=generator)
    return tensors


META = {
    "CLASSES": ("wall", "sky", "tree", "road", "bed"),
    "PALETTE": [[i, 0, 255] for i in range(5)],
}
WRAPS = {
    "state_dict": lambda t: {"meta": META, "state_dict": t, "optimizer": {"state": {}}},
    "model": lambda t: {"model": t, "meta": META},
    "bare": lambda t: t,
}


@torch.no_grad()
@pytest.mark.parametrize("wrap", WRAPS)
def test_released_files(wrap, tmp_path):
    tensors, path = fabricated(), tmp_path / "official.pth"
    torch.save(WRAPS[wrap](tensors), path)
    found = convert.read(path)
    told = wrap != "bare"
    assert found.report.layout == "unilm (official), segmentation"
    assert len(found.report.recomputed) == 12
    assert found.decoder.taps == (3, 5, 7, 11)
    assert found.classes == (list(META["CLASSES"]) if told else None)
    assert found.labels == Labels(palette=META["PALETTE"] if told else None)
    assert found.preprocessing.mean == (0.485, 0.456, 0.406)
    assert found.preprocessing.interpolation == "bilinear"
    convert.convert(path, "unilm", tmp_path / "again.pth", Settings())
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert set(again["state_dict"]) == set(tensors)
    for key, value in tensors.items():
        assert again["state_dict"][key].dtype == value.dtype, key
        assert torch.equal(again["state_dict"][key], value), key
    assert again["meta"].get("PALETTE") == found.labels.palette
    assert convert.read(tmp_path / "again.pth").labels == found.labels


def test_files_of_ade20k_count_from_one(tmp_path):
    tensors = fabricated()
    for key in ("decode_head.conv_seg", "auxiliary_head.conv_seg"):
        for name in ("weight", "bias"):
            tensors[f"{key}.{name}"] = tensors[f"{key}.{name}"].repeat_interleave(30, dim=0)
    torch.save({"state_dict": tensors}, tmp_path / "w.pth")
    found = convert.read(tmp_path / "w.pth")
    assert (found.num_outputs, found.labels.reduce_zero) == (150, True)
    assert "0 is taken for none" in str(found.report)
    convert.write(found, "ours", tmp_path / "w.safetensors")
    cfg = from_checkpoint(tmp_path / "w.safetensors", [])
    assert cfg.data.ids.reduce_zero_label
    assert cfg.data.num_classes == 150


def test_the_blocks_are_told_by_the_training_config_or_the_user(tmp_path):
    text = "model = dict(backbone=dict(type='BEiT', depth=12, out_indices=[2, 4, 6, 8]))"
    content = {"state_dict": fabricated(), "meta": {"config": text}}
    torch.save(content, tmp_path / "w.pth")
    assert convert.read(tmp_path / "w.pth").decoder.taps == (2, 4, 6, 8)
    found = convert.read(tmp_path / "w.pth", Settings(taps=(1, 3, 5, 7)))
    assert found.decoder.taps == (1, 3, 5, 7)
    with pytest.raises(UserError, match=r"blocks \[3, 5, 7, 12\].*0 to 11: say taps="):
        convert.read(tmp_path / "w.pth", Settings(taps=(3, 5, 7, 12)))


def test_blocks_that_nothing_tells_are_assumed_with_a_word(tmp_path, kit):
    weights = kit.make("segmentation")
    content = torch.load(kit.save(weights, "unilm", tmp_path), weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "bare.pth")
    found = convert.read(tmp_path / "bare.pth")
    assert found.decoder.taps == (1, 2, 3, 5)
    assert "1,2,3,5 are taken, counted from 0; say taps=" in str(found.report)


def test_names_palette_and_weight_travel(tmp_path, kit):
    labels = Labels(reduce_zero=True, ignore_index=7, palette=[[9, 8, i] for i in range(5)])
    weights = kit.make("segmentation").changed(labels=labels)
    for to in ("unilm", "ours"):
        path = kit.save(weights, to, tmp_path)
        kit.assert_same(convert.read(path), weights)
    cfg = from_checkpoint(path, ["data.val.images=/x", "batch.per_device=4"])
    assert list(cfg.data.classes) == weights.classes
    assert [list(colour) for colour in cfg.data.ids.palette] == labels.palette
    assert (list(cfg.data.ids.ignore), cfg.data.ids.reduce_zero_label) == ([7], True)
    assert cfg.task.auxiliary_weight == 0.3
    assert cfg.task.pyramid.taps == [2, 3, 4, 5]
    assert cfg.inference.window == 24


SETR = Decoder(
    head=Head.of("SETRPUPHead", channels=6, num_upsamples=2),
    auxiliary=tuple(
        Head.of("SETRPUPHead", channels=5, num_upsamples=1, scale=4, map_index=i) for i in range(2)
    ),
    taps=(2, 3, 4, 5),
    pyramid=False,
)
LINEAR = Decoder(Head.of("LinearHead"), (), taps=(2, 3, 4, 5), pyramid=False)
WIDER = Decoder(Head.of("UPerNetHead", channels=6), (), taps=(2, 3, 4, 5), pyramid=True)
TWICE = replace(WIDER, head=Head.of("UPerNetHead", channels=WIDTH), taps=(2, 2, 4, 5))
FINER = replace(WIDER, head=Head.of("UPerNetHead", channels=WIDTH, pool_scales=[1, 2, 3, 4]))
SECOND = replace(TWICE, taps=(2, 3, 4, 5), auxiliary=(Head.of("FCNHead", map_index=1),))


@pytest.mark.parametrize(
    "decoder", [SETR, LINEAR, replace(SETR, pyramid=True), WIDER, SECOND, FINER]
)
def test_every_head_in_our_own_layout(decoder, tmp_path, kit):
    weights = kit.make("segmentation", decoder=decoder)
    path = kit.save(weights, "ours", tmp_path)
    kit.assert_same(convert.read(path), weights)
    model = beit.load_model(path)
    with torch.no_grad():
        maps = model.maps(kit.inputs(weights)[0])
        logits = torch.cat([head(maps).flatten() for head in (model.head, *model.auxiliary)])
    assert torch.equal(logits, kit.reference(weights))


@pytest.mark.parametrize("decoder", [replace(SETR, pyramid=True), WIDER, SECOND])
def test_heads_of_openmmlab_in_the_official_layout(decoder, tmp_path, kit):
    weights = kit.make("segmentation", decoder=decoder)
    path = kit.save(weights, "unilm", tmp_path)
    kit.assert_same(convert.read(path), weights)
    names = torch.load(path, weights_only=True)["state_dict"]
    numbered = any(key.startswith("auxiliary_head.0.") for key in names)
    assert numbered == (len(decoder.auxiliary) > 1)


@pytest.mark.parametrize(
    ("decoder", "to", "words"),
    [
        (SETR, "unilm", "without a pyramid.*say allow=head"),
        (replace(LINEAR, pyramid=True), "unilm", "LinearHead: OpenMMLab has no such head"),
        (SETR, "huggingface", "has the pyramid built in"),
        (replace(SETR, pyramid=True), "huggingface", "UPerNet as its head, and .* SETRPUPHead"),
        (WIDER, "huggingface", "the backbone's 22 channels, not 6"),
        (SECOND, "huggingface", "an FCN on the third map; leave others with allow=auxiliary"),
        (FINER, "huggingface", r"pools to \[1, 2, 3, 6\], not \[1, 2, 3, 4\]"),
        (TWICE, "huggingface", r"no block twice.*\[2, 2, 4, 5\]"),
        (WIDER, "timm", "no segmentation model"),
    ],
)
def test_what_a_layout_cannot_hold(decoder, to, words, tmp_path, kit):
    with pytest.raises(UserError, match=words):
        kit.save(kit.make("segmentation", decoder=decoder), to, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["head", "pyramid.fpn1"])
def test_the_backbone_alone(name, tmp_path, kit):
    weights = kit.make("segmentation", decoder=SETR if name == "head" else WIDER)
    source = kit.save(weights, "ours", tmp_path)
    for to in ("unilm", "huggingface"):
        output = tmp_path / {"unilm": "b.pth"}.get(to, "b")
        report = beit.convert(source, to, output, allow=[name])
        assert set(report.left["as allowed"]) == set(weights.head)
        found = convert.read(output)
        assert (found.kind, found.decoder, found.classes) == ("backbone", None, None)
        assert all(torch.equal(found.backbone[k], v) for k, v in weights.backbone.items())


def test_without_auxiliary_heads(tmp_path, kit):
    weights = kit.make("segmentation")
    source = kit.save(weights, "unilm", tmp_path)
    beit.convert(source, "huggingface", tmp_path / "hf", allow=["auxiliary.0.convs"])
    found = convert.read(tmp_path / "hf")
    kept = {k: v for k, v in weights.head.items() if not k.startswith("auxiliary.")}
    decoder = replace(weights.decoder, auxiliary=())
    kit.assert_same(found, weights.changed(head=kept, decoder=decoder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("decode_head.bottleneck.bn.running_var", None), "lacks head.bottleneck.bn.running_var"),
        (("auxiliary_head.conv_seg.bias", None), "lacks auxiliary.0.conv_seg.bias"),
        (("decode_head.conv_seg.weight", None), "nothing here explains"),
        (("backbone.fpn1.3.weight", None), "lacks pyramid.fpn1.3.weight"),
        (("auxiliary_head.0.conv_seg.bias", torch.zeros(5)), "are there twice"),
        (("odd_head.weight", torch.zeros(1)), r"explains odd_head\.weight.*allow=odd_head"),
        (("auxiliary_head.conv_seg.bias", torch.zeros(4)), r"shape \[4\].*\[5\]"),
        (("decode_head.conv_seg.weight", torch.zeros(5, WIDTH)), "expected classes by width"),
        (("backbone.fpn1.1.num_batches_tracked", torch.tensor(1, dtype=torch.int8)), "torch.int8"),
        (("backbone.fpn1.1.weight", torch.zeros(WIDTH, dtype=torch.int64)), "torch.int64"),
    ],
)
def test_tensors_that_are_not_what_they_should_be(change, words, tmp_path):
    key, value = change
    tensors = {**fabricated(), key: value}
    torch.save(
        {"state_dict": {k: v for k, v in tensors.items() if v is not None}}, tmp_path / "w.pth"
    )
    with pytest.raises(UserError, match=words) as caught:
        convert.read(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"CLASSES": ["a"]}, "1 class names for a head of 5"),
        ({"CLASSES": 3}, "CLASSES is 3; expected a list of names"),
        ({"PALETTE": [[1, 2]]}, "expected a list of .red, green, blue"),
    ],
)
def test_what_is_told_and_cannot_be(meta, words, tmp_path):
    torch.save({"state_dict": fabricated(), "meta": meta}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        convert.read(tmp_path / "w.pth")


def test_blocks_are_for_segmentation_models(tmp_path, kit):
    path = kit.save(kit.make(), "unilm", tmp_path)
    with pytest.raises(UserError, match="is no segmentation model"):
        convert.read(path, Settings(taps=(0, 1, 2, 2)))


def test_how_much_setr_enlarges_where_only_tensors_tell(tmp_path, kit):
    path = kit.save(
        kit.make("segmentation", decoder=replace(SETR, pyramid=True)), "unilm", tmp_path
    )
    torch.save(torch.load(path, weights_only=True)["state_dict"], tmp_path / "bare.pth")
    found = convert.read(tmp_path / "bare.pth", Settings(taps=(2, 3, 4, 5))).decoder
    told = [(head.arguments["num_upsamples"], head.arguments["scale"]) for head in found.auxiliary]
    assert (found.head.arguments["scale"], told) == (2, [(1, 4), (1, 4)])
