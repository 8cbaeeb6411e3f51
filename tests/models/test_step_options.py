"""Activation checkpointing and torch.compile change the price of a step, not its result."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F

from beit.models.heads import MIMHead
from beit.models.vit import VisionTransformer

BATCH, GRID, WIDTH, VOCAB_SIZE = 7, (3, 5), 22, 13


def network(depth=4, **changes):
    torch.manual_seed(0)
    backbone = VisionTransformer(
        (24, 40), 8, width=WIDTH, depth=depth, num_heads=2, absolute_position=True,
        relative_position="shared", layer_scale=0.1, drop_path_rate=0.3, mask_token=True,
        final_norm=True, init_cut=2.0, **changes,
    )  # fmt: skip
    return torch.nn.ModuleDict({"backbone": backbone, "head": MIMHead(WIDTH, VOCAB_SIZE)})


def step(model, *, keys):
    """Loss and gradients."""
    torch.manual_seed(1)
    images, mask = torch.randn(BATCH, 3, 24, 40), torch.rand(BATCH, *GRID) < 0.4
    token_ids = torch.randint(VOCAB_SIZE, (BATCH, *GRID))
    model["backbone"].sample_keys = torch.arange(BATCH) if keys else None
    features = model["backbone"](images, mask)
    loss = F.cross_entropy(model["head"](features, mask), token_ids[mask])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def kept_bytes(backbone):
    """What a forward pass keeps for the backward pass."""
    kept = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backbone(torch.randn(BATCH, 3, 24, 40), torch.rand(BATCH, *GRID) < 0.4)
    return sum(tensor.nbytes for tensor in kept.values())


@pytest.mark.parametrize("keys", [True, False])
def test_activation_checkpointing_keeps_less_and_gives_the_same(keys):
    plain, thrifty = network(), network(activation_checkpointing=True)
    loss, gradients = step(plain, keys=keys)
    again, found = step(thrifty, keys=keys)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name
    assert kept_bytes(thrifty["backbone"]) < kept_bytes(plain["backbone"]) / 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_is_the_same_step():
    plain = network(depth=2)
    compiled = copy.deepcopy(plain)
    for part in compiled.children():
        part.compile()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    loss, gradients = step(plain, keys=True)
    again, found = step(compiled, keys=True)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_maps_of_blocks_are_compiled_too():
    plain = network()["backbone"].eval()
    compiled, graphs = copy.deepcopy(plain), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled.compile(backend=backend)
    images, taps = torch.randn(BATCH, 3, 24, 40), [0, 1, 1, 3]
    with torch.no_grad():
        found = compiled.forward_blocks(images, taps=taps)
        assert graphs
        for mine, expected in zip(found, plain.forward_blocks(images, taps=taps), strict=True):
            torch.testing.assert_close(mine, expected)
