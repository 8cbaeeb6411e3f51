import math

import numpy as np
import pytest
import torch

from beit.models.drop_path import add_rows, kept_branches, sample_keys, thresholds
from beit.models.vit import VisionTransformer

DEPTH, SAMPLES = 6, 4001


def splitmix64(state):
    """The reference's generator, on unsigned integers: (new state, output)."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, z ^ (z >> 31)


def test_draws_are_those_of_splitmix64():
    # its published first outputs for the seed 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state, outputs = 1234567, []
    for _ in published:
        state, output = splitmix64(state)
        outputs.append(output)
    assert outputs == published
    unsigned = sample_keys(1234567, torch.arange(1, 4)).numpy().view(np.uint64).tolist()
    assert unsigned == published
    high = (1 << 63) + 99  # a key whose first bit is set
    assert sample_keys(high, torch.tensor([1])).numpy().view(np.uint64)[0] == splitmix64(high)[1]

    rates = [0.1, 0.6]
    kept = kept_branches(sample_keys(1234567, torch.arange(1, 4)), thresholds(rates))
    for sample, key in enumerate(published):
        state = key
        for block, rate in enumerate(rates):
            for branch in range(2):
                state, output = splitmix64(state)
                assert kept[block, branch, sample] == ((output >> 11) / 2**53 < 1 - rate)


def kept(rate, *, key=5, samples=SAMPLES):
    return kept_branches(sample_keys(key, torch.arange(samples)), thresholds([rate] * DEPTH))


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.9])
def test_rates_are_the_asked_ones(rate):
    dropped = 1 - kept(rate).double().mean(dim=-1)
    deviation = math.sqrt(rate * (1 - rate) / SAMPLES)
    assert (dropped - rate).abs().max() < 4.5 * deviation


def test_branches_blocks_samples_and_epochs_are_independent():
    draws = kept(0.5).double()
    table = torch.corrcoef(draws.flatten(0, 1)) - torch.eye(2 * DEPTH)
    assert table.abs().max() < 4.5 / math.sqrt(SAMPLES)
    flat = draws.flatten(0, 1)
    for other in (flat.roll(1, dims=-1), kept(0.5, key=6).double().flatten(0, 1)):
        pair = torch.corrcoef(torch.stack([flat.flatten(), other.flatten()]))[0, 1]
        assert abs(pair) < 4.5 / math.sqrt(flat.numel())


def test_extreme_rates():
    assert kept(0.0).all()
    assert not kept(1.0 - 1e-12).any()


def tiny(**changes):
    options = {
        "width": 22, "depth": 4, "num_heads": 2, "absolute_position": False,
        "relative_position": "none", "layer_scale": 0.1, "drop_path_rate": 0.7,
        "mask_token": False, "final_norm": True, "init_cut": 2.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return VisionTransformer((24, 40), 8, **(options | changes))


def test_a_sample_drops_the_same_wherever_it_stands():
    model, images = tiny(), torch.randn(7, 3, 24, 40)
    keys = sample_keys(3, torch.arange(7))

    def features(rows):
        model.sample_keys = keys[rows]
        return model(images[rows])

    whole = features(torch.arange(7))
    order = torch.tensor([4, 6, 0, 1, 5, 2, 3])
    parts = torch.cat([features(order[:2]), features(order[2:])])
    torch.testing.assert_close(parts, whole[order], rtol=0, atol=1e-6)
    model.sample_keys = sample_keys(4, torch.arange(7))
    assert not torch.allclose(model(images), whole, atol=1e-3)
    taps = model.forward_blocks(images, taps=[3])[0]
    torch.testing.assert_close(model.norm(taps), model(images), rtol=0, atol=1e-6)


def test_keys_are_what_the_blocks_drop():
    model, images = tiny(), torch.randn(7, 3, 24, 40)
    model.sample_keys = sample_keys(3, torch.arange(7))
    limits = thresholds([0.7 * i / 3 for i in range(4)])
    table = kept_branches(model.sample_keys, limits)
    x = model._embed(images, None)
    for i, block in enumerate(model.blocks):
        keep = 1 - 0.7 * i / 3
        scale = table[i].float()[:, :, None, None] / keep
        x = x + scale[0] * block.gamma_1 * block.attn(block.norm1(x), None)
        x = x + scale[1] * block.gamma_2 * block.mlp(block.norm2(x))
    torch.testing.assert_close(model(images), model.norm(x), rtol=0, atol=1e-5)


def test_without_keys_torch_draws_and_evaluation_drops_nothing():
    model, images = tiny(), torch.randn(7, 3, 24, 40)
    torch.manual_seed(1)
    first = model(images)
    assert not torch.allclose(model(images), first, atol=1e-3)
    torch.manual_seed(1)
    assert torch.equal(model(images), first)
    model.eval()
    plain = model(images)
    model.sample_keys = sample_keys(3, torch.arange(7))
    assert torch.equal(model(images), plain)


def test_keys_are_in_no_checkpoint():
    assert tiny().state_dict().keys() == tiny(drop_path_rate=0.0).state_dict().keys()
    assert not any("drop" in key for key in tiny().state_dict())


def test_keys_of_another_batch_are_refused():
    model = tiny()
    model.sample_keys = sample_keys(3, torch.arange(6))
    with pytest.raises(AssertionError, match="another batch"):
        model(torch.randn(7, 3, 24, 40))


def test_adding_to_rows_keeps_nothing_of_what_was_added():
    x = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    added = torch.randn(3, 3, 7, dtype=torch.float64, requires_grad=True)
    rows, kept = torch.tensor([0, 2, 4]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = add_rows(x, rows, added)
    assert torch.equal(result, x.index_add(0, rows, added))
    assert sum(tensor.numel() for tensor in kept) == len(rows)
    assert torch.autograd.gradcheck(lambda a, b: add_rows(a, rows, b), (x, added))
