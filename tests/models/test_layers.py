import pytest
import torch
import torch.nn.functional as F

from beit.models.layers import Block, PatchEmbedding, explicit_attention

BATCH, TOKENS, WIDTH, HEADS = 7, 16, 22, 2


def make_block(**changes):
    arguments = {
        "mlp_ratio": 4.0,
        "table_grid": None,
        "layer_scale": 0.1,
        "drop_rate": 0.0,
        "attention_drop_rate": 0.0,
        "drop_path_rate": 0.0,
    }
    return Block(WIDTH, HEADS, **{**arguments, **changes})


def test_patch_embedding_is_the_convolution():
    embed = PatchEmbedding(8, 3, WIDTH)
    images = torch.randn(BATCH, 3, 24, 40)
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected, rtol=0, atol=1e-5)


def test_explicit_attention_is_the_fused_one():
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, 11, requires_grad=True) for _ in range(3))
    bias = torch.randn(HEADS, TOKENS, TOKENS, requires_grad=True)
    leaves = (q, k, v, bias)
    ours = explicit_attention(q, k, v, bias, 11**-0.5, 0.0)
    fused = F.scaled_dot_product_attention(q, k, v, bias[None])
    seed = torch.randn_like(ours)
    torch.testing.assert_close(ours, fused, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, seed),
        torch.autograd.grad(fused, leaves, seed),
        rtol=0,
        atol=1e-5,
    )


def test_a_step_without_gradients_gives_the_same():
    block, x = make_block().eval(), torch.randn(BATCH, TOKENS, WIDTH)
    bias = torch.randn(HEADS, TOKENS, TOKENS)
    with_gradients = block(x, bias)
    with torch.no_grad():
        torch.testing.assert_close(block(x, bias), with_gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(layer_scale):
    rate, samples = 0.4, 3000
    block = make_block(drop_path_rate=rate, layer_scale=layer_scale)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()  # leaves the attention branch alone
        block.mlp.fc2.bias.zero_()
        x = torch.randn(1, 3, WIDTH)
        branch = block.eval()(x, None) - x
        many = x.expand(samples, -1, -1)
        added = block.train()(many, None) - many
    dropped = (added == 0).flatten(1).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(rate, abs=0.04)
    expected = (branch / (1 - rate)).expand(int((~dropped).sum()), -1, -1)
    torch.testing.assert_close(added[~dropped], expected, rtol=0, atol=1e-5)


def test_drop_path_gradients_are_those_of_a_multiplied_mask():
    block, x = make_block(drop_path_rate=0.4), torch.randn(BATCH, TOKENS, WIDTH)
    seed = torch.randn_like(x)
    torch.manual_seed(3)
    out = block(x.requires_grad_(), None)
    got = torch.autograd.grad(out, [x, *block.parameters()], seed)

    torch.manual_seed(3)
    keep1, keep2 = ((torch.rand(BATCH) < 0.6).float()[:, None, None] / 0.6 for _ in range(2))
    assert 0 < keep1.count_nonzero() < BATCH
    y = x + keep1 * block.gamma_1 * block.attn(block.norm1(x), None)
    y = y + keep2 * block.gamma_2 * block.mlp(block.norm2(y))
    torch.testing.assert_close(out, y, rtol=0, atol=1e-5)
    expected = torch.autograd.grad(y, [x, *block.parameters()], seed)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_all_samples_dropped_is_a_pass_through():
    block, x = make_block(drop_path_rate=0.999), torch.randn(2, TOKENS, WIDTH)
    torch.manual_seed(0)
    out = block(x, None)
    torch.testing.assert_close(out, x)
    out.sum().backward()  # parameters still get a gradient, of zeros: DDP needs one
    assert all(p.grad is not None for p in block.parameters())


def test_dropouts_act_in_training_only():
    block, x = make_block(drop_rate=0.3, attention_drop_rate=0.3), torch.randn(2, TOKENS, WIDTH)
    assert not torch.equal(block(x, None), block(x, None))
    block.eval()
    assert torch.equal(block(x, None), block(x, None))
