"""Ranks, entropies and perplexity against their definitions written out."""

import math

import pytest
import torch
from torch import nn

from beit.data.masking import RandomMasking
from beit.data.randomness import sample_rng
from beit.errors import UserError
from beit.evaluation.features import Compute
from beit.evaluation.health import AttentionEntropy, FeatureMoments, Health
from beit.models.heads import ClassificationHead, MIMHead

CPU = Compute(torch.device("cpu"))
RANDOM = RandomMasking((3, 5), mask_ratio=0.4)


class Network(nn.Module):
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head


def exp_entropy(shares):
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def test_ranks_are_those_of_the_singular_values():
    torch.manual_seed(0)
    x = torch.randn(90, 4) @ torch.randn(4, 7) + 30.0  # rank 5 of 7 with the common vector
    moments = FeatureMoments(7, torch.device("cpu"))
    for part in x.split(13):
        moments.add(part)
    values = torch.linalg.svdvals(x.double()).tolist()
    smoothed = [value / sum(values) + 1e-7 for value in values]
    rankme = math.exp(-sum(p * math.log(p) for p in smoothed))
    assert moments.rankme() == pytest.approx(rankme, rel=1e-6)
    centred = x.double() - x.double().mean(0)
    values = torch.linalg.svdvals(centred).tolist()
    assert moments.effective_rank() == pytest.approx(
        exp_entropy([value / sum(values) for value in values]), rel=1e-5
    )
    assert moments.rankme() < moments.effective_rank() < 4.1


@pytest.mark.parametrize(("dimensions", "expected"), [(7, 7.0), (1, 1.0), (3, 3.0)])
def test_ranks_of_known_spectra(dimensions, expected):
    moments = FeatureMoments(7, torch.device("cpu"))
    basis = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))[0]
    directions = basis[:dimensions]
    moments.add(torch.cat([directions, -directions]))
    assert moments.rankme() == pytest.approx(expected, rel=2e-3)
    assert moments.effective_rank() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("relative", ["none", "shared", "per_block"])
def test_probabilities_reproduce_the_blocks_output(backbone, relative):
    model = backbone(relative_position=relative).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    attention = model.blocks[1].attn
    seen = []
    attention.register_forward_hook(lambda *of: seen.append(of[1:]))
    with torch.no_grad():
        model(torch.randn(3, 3, 24, 40))
        (arguments, output), x = seen[0], seen[0][0][0]
        found = attention.probabilities(*arguments)
        assert found.shape == (3, 2, 16, 16)
        torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 16), rtol=0, atol=1e-5)
        v = (x @ attention.qkv.weight[44:].T + attention.v_bias).view(3, 16, 2, 11)
        mixed = torch.einsum("bhqk,bkhd->bqhd", found, v).reshape(3, 16, 22)
        torch.testing.assert_close(attention.proj(mixed), output, rtol=0, atol=1e-5)


def test_entropies_are_those_of_the_probabilities(backbone, images, labelled, noise):
    model = backbone(relative_position="shared")
    with torch.no_grad():
        model.rel_pos_bias.relative_position_bias_table.normal_()
    data = labelled(noise(9), noise(5))
    report = Health()(Network(model, None), data, CPU)
    assert not any(block.attn._forward_hooks for block in model.blocks)
    totals = {}
    look = [
        block.attn.register_forward_hook(
            lambda attn, args, out, i=i: totals.setdefault(i, []).append(attn.probabilities(*args))
        )
        for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        model.eval()(torch.stack([batch for part in data.val.batches() for batch in part.images]))
    assert len(look) == len(report.rows) == 4
    for i, row in enumerate(report.rows):
        by_head = [0.0, 0.0]
        for image in torch.cat(totals[i]).tolist():
            for head, queries in enumerate(image):
                for query in queries:
                    by_head[head] -= sum(p * math.log(p) for p in query if p > 0) / (5 * 16)
        assert row["layer"] == i + 1
        assert row["attention_entropy"] == pytest.approx(sum(by_head) / 2, rel=1e-4)
        assert row["attention_share"] == pytest.approx(sum(by_head) / 2 / math.log(16), rel=1e-4)
        assert row["lowest_head"] == pytest.approx(min(by_head) / math.log(16), rel=1e-4)
        assert row["highest_head"] == pytest.approx(max(by_head) / math.log(16), rel=1e-4)
    assert report.summary == {"measured_on": "5 validation images"}


def test_ranks_are_of_the_patch_tokens(backbone, labelled, noise):
    model = backbone()
    data = labelled(noise(9), noise(5))
    row = Health(layers=[2])(Network(model, None), data, CPU).rows[0]
    with torch.no_grad():
        pictures = torch.cat([batch.images for batch in data.val.batches()])
        tokens = model.eval().forward_blocks(pictures, taps=[1])[0][:, 1:].reshape(-1, 22)
    values = torch.linalg.svdvals(tokens.double()).tolist()
    assert row["rankme"] == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in (v / sum(values) + 1e-7 for v in values))), rel=1e-4
    )


def test_uniform_attention_has_the_highest_entropy(backbone):
    model = backbone().eval()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:22].zero_()  # queries that ask nothing
        look = AttentionEntropy(model.blocks[0].attn)
        model(torch.randn(2, 3, 24, 40))
    look.handle.remove()
    assert look.mean().tolist() == pytest.approx([math.log(16)] * 2, rel=1e-5)
    assert not model.blocks[0].attn._forward_hooks


def test_perplexity_is_of_the_tokens_predicted_where_hidden(backbone, labelled, noise):
    network = Network(backbone(), MIMHead(22, 13))
    with torch.no_grad():
        network.head.lm_head.weight.normal_()
    data = labelled(noise(9), noise(20))
    found = Health(masking=RANDOM, seed=3, images=11)(network, data, CPU).summary
    counts = [0] * 13
    with torch.no_grad():
        for batch in data.val.part(11, seed=3).batches():
            for image, index in zip(batch.images, batch.indices.tolist()):
                mask = torch.from_numpy(RANDOM(sample_rng(3, 0, index, "mask")))[None]
                logits = network.head(network.backbone.eval()(image[None], mask), mask)
                for token in logits.argmax(1).tolist():
                    counts[token] += 1
    assert sum(counts) == 11 * 6
    perplexity = exp_entropy([count / sum(counts) for count in counts])
    assert found["predicted_token_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert found["predicted_tokens"] == sum(count > 0 for count in counts)
    assert found["measured_on"] == "11 validation images"


def test_networks_without_tokens_have_no_perplexity(backbone, labelled, noise):
    network = Network(backbone(), ClassificationHead(22, 3))
    report = Health(masking=RANDOM, layers=[1])(network, labelled(noise(9), noise(3)), CPU)
    assert report.summary == {"measured_on": "3 validation images"}


def test_what_is_refused(backbone, labelled, noise):
    with pytest.raises(UserError, match="images 0"):
        Health(images=0)
    with pytest.raises(UserError, match="layers 1 to 4"):
        Health(layers=[5]).check(backbone(), labelled(noise(9), noise(3)))
