"""`any_size`: a model on images of other sizes is the model with its positions resized."""

import copy

import pytest
import torch

from beit.errors import UserError
from beit.models import position
from beit.models.layers import Attention
from beit.models.transfer import adapt_backbone
from beit.models.vit import VisionTransformer

BATCH, IMAGE, OTHER, PATCH, WIDTH, DEPTH = 3, (24, 40), (48, 32), 8, 22, 3
KINDS = ["none", "shared", "per_block"]


def vit(image_size=IMAGE, *, any_size=True, relative_position="per_block", **changes):
    arguments = {
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "absolute_position": True,
        "layer_scale": 0.1,
        "drop_path_rate": 0.0,
        "mask_token": True,
        "final_norm": True,
        "init_cut": 0.02,
    }
    options = {"relative_position": relative_position, "any_size": any_size}
    torch.manual_seed(0)
    model = VisionTransformer(image_size, PATCH, **{**arguments, **options, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def images(size=OTHER):
    return torch.randn(BATCH, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("relative_position", KINDS)
@pytest.mark.parametrize("size", [OTHER, (24, 56), (80, 40), (64, 64)])
def test_it_is_the_model_built_for_that_size(size, relative_position):
    """Its weights brought to the grid once, as a transfer does it."""
    model = vit(relative_position=relative_position).eval()
    fixed = vit(size, any_size=False, relative_position=relative_position).eval()
    weights, _ = adapt_backbone(model.state_dict(), fixed, source_grid=model.grid)
    fixed.load_state_dict(weights, strict=False)
    mask = torch.zeros(BATCH, size[0] // PATCH, size[1] // PATCH, dtype=torch.bool)
    mask[1, 1:, 2] = True
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(model(images(size), mask), fixed(images(size), mask))
            for ours, theirs in zip(
                model.forward_blocks(images(size), taps=[0, 2]),
                fixed.forward_blocks(images(size), taps=[0, 2]),
                strict=True,
            ):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("relative_position", KINDS)
def test_its_own_size_is_computed_as_ever(relative_position, monkeypatch):
    ours, plain = (vit(any_size=a, relative_position=relative_position) for a in (True, False))

    def never(*arguments):
        raise AssertionError("nothing is to be resized")

    monkeypatch.setattr(position.ResizedPositions, "__call__", never)
    for model in (ours, plain):
        model(images(IMAGE)).square().sum().backward()
    assert torch.equal(ours(images(IMAGE)), plain(images(IMAGE)))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("relative_position", ["shared", "per_block"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through_the_resizing(relative_position, checkpointing):
    """By finite differences, of an entry of the table and of the positions."""
    options = {"activation_checkpointing": checkpointing, "final_norm": False}
    model = vit(relative_position=relative_position, **options).double()
    inputs = images().double()
    tables = [p for n, p in model.named_parameters() if n.endswith("bias_table")]
    model(inputs).square().mean().backward()
    assert model.pos_embed is not None
    for parameter, at in [(tables[0], (3, 1)), (tables[-1], (20, 0)), (model.pos_embed, (0, 4, 5))]:
        values = []
        for step in (1e-3, -2e-3):
            with torch.no_grad():
                parameter[at] += step
                values.append(model(inputs).square().mean().item())
        found = (values[0] - values[1]) / 2e-3
        with torch.no_grad():
            parameter[at] += 1e-3
        assert found == pytest.approx(parameter.grad[at].item(), rel=1e-3, abs=1e-9)
        assert abs(found) > 1e-9


def test_resized_positions_are_kept_until_they_change(monkeypatch):
    model, resized = vit().eval(), []
    position._index_on.cache_clear()  # the first to ask is in inference mode
    position._axis_weights_on.cache_clear()
    real = position.resize_relative_table
    for module in model.modules():
        if isinstance(module, Attention):
            monkeypatch.setattr(
                module._resized_table, "resize", lambda *a: resized.append(a) or real(*a)
            )
    with torch.inference_mode():
        first = model(images())
        assert len(resized) == DEPTH
        assert torch.equal(model(images()), first)
        model(images((64, 64)))
        model(images())
        assert len(resized) == 2 * DEPTH
    table = model.blocks[1].attn.relative_position_bias_table
    table.data.mul_(2)  # as averaging of weights writes: no version is counted up
    with torch.inference_mode():
        second = model(images())
    assert len(resized) == 2 * DEPTH + 1
    assert not torch.equal(first, second)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(fresh(images()), second)
    model.train()(images()).sum().backward()  # nothing of inference mode is in the way
    assert table.grad is not None


def test_only_so_many_grids_are_kept():
    model = vit().eval()
    with torch.no_grad():
        for width in range(16, 16 + 8 * 12, 8):
            model(images((24, width)))
    assert len(model.blocks[0].attn._resized_table._kept) == 8


@pytest.mark.parametrize("size", [(24, 41), (4, 40), (30, 40)])
def test_a_size_that_does_not_divide_is_refused(size):
    with pytest.raises(UserError, match="multiples of the patch size 8; pad or resize"):
        vit()(images(size))


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(UserError, match=r"expected bool of shape \(3, 6, 4\)"):
        vit()(images(), torch.zeros(BATCH, 3, 5, dtype=torch.bool))
