"""Our encoder against timm's and transformers' BEiT with the same random weights."""

import pytest
import torch
from timm.models.beit import Beit
from transformers import BeitConfig, BeitModel

from beit.models.vit import VisionTransformer

BATCH, IMAGE, PATCH, WIDTH, HEADS, DEPTH = 7, (24, 40), 8, 22, 2, 4
SQUARE = (24, 24)  # transformers misreads the tables and positions of other grids
TABLE = "relative_position_bias_table"
VARIANTS = {
    "shared": {"absolute_position": False, "relative_position": "shared", "layer_scale": 0.1},
    "per_block": {"absolute_position": False, "relative_position": "per_block", "layer_scale": 0.1},
    "plain": {"absolute_position": True, "relative_position": "none", "layer_scale": 0.0},
    "everything": {"absolute_position": True, "relative_position": "shared", "layer_scale": 1e-5},
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def make_ours(variant, image_size, *, mask_token):
    model = VisionTransformer(
        image_size,
        PATCH,
        width=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        drop_path_rate=0.0,
        mask_token=mask_token,
        final_norm=True,
        init_cut=0.02,
        **VARIANTS[variant],
    )
    # every tensor random and large enough to matter, the zero-initialised ones above all
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(parameter.data + 0.2 * noise)
    return model


def make_timm(variant):
    options = VARIANTS[variant]
    return Beit(
        img_size=IMAGE,
        patch_size=PATCH,
        num_classes=0,
        global_pool="",
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=options["layer_scale"] or None,
        use_abs_pos_emb=options["absolute_position"],
        use_rel_pos_bias=options["relative_position"] == "per_block",
        use_shared_rel_pos_bias=options["relative_position"] == "shared",
    )


def make_transformers(variant):
    options = VARIANTS[variant]
    config = BeitConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
        image_size=list(SQUARE),
        patch_size=PATCH,
        use_mask_token=True,
        use_absolute_position_embeddings=options["absolute_position"],
        use_relative_position_bias=options["relative_position"] == "per_block",
        use_shared_relative_position_bias=options["relative_position"] == "shared",
        layer_scale_init_value=options["layer_scale"],
        drop_path_rate=0.0,
        use_mean_pooling=False,  # puts the final norm inside the encoder
    )
    return BeitModel(config, add_pooling_layer=False)


def transformers_names(key):
    """Names of transformers 5 for one of ours; the fused qkv becomes three."""
    head, _, rest = key.partition(".")
    if key in ("cls_token", "mask_token"):
        return [f"embeddings.{key}"]
    if key == "pos_embed":
        return ["embeddings.position_embeddings"]
    if head == "patch_embed":
        return [f"embeddings.patch_embeddings.{rest.replace('proj', 'projection')}"]
    if head == "rel_pos_bias":
        return [f"shared_position_bias.{rest}"]
    if head == "norm":
        return [f"layernorm.{rest}"]
    number, _, name = rest.partition(".")
    names = {
        "gamma_1": ["lambda_1"],
        "gamma_2": ["lambda_2"],
        "attn.q_bias": ["attention.q_proj.bias"],
        "attn.v_bias": ["attention.v_proj.bias"],
        "attn.qkv.weight": [f"attention.{x}_proj.weight" for x in "qkv"],
        f"attn.{TABLE}": [f"relative_position_bias.{TABLE}"],
    }
    for part in ("weight", "bias"):
        names[f"norm1.{part}"] = [f"layernorm_before.{part}"]
        names[f"norm2.{part}"] = [f"layernorm_after.{part}"]
        names[f"attn.proj.{part}"] = [f"attention.o_proj.{part}"]
        names[f"mlp.fc1.{part}"] = [f"mlp.fc1.{part}"]
        names[f"mlp.fc2.{part}"] = [f"mlp.fc2.{part}"]
    return [f"layers.{number}.{name}" for name in names[name]]


def copy_to_transformers(ours, theirs):
    state = {}
    for key, value in ours.state_dict().items():
        names = transformers_names(key)
        state.update(zip(names, value.chunk(len(names)), strict=True))
    theirs.load_state_dict(state, strict=True)


def gradients_of(model, features, seed):
    return dict(
        zip(
            [name for name, _ in model.named_parameters()],
            torch.autograd.grad(features, list(model.parameters()), seed),
            strict=True,
        )
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_gradients_agree_with_timm(variant):
    ours, theirs = make_ours(variant, IMAGE, mask_token=False), make_timm(variant)
    theirs.load_state_dict(ours.state_dict(), strict=True)  # the names are the released ones
    images = torch.randn(BATCH, 3, *IMAGE)
    got, expected = ours(images), theirs.forward_features(images)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    seed = torch.randn_like(got) / got.numel() ** 0.5
    expected_gradients = gradients_of(theirs, expected, seed)
    for name, gradient in gradients_of(ours, got, seed).items():
        torch.testing.assert_close(gradient, expected_gradients[name], **TOLERANCE, msg=name)
    with torch.no_grad():  # the fused path
        torch.testing.assert_close(ours(images), expected, **TOLERANCE)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_gradients_agree_with_transformers(variant, masked):
    ours, theirs = make_ours(variant, SQUARE, mask_token=True), make_transformers(variant)
    copy_to_transformers(ours, theirs)
    images = torch.randn(BATCH, 3, *SQUARE)
    mask = torch.rand(BATCH, *ours.grid) < 0.4
    got = ours(images, mask if masked else None)
    hidden = mask.flatten(1) if masked else None
    expected = theirs(images, bool_masked_pos=hidden).last_hidden_state
    torch.testing.assert_close(got, expected, **TOLERANCE)

    seed = torch.randn_like(got) / got.numel() ** 0.5
    (got * seed).sum().backward()
    (expected * seed).sum().backward()
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name == "mask_token" and not masked:
            assert parameter.grad is None
            continue
        gradient = torch.cat([parameters[n].grad for n in transformers_names(name)])
        torch.testing.assert_close(parameter.grad, gradient, **TOLERANCE, msg=name)
