import math
from pathlib import Path

import pytest
import torch
import yaml

from beit.errors import UserError
from beit.models.heads import ClassificationHead, MIMHead
from beit.models.vit import VisionTransformer

BATCH, IMAGE, PATCH, GRID, WIDTH, HEADS, DEPTH = 7, (24, 40), 8, (3, 5), 22, 2, 4
CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def small_vit(**changes):
    arguments = {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "absolute_position": True,
        "relative_position": "shared",
        "layer_scale": 0.1,
        "drop_path_rate": 0.0,
        "mask_token": True,
        "final_norm": True,
        "init_cut": 0.02,
    }
    return VisionTransformer(**{**arguments, **changes})


def configured(name, **changes):
    arguments = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert arguments.pop("_target_") == "beit.models.vit.VisionTransformer"
    return VisionTransformer(**{**arguments, **changes})


def images_and_mask():
    mask = torch.zeros(BATCH, *GRID, dtype=torch.bool)
    mask[:, 1, 1:4] = True
    mask[0, 2, 4] = True
    return torch.randn(BATCH, 3, *IMAGE), mask


def num_parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# totals of the released models: arithmetic over the published shapes; the first is in their log
@pytest.mark.parametrize(
    ("name", "changes", "head", "total"),
    [
        ("base", {}, "mim", 91_965_776),
        (
            "base",
            {"absolute_position": True, "relative_position": "none", "layer_scale": 0.0},
            "mim",
            92_089_856,
        ),
        ("large", {}, "mim", 311_534_016),
        ("base", {"relative_position": "per_block"}, "classes", 86_530_984),
        ("base", {"relative_position": "per_block", "image_size": 384}, "classes", 86_744_104),
        ("large", {"relative_position": "per_block"}, "classes", 304_430_568),
    ],
)
def test_parameter_counts(name, changes, head, total):
    classes = head == "classes"
    with torch.device("meta"):
        stage = {"mask_token": False, "final_norm": False} if classes else {}
        backbone = configured(name, **stage, **changes)
        width = backbone.width
        head = ClassificationHead(width, 1000) if classes else MIMHead(width, 8192)
    assert num_parameters(backbone, head) == total


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_config_builds(path):
    with torch.device("meta"):
        assert configured(path.stem).depth >= 6


def test_shapes_of_a_non_square_grid():
    model = small_vit()
    images, mask = images_and_mask()
    assert (model.grid, model.width, model.depth) == (GRID, WIDTH, DEPTH)
    assert model(images, mask).shape == (BATCH, 1 + 15, WIDTH)


@pytest.mark.parametrize("relative_position", ["none", "shared", "per_block"])
def test_hidden_pixels_cannot_influence_features(relative_position):
    model = small_vit(relative_position=relative_position).eval()
    images, mask = images_and_mask()
    hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    scrambled = torch.where(hidden, 100 * torch.randn_like(images), images)
    with torch.no_grad():
        torch.testing.assert_close(model(images, mask), model(scrambled, mask), rtol=0, atol=0)
        changed = model(images) - model(scrambled)
    assert changed.abs().amax(dim=(1, 2)).min() > 1e-4


