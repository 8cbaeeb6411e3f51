import io

import pytest
import torch
from torch import nn

from beit.errors import UserError
from beit.models.heads import ClassificationHead
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.optim.schedules import warmup_cosine, warmup_linear

DEPTH, WIDTH = 2, 22


def make_modules():
    torch.manual_seed(5)
    backbone = VisionTransformer(
        (24, 40), 8, width=WIDTH, depth=DEPTH, num_heads=2, absolute_position=True,
        relative_position="per_block", layer_scale=0.1, drop_path_rate=0.0, mask_token=False,
        final_norm=False, init_cut=2.0,
    )  # fmt: skip
    return {"backbone": backbone, "head": ClassificationHead(WIDTH, 13, init_scale=1.0)}


def loss_of(modules):
    images = torch.randn(3, 3, 24, 40, generator=torch.Generator().manual_seed(7))
    return modules["head"](modules["backbone"](images)).square().mean()


def literal_adamw(parameter, gradients, rates, *, decay, betas, eps):
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2), written out."""
    value, first, second = parameter.clone().double(), 0.0, 0.0
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = gradient.double()
        value = value * (1 - lr * decay)
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        corrected = (second / (1 - betas[1] ** t)).sqrt() + eps
        value = value - lr * (first / (1 - betas[0] ** t)) / corrected
    return value


def test_steps_agree_with_adamw_written_out():
    modules = make_modules()
    recipe = AdamWRecipe(
        lr=1e-2, min_lr=1e-3, weight_decay=0.3, betas=[0.8, 0.95], warmup_steps=3, layer_decay=0.65
    )
    optimizer, schedule = recipe.build(modules, steps_per_epoch=4, total_steps=8, depth=DEPTH)
    watched = {
        # name: (parameter, weight decay, lr scale)
        "patch": (modules["backbone"].patch_embed.proj.weight, 0.3, 0.65**3),
        "cls": (modules["backbone"].cls_token, 0.0, 0.65**3),
        "table": (modules["backbone"].blocks[1].attn.relative_position_bias_table, 0.3, 0.65),
        "gamma": (modules["backbone"].blocks[0].gamma_2, 0.0, 0.65**2),
        "head": (modules["head"].head.weight, 0.3, 1.0),
    }
    before = {name: parameter.detach().clone() for name, (parameter, _, _) in watched.items()}
    gradients = {name: [] for name in watched}
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(modules).backward()
        for name, (parameter, _, _) in watched.items():
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
        schedule.step()
    rates = [
        warmup_cosine(step, total_steps=8, warmup_steps=3, lr=1e-2, min_lr=1e-3)
        for step in range(8)
    ]
    for name, (parameter, decay, scale) in watched.items():
        expected = literal_adamw(
            before[name],
            gradients[name],
            [scale * rate for rate in rates],
            decay=decay,
            betas=(0.8, 0.95),
            eps=1e-8,
        )
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-5, msg=name)


def test_layer_decay_scales_the_whole_curve_min_lr_too():
    recipe = AdamWRecipe(lr=4e-3, min_lr=1e-6, weight_decay=0.05, warmup_epochs=2, layer_decay=0.65)
    optimizer, schedule = recipe.build(
        make_modules(), steps_per_epoch=5, total_steps=50, depth=DEPTH
    )
    for step in range(50):
        expected = warmup_cosine(step, total_steps=50, warmup_steps=10, lr=4e-3, min_lr=1e-6)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(1e-6)


def test_the_linear_schedule_reaches_zero_in_every_group():
    recipe = AdamWRecipe(
        lr=7e-4, min_lr=0.0, weight_decay=0.05, warmup_steps=3, layer_decay=0.65, schedule="linear"
    )
    optimizer, schedule = recipe.build(
        make_modules(), steps_per_epoch=5, total_steps=20, depth=DEPTH
    )
    for step in range(20):
        expected = warmup_linear(step, total_steps=20, warmup_steps=3, lr=7e-4, min_lr=0.0)
        planned = recipe.rate_at(step, steps_per_epoch=5, total_steps=20)
        assert planned == pytest.approx(expected, rel=1e-12)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert all(group["lr"] == 0 for group in optimizer.param_groups)


def test_state_is_plain_data_and_resumes_in_place():
    recipe = AdamWRecipe(lr=1e-2, min_lr=0.0, weight_decay=0.05)
    runs = []
    for interrupted in (False, True):
        modules = make_modules()
        optimizer, schedule = recipe.build(modules, steps_per_epoch=3, total_steps=6)
        for step in range(6):
            if interrupted and step == 3:
                file = io.BytesIO()
                states = [m.state_dict() for m in modules.values()]
                torch.save([*states, optimizer.state_dict(), schedule.state_dict()], file)
                file.seek(0)
                *states, optimizer_state, schedule_state = torch.load(file, weights_only=True)
                modules = make_modules()
                optimizer, schedule = recipe.build(modules, steps_per_epoch=3, total_steps=6)
                for module, state in zip(modules.values(), states, strict=True):
                    module.load_state_dict(state)
                optimizer.load_state_dict(optimizer_state)
                schedule.load_state_dict(schedule_state)
            optimizer.zero_grad()
            loss_of(modules).backward()
            optimizer.step()
            schedule.step()
        runs.append(modules["head"].head.weight)
    assert torch.equal(*runs)


def test_a_network_without_backbone_is_served():
    optimizer, _ = AdamWRecipe(lr=1e-3, min_lr=0.0, weight_decay=0.01).build(
        {"tokenizer": nn.Linear(3, 5)}, steps_per_epoch=7, total_steps=7
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1e-3}, "lr -0.001 must be positive"),
        ({"lr": "abc"}, "lr abc must be a finite number"),
        ({"lr": None}, "lr None must be a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay nan must be a finite number"),
        ({"min_lr": 0.1}, "min_lr 0.1"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"layer_decay": 0.0}, "layer_decay 0.0"),
        ({"schedule": "poly"}, "schedule 'poly' must be one of cosine, linear"),
        ({"warmup_epochs": 5, "warmup_steps": 100}, "exclude each other"),
        ({"warmup_steps": -1}, "must not be negative"),
    ],
)
def test_impossible_recipes_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        AdamWRecipe(**{"lr": 1e-3, "min_lr": 1e-5, "weight_decay": 0.05, **changes})


def test_a_warmup_longer_than_the_run_is_refused():
    recipe = AdamWRecipe(lr=1e-3, min_lr=1e-5, weight_decay=0.05, warmup_epochs=3)
    with pytest.raises(UserError, match="30 steps is longer than the run of 20"):
        recipe.build(make_modules(), steps_per_epoch=10, total_steps=20)
