"""Each layout to each: the other library's own loader, the same logits, there and back."""

import json
import math

import literal_unilm
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit, checkpoint_filter_fn
from transformers import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)

import beit
from beit.errors import UserError
from beit.interop import convert
from beit.interop.weights import Settings

OUTPUTS = {"ours": "w.safetensors", "unilm": "w.pth", "timm": "timm", "huggingface": "hf"}
KINDS = ["mim", "classification, mean", "classification, CLS", "backbone, mean", "backbone, CLS"]
KINDS.append("segmentation")
POSITIONS = ["shared", "per_block", "absolute", "both"]
TOLERANCE = 1e-5
REFUSED = {"mim": "mask_token", "segmentation": "has no segmentation model"}  # by timm


@torch.no_grad()
def through_ours(path, weights, kit):
    model = beit.load_model(path)
    assert not model.training
    images, mask = kit.inputs(weights)
    if weights.kind == "mim":
        return model(images, mask)
    if weights.kind == "segmentation":
        maps = model.maps(images)
        whole = F.interpolate(model.head(maps), images.shape[2:], mode="bilinear")
        torch.testing.assert_close(model(images), whole)
        return torch.cat([head(maps).flatten() for head in (model.head, *model.auxiliary)])
    return model(images) if weights.kind == "classification" else model.pooled(images)


@torch.no_grad()
def through_timm(path, weights, kit):
    """Both ways to open it: the folder by its config, the file by its path, strictly."""
    images, _ = kit.inputs(weights)
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    config = json.loads((path / "config.json").read_text())
    file = path / "model.safetensors"
    name, arguments = config["architecture"], config["model_args"]
    arguments |= {"num_classes": config["num_classes"]}
    again = timm.create_model(name, checkpoint_path=file, **arguments).eval()
    assert torch.equal(model(images), again(images))
    return model(images)


