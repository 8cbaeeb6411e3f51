"""Weight decay, layer-wise decay and schedule against timm's and the released code's rules.

timm's groups differ from the released code's in two places, and there the released code is right:
timm exempts the bias tables from weight decay by a list of its own, where the released code exempts
`pos_embed`, `cls_token` and vectors alone; and timm counts a shared table to the stem (layer 0),
where the released code counts it to the last layer, as all that its list of prefixes leaves over.
"""

import math

import pytest
from timm.models.beit import Beit
from timm.optim import param_groups_layer_decay

from beit.models.heads import ClassificationHead, MIMHead
from beit.models.vit import VisionTransformer
from beit.optim.groups import parameter_groups
from beit.optim.schedules import warmup_cosine

DEPTH, WIDTH, DECAY, WEIGHT_DECAY = 4, 22, 0.65, 0.05


def make_backbone(relative_position, **changes):
    arguments = {
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "absolute_position": True,
        "layer_scale": 0.1,
        "drop_path_rate": 0.0,
        "mask_token": False,
        "final_norm": False,
        "init_cut": 0.02,
    }
    arguments |= {"relative_position": relative_position, **changes}
    return VisionTransformer((24, 40), 8, **arguments)


def our_scales(modules, layer_decay=DECAY):
    """Name -> (scale of the rate, weight decay), names without that of the module."""
    groups = parameter_groups(
        modules, weight_decay=WEIGHT_DECAY, layer_decay=layer_decay, depth=DEPTH
    )
    return {
        name.partition(".")[2]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["param_names"]
    }


def timm_scales(relative_position):
    model = Beit(
        img_size=(24, 40), patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=13,
        use_rel_pos_bias=relative_position == "per_block", use_abs_pos_emb=True, init_values=0.1,
        use_shared_rel_pos_bias=relative_position == "shared",
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # the exempted names given, as timm's own list has the bias tables in it too
    groups = param_groups_layer_decay(
        model, WEIGHT_DECAY, no_weight_decay_list=["pos_embed", "cls_token"], layer_decay=DECAY
    )
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def compare(found, expected, what, against, measured):
    assert found.keys() == expected.keys()
    for position, kind in enumerate(("layer-wise scale", "weight decay")):
        difference = max(abs(found[n][position] - expected[n][position]) for n in expected)
        measured("Optimisation", f"{what}: {kind}", against, difference, 1e-12)


@pytest.mark.parametrize("relative_position", ["none", "shared", "per_block"])
def test_groups_as_timms(relative_position, measured):
    backbone = make_backbone(relative_position)
    found = our_scales({"backbone": backbone, "head": ClassificationHead(WIDTH, 13)})
    expected = timm_scales(relative_position)
    for scales in (found, expected):
        scales.pop("rel_pos_bias.relative_position_bias_table", None)
    compare(found, expected, f"fine-tuning, bias {relative_position}", "timm", measured)


def released_layer(name):
    """The rule of the released code, written out."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else DEPTH + 1


def released(modules):
    expected = {}
    for module in modules.values():
        for name, parameter in module.named_parameters():
            exempt = parameter.ndim == 1 or name.endswith(".bias") or name in EXEMPT
            scale = DECAY ** (DEPTH + 1 - released_layer(name))
            expected[name] = (scale, 0.0 if exempt else WEIGHT_DECAY)
    return expected


EXEMPT = ("pos_embed", "cls_token")


@pytest.mark.parametrize("relative_position", ["none", "shared", "per_block"])
@pytest.mark.parametrize("stage", ["pretraining", "fine-tuning"])
def test_groups_as_released(stage, relative_position, measured):
    pretraining = stage == "pretraining"
    backbone = make_backbone(relative_position, mask_token=pretraining, final_norm=pretraining)
    head = MIMHead(WIDTH, 13) if pretraining else ClassificationHead(WIDTH, 13)
    modules = {"backbone": backbone, "head": head}
    what = f"{stage}, bias {relative_position}"
    compare(our_scales(modules), released(modules), what, "released rule written out", measured)


STEPS, WARMUP, LR, MIN_LR = 300 * 625, 10 * 625, 1.5e-3, 1e-5  # BEiT, table 12; 1,281,167 images
TIMES = {
    "first step": (0, 0.0),
    "middle of the warm-up": (3125, LR * 3125 / 6249),
    "last step of the warm-up": (6249, LR),
    "first step after it": (6250, LR),
    "a third of the cosine": (6250 + 60417 - 1, MIN_LR + (LR - MIN_LR) * 0.75),
    "middle of the cosine": (6250 + 90625, (LR + MIN_LR) / 2),
    "last step": (187_499, MIN_LR + (LR - MIN_LR) * math.sin(math.pi / 2 / 181_250) ** 2),
    "one past the end": (187_500, MIN_LR),
}


@pytest.mark.parametrize("time", TIMES)
def test_schedule(time, measured):
    step, expected = TIMES[time]
    found = warmup_cosine(step, total_steps=STEPS, warmup_steps=WARMUP, lr=LR, min_lr=MIN_LR)
    # a third of 181,250 steps is no whole step: half a step of the steepest slope
    allowed = 1e-8 if "third" in time else 1e-15
    measured("Optimisation", f"schedule: {time}", "closed form", abs(found - expected), allowed)
