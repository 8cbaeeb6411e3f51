import pytest
import torch
from torch import nn

from beit.errors import UserError
from beit.models.heads import MIMHead
from beit.models.vit import VisionTransformer
from beit.optim.groups import layer_id, parameter_groups

DEPTH, WIDTH = 4, 22


def make_backbone(**changes):
    arguments = {
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "absolute_position": True,
        "relative_position": "shared",
        "layer_scale": 0.1,
        "drop_path_rate": 0.0,
        "mask_token": True,
        "final_norm": True,
        "init_cut": 0.02,
    }
    return VisionTransformer((24, 40), 8, **{**arguments, **changes})


def by_name(groups, key):
    return {name: group[key] for group in groups for name in group["param_names"]}


# depth 12: the table of the released code
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cls_token", 0),
        ("mask_token", 0),
        ("pos_embed", 0),
        ("patch_embed.proj.weight", 0),
        ("blocks.0.gamma_1", 1),
        ("blocks.11.attn.relative_position_bias_table", 12),
        ("rel_pos_bias.relative_position_bias_table", 13),
        ("norm.weight", 13),
    ],
)
def test_layer_ids(name, layer):
    assert layer_id(name, 12) == layer


def test_every_parameter_is_in_one_group_with_its_name():
    modules = {"backbone": make_backbone(), "head": MIMHead(WIDTH, 13)}
    groups = parameter_groups(modules, weight_decay=0.05, layer_decay=0.65, depth=DEPTH)
    taken = {name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    expected = {f"{part}.{n}": p for part, m in modules.items() for n, p in m.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(expected)
    assert taken.keys() == expected.keys()
    assert all(taken[name] is expected[name] for name in expected)


def test_what_decays():
    modules = {"backbone": make_backbone(), "head": MIMHead(WIDTH, 13)}
    decay = by_name(parameter_groups(modules, weight_decay=0.05), "weight_decay")
    for name in (
        "backbone.mask_token",
        "backbone.rel_pos_bias.relative_position_bias_table",
        "backbone.patch_embed.proj.weight",
        "backbone.blocks.1.attn.qkv.weight",
        "head.lm_head.weight",
    ):
        assert decay.pop(name) == 0.05, name
    matrices = [name for name in decay if "blocks" in name and decay[name]]
    assert len(matrices) == 4 * DEPTH - 1
    for name in set(decay) - set(matrices):
        assert decay[name] == 0.0, name
    assert {"backbone.cls_token", "backbone.pos_embed"} <= decay.keys() - set(matrices)


def test_frozen_parameters_are_left_out_and_shared_ones_taken_once():
    backbone, head = make_backbone(), MIMHead(WIDTH, 13)
    backbone.patch_embed.requires_grad_(False)
    groups = parameter_groups(
        {"backbone": backbone, "head": head, "again": head}, weight_decay=0.05
    )
    names = by_name(groups, "name")
    assert not any("patch_embed" in name or name.startswith("again") for name in names)


def test_groups_serve_an_optimizer():
    groups = parameter_groups({"net": nn.Linear(3, 5)}, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [g["name"] for g in optimizer.param_groups] == ["no_decay", "decay"]


def test_impossible_requests_are_refused():
    with pytest.raises(UserError, match=r"layer_decay 0.65 needs a backbone"):
        parameter_groups({"net": nn.Linear(3, 5)}, weight_decay=0.05, layer_decay=0.65, depth=4)
    with pytest.raises(UserError, match="depth 0"):
        parameter_groups({"backbone": make_backbone()}, weight_decay=0.05, layer_decay=0.65)
    with pytest.raises(UserError, match="nothing to train"):
        parameter_groups({"net": nn.Linear(3, 5).requires_grad_(False)}, weight_decay=0.05)