def test_mask_changes_every_sample():
    model = small_vit().eval()
    images, mask = images_and_mask()
    with torch.no_grad():
        difference = model(images, mask) - model(images)
    assert difference.abs().amax(dim=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("relative_position", ["shared", "per_block"])
def test_gradient_reaches_every_parameter(relative_position):
    model = small_vit(relative_position=relative_position, drop_path_rate=0.2)
    images, mask = images_and_mask()
    head = MIMHead(WIDTH, 13)
    torch.nn.functional.cross_entropy(
        head(model(images, mask), mask), torch.randint(13, (int(mask.sum()),))
    ).backward()
    for name, parameter in [*model.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_tapped_blocks_are_what_the_next_block_reads():
    model = small_vit().eval()
    images, mask = images_and_mask()
    seen = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
    with torch.no_grad():
        final = model(images, mask)
        taps = model.forward_blocks(images, mask, taps=[3, 0])
    torch.testing.assert_close(taps, [seen[3], seen[0]])
    torch.testing.assert_close(model.norm(taps[0]), final)


def test_blocks_after_the_last_tap_are_not_run():
    model = small_vit()
    model.blocks[2].register_forward_hook(lambda *_: pytest.fail("block 2 was run"))
    model.forward_blocks(torch.randn(2, 3, *IMAGE), taps=[0, 1])


def test_pretraining_initialisation_and_depth_rescale():
    model = small_vit(width=88, init_cut=0.02)
    # a normal cut at one deviation keeps 0.53956 of it
    std = 0.02 * math.sqrt(1 - 2 * 0.24197072 / 0.68268949)
    for number, block in enumerate(model.blocks, start=1):
        scale = 1 / math.sqrt(2 * number)
        for weight, factor in (
            (block.attn.qkv.weight, 1),
            (block.mlp.fc1.weight, 1),
            (block.attn.proj.weight, scale),
            (block.mlp.fc2.weight, scale),
        ):
            assert weight.abs().max() <= 0.02 * factor + 1e-8
            assert weight.std().item() == pytest.approx(std * factor, rel=0.03)
        for zero in (block.attn.q_bias, block.attn.v_bias, block.mlp.fc1.bias):
            assert zero.abs().max() == 0
        assert (block.gamma_1 == 0.1).all()
        assert (block.gamma_2 == 0.1).all()
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(std, rel=0.03)
    assert model.rel_pos_bias.relative_position_bias_table.abs().max() == 0
    assert 0 < model.mask_token.abs().max() <= 0.02
    assert 0 < model.cls_token.abs().max() <= 0.02


def test_finetuning_initialisation_is_not_cut():
    weight = small_vit(width=88, init_cut=2.0).blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert weight.abs().max() > 0.05


def test_released_names():
    shared = set(small_vit(absolute_position=False).state_dict())
    per_block = set(
        small_vit(relative_position="per_block", mask_token=False, final_norm=False).state_dict()
    )
    block = "norm1.weight norm1.bias norm2.weight norm2.bias gamma_1 gamma_2 attn.q_bias"
    block += " attn.v_bias attn.qkv.weight attn.proj.weight attn.proj.bias"
    block += " mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
    blocks = {f"blocks.{i}.{name}" for i in range(DEPTH) for name in block.split()}
    stem = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    table = "relative_position_bias_table"
    assert shared == blocks | stem | {
        "mask_token",
        f"rel_pos_bias.{table}",
        "norm.weight",
        "norm.bias",
    }
    assert per_block == blocks | stem | {"pos_embed"} | {
        f"blocks.{i}.attn.{table}" for i in range(DEPTH)
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": (24, 41)}, "24x41.*patch_size 8"),
        ({"image_size": 4}, "4x4.*patch_size 8"),
        ({"image_size": (24, 40, 3)}, "24, 40, 3"),
        ({"num_heads": 3}, "width 22.*num_heads 3"),
        ({"drop_path_rate": 1.0}, "drop_path_rate 1.0"),
        ({"relative_position": "both"}, "'both'"),
    ],
)
def test_impossible_sizes_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        small_vit(**changes)


def test_wrong_inputs_are_refused():
    images, mask = images_and_mask()
    model = small_vit()
    with pytest.raises(UserError, match=r"\(24, 40\)"):
        model(images.transpose(2, 3), mask)
    with pytest.raises(UserError, match=r"\(7, 5, 3\).*\(7, 3, 5\)"):
        model(images, mask.transpose(1, 2))
    with pytest.raises(UserError, match="float32"):
        model(images, mask.float())
    with pytest.raises(UserError, match="mask_token=True"):
        small_vit(mask_token=False)(images, mask)
    with pytest.raises(UserError, match="0 to 3"):
        model.forward_blocks(images, taps=[4])


def test_bf16_autocast_stays_near_float32():
    model = small_vit().eval()
    images, mask = images_and_mask()
    with torch.no_grad():
        exact = model(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        training = model(images, mask)
        with torch.no_grad():
            inference = model(images, mask)
    assert training.dtype == torch.float32  # the residual stream is not rounded
    torch.testing.assert_close(training, exact, rtol=0, atol=0.05)
    torch.testing.assert_close(inference, exact, rtol=0, atol=0.05)