@torch.no_grad()
def through_transformers(path, weights, kit):
    classes = {
        "mim": BeitForMaskedImageModeling,
        "classification": BeitForImageClassification,
        "segmentation": BeitForSemanticSegmentation,
    }
    opener = classes.get(weights.kind, BeitModel)
    model, info = opener.from_pretrained(path, output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, mask = kit.inputs(weights)
    if weights.kind == "mim":
        hidden = mask.flatten(1)
        return model.eval()(images, bool_masked_pos=hidden).logits[hidden]
    if weights.kind == "segmentation":
        return segmented(model.eval(), images)
    out = model.eval()(images)
    return out.logits if weights.kind == "classification" else out.pooler_output


def segmented(model, images):
    """Their pyramid and heads on the blocks that out_indices means in the release.

    Their own forward pass takes the blocks two before, see test_segmentation.py.
    """
    hidden = model.beit(images, output_hidden_states=True).hidden_states
    side = images.shape[2] // model.config.patch_size
    maps = [hidden[i + 1][:, 1:].mT.unflatten(2, (side, side)) for i in model.config.out_indices]
    if hasattr(model, "fpn"):
        maps = model.fpn(maps)
    else:  # transformers 4
        maps = [getattr(model, f"fpn{i + 1}")(x) for i, x in enumerate(maps)]
    heads = (model.decode_head, model.auxiliary_head)
    return torch.cat([head(maps).flatten() for head in heads])


@torch.no_grad()
def through_unilm(path, weights, kit):
    """A literal, slow forward pass on the file's tensors, its index buffers among them."""
    whole = torch.load(path, weights_only=True)
    if weights.kind == "segmentation":
        whole["model"] = {k.removeprefix("backbone."): v for k, v in whole["state_dict"].items()}
    t = whole["model"]
    images, mask = kit.inputs(weights)
    x = F.conv2d(images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    if weights.kind == "mim":
        hidden = mask.flatten(1)[..., None].float()
        x = x * (1 - hidden) + t["mask_token"] * hidden
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + t.get("pos_embed", 0)
    heads, width = weights.architecture.num_heads, weights.architecture.width
    norm = lambda x, name: F.layer_norm(x, (width,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)  # noqa: E731
    outputs = []
    for i in range(weights.architecture.depth):
        b = f"blocks.{i}."
        bias = torch.cat([t[b + "attn.q_bias"], torch.zeros(width), t[b + "attn.v_bias"]])
        qkv = F.linear(norm(x, b + "norm1"), t[b + "attn.qkv.weight"], bias)
        q, k, v = qkv.view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        for prefix in (b + "attn.", "rel_pos_bias."):
            if f"{prefix}relative_position_index" in t:
                index = t[f"{prefix}relative_position_index"]
                scores = scores + t[f"{prefix}relative_position_bias_table"][index].permute(2, 0, 1)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        out = F.linear(out, t[b + "attn.proj.weight"], t[b + "attn.proj.bias"])
        x = x + t.get(b + "gamma_1", 1) * out
        out = F.gelu(F.linear(norm(x, b + "norm2"), t[b + "mlp.fc1.weight"], t[b + "mlp.fc1.bias"]))
        out = F.linear(out, t[b + "mlp.fc2.weight"], t[b + "mlp.fc2.bias"])
        x = x + t.get(b + "gamma_2", 1) * out
        outputs.append(x)
    if weights.kind == "segmentation":
        t, grid = whole["state_dict"], weights.architecture.grid
        return literal_unilm.segmentation_logits(t, outputs, grid, weights.decoder.taps)
    if "norm.weight" in t:
        x = norm(x, "norm")
    if weights.kind == "mim":
        return F.linear(x[:, 1:][mask.flatten(1)], t["lm_head.weight"], t["lm_head.bias"])
    x = norm(x[:, 1:].mean(1), "fc_norm") if "fc_norm.weight" in t else x[:, 0]
    return F.linear(x, t["head.weight"], t["head.bias"]) if "head.weight" in t else x


LOADERS = {
    "ours": through_ours,
    "unilm": through_unilm,
    "timm": through_timm,
    "huggingface": through_transformers,
}


@pytest.mark.parametrize("to", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_layout_to_each(kind, to, tmp_path, matrix, kit):
    weights = kit.make(kind, "shared" if kind == "mim" else "per_block")
    expected = kit.reference(weights)
    for source in OUTPUTS:
        if kind in REFUSED and "timm" in (source, to):
            with pytest.raises(UserError, match=REFUSED[kind]):
                kit.save(weights, "timm", tmp_path / f"no-{source}")
            matrix.add(kind, source, to, "refused")
            continue
        (tmp_path / source).mkdir()
        path = kit.save(weights, source, tmp_path / source)
        output = tmp_path / source / f"converted-{OUTPUTS[to]}"
        convert.convert(path, to, output, Settings())
        found = kit.difference(LOADERS[to](output, weights, kit), expected)
        assert found < TOLERANCE
        matrix.add(kind, source, to, found)
        kit.assert_same(convert.read(output), weights)
        assert convert.read(output).preprocessing == weights.preprocessing


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_every_kind_of_positions(kind, positions, layer_scale, tmp_path, kit):
    weights = kit.make(kind, positions, layer_scale)
    expected = kit.reference(weights)
    for to, loader in LOADERS.items():
        if (kind, to) == ("mim", "timm"):
            continue
        path = kit.save(weights, to, tmp_path)
        assert kit.difference(loader(path, weights, kit), expected) < TOLERANCE
        again = convert.read(path)
        kit.assert_same(again, weights)
        for name in ("layer_scale", "image_size", "num_heads", "relative_position"):
            assert getattr(again.architecture, name) == getattr(weights.architecture, name)


def test_all_of_them_in_a_row(tmp_path, kit):
    weights = kit.make("classification, mean", "per_block")
    path, settings = kit.save(weights, "ours", tmp_path), Settings()
    for number, to in enumerate(["huggingface", "timm", "unilm", "huggingface", "ours"]):
        output = tmp_path / f"{number}-{OUTPUTS[to]}"
        convert.convert(path, to, output, settings)
        path = output
    found = convert.read(path)
    kit.assert_same(found, weights)
    assert found.preprocessing == weights.preprocessing


@pytest.mark.parametrize("to", ["ours", "unilm", "timm"])
def test_grids_that_are_not_square(to, tmp_path, kit):
    weights = kit.make("classification, mean", "per_block", size=(24, 40))
    path = kit.save(weights, to, tmp_path)
    assert kit.difference(LOADERS[to](path, weights, kit), kit.reference(weights)) < TOLERANCE
    assert convert.read(path).architecture.image_size == (24, 40)
    kit.assert_same(convert.read(path), weights)


@pytest.mark.parametrize("kind", KINDS[1:3])
def test_timm_reads_the_official_layout_that_we_write(kind, tmp_path, kit):
    weights = kit.make(kind)
    content = torch.load(kit.save(weights, "unilm", tmp_path), weights_only=True)
    pool = "avg" if weights.pooling == "mean" else "token"
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 22, "depth": 3, "num_heads": 2}
    model = Beit(
        **sizes,
        num_classes=5,
        global_pool=pool,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    ).eval()
    model.load_state_dict(checkpoint_filter_fn(content, model), strict=True)
    with torch.no_grad():
        found = model(kit.inputs(weights)[0])
    assert kit.difference(found, kit.reference(weights)) < TOLERANCE


def test_half_precision_stays_what_it_is(tmp_path, kit):
    weights = kit.make()
    parts = {
        name: {key: value.to(torch.bfloat16) for key, value in getattr(weights, name).items()}
        for name in ("backbone", "head")
    }
    weights = weights.changed(**parts)
    for to in OUTPUTS:
        kit.assert_same(convert.read(kit.save(weights, to, tmp_path)), weights)


def test_another_epsilon_stays_where_the_layout_can_say_it(tmp_path, kit):
    weights = kit.make("classification, CLS", norm_eps=1e-3)
    expected = kit.reference(weights)
    for to in ("huggingface", "ours"):
        path = kit.save(weights, to, tmp_path)
        assert kit.difference(LOADERS[to](path, weights, kit), expected) < TOLERANCE
        assert convert.read(path).architecture.norm_eps == 1e-3
    assert kit.difference(kit.reference(kit.make("classification, CLS")), expected) > TOLERANCE
    for to in ("timm", "unilm"):
        with pytest.raises(UserError, match=r"norm_eps=0\.001.*say norm_eps=1e-6"):
            kit.save(weights, to, tmp_path)
    source = tmp_path / OUTPUTS["huggingface"]
    convert.convert(source, "timm", tmp_path / "t", Settings(norm_eps=1e-6))
    assert convert.read(tmp_path / "t").architecture.norm_eps == 1e-6
