import math

import pytest
import torch
from torch import nn

from beit.errors import UserError
from beit.tokenizers.codebook import (
    CodeRevival,
    feature_sums,
    gumbel_softmax,
    imbalance,
    kl_to_uniform,
    split_codes,
)

V = 13


class Codebook(nn.Module):
    """Just the two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = V
        self.to_logits = nn.Linear(11, V)
        self.codebook = nn.Parameter(torch.randn(V, 5))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_kl_to_uniform_is_the_mean_over_positions_of_torch_s_own():
    logits = torch.randn(7, 3, 5, V, generator=generator()) * 3
    q = logits.softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(q), torch.distributions.Categorical(torch.ones_like(q))
    ).mean()
    torch.testing.assert_close(kl_to_uniform(logits), expected)


def test_imbalance_looks_at_the_batch_and_not_at_positions():
    sure = 50 * torch.eye(V).view(V, 1, 1, V)  # every position sure, every code used once
    assert imbalance(sure).item() == pytest.approx(0, abs=1e-5)
    assert kl_to_uniform(sure).item() == pytest.approx(math.log(V), abs=1e-5)
    collapsed = sure[:1].expand(7, 3, 5, V)
    assert imbalance(collapsed).item() == pytest.approx(math.log(V), abs=1e-4)


def test_imbalance_of_a_hand_made_mean():
    logits = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).clamp_min(1e-9).log()  # mean 0.75, 0.25
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert imbalance(logits).item() == pytest.approx(expected, abs=1e-5)


def test_gumbel_softmax_draws_codes_as_often_as_softmax_says():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    samples = gumbel_softmax(logits.expand(40_000, 4), temperature=0.3, generator=generator())
    assert torch.allclose(samples.sum(-1), torch.ones(40_000), atol=1e-5)
    shares = torch.bincount(samples.argmax(-1), minlength=4) / 40_000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.01, rtol=0)


def test_gumbel_softmax_is_the_relaxation_of_the_same_draws_at_any_temperature():
    logits = torch.randn(7, V, generator=generator())
    soft, sharp = (
        gumbel_softmax(logits, temperature=t, generator=generator(3)) for t in (2.0, 0.1)
    )
    # softmax(x / 0.1) follows from softmax(x / 2) by the power of 20
    torch.testing.assert_close(sharp, soft.pow(20) / soft.pow(20).sum(-1, keepdim=True))
    assert soft.max(-1).values.mean() < sharp.max(-1).values.mean()


def test_a_split_without_noise_changes_nothing_that_the_decoder_sees():
    tables = Codebook()
    features = torch.randn(7, 11, generator=generator())
    dead, parents = torch.tensor([1, 4, 8]), torch.tensor([2, 2, 3])
    with torch.no_grad():
        tables.to_logits.bias[dead] = -100.0  # never drawn
        before = tables.to_logits(features).softmax(-1)
        mixed_before = before @ tables.codebook
        split_codes(
            tables, dead, parents, centres=torch.ones(V, 11), noise=0.0, generator=generator()
        )
        after = tables.to_logits(features).softmax(-1)
    torch.testing.assert_close(after @ tables.codebook, mixed_before)
    torch.testing.assert_close(after[:, 2], before[:, 2] / 3)
    torch.testing.assert_close(after[:, 4], after[:, 2])


def revival(**changes):
    arguments = {"every_steps": 5, "until_share": 0.5, "dead_below": 0.1, "noise": 0.1} | changes
    return CodeRevival(**arguments)


def test_revival_replaces_dead_codes_alone_by_neighbours_of_busy_ones_with_their_moments():
    tables = Codebook()
    optimizer = torch.optim.AdamW(tables.parameters())
    tables.to_logits(torch.randn(7, 11)).pow(2).sum().add(tables.codebook.pow(2).sum()).backward()
    optimizer.step()
    counts = torch.full((V,), 50)
    counts[[0, 6]] = torch.tensor([0, 1])  # unused, and nearly so
    counts[9] = 100_000  # so busy that it is drawn as the parent of both
    old = {name: value.clone() for name, value in tables.state_dict().items()}
    revived = revival(dead_below=0.001)(
        tables,
        counts,
        centres=torch.zeros(V, 11),
        state=optimizer.state,
        generator=generator(),
    )
    assert revived == 2
    kept = [i for i in range(V) if i not in (0, 6)]
    assert torch.equal(tables.codebook[kept], old["codebook"][kept])
    for dead in (0, 6):
        for table in ("codebook", "to_logits.weight"):
            new, parent = tables.state_dict()[table][dead], old[table][9]
            assert 0 < (new - parent).norm() < 0.6 * parent.norm()
        moments = optimizer.state[tables.codebook]["exp_avg"]
        assert torch.equal(moments[dead], moments[9])


def test_two_ranks_with_the_same_counts_revive_alike():
    torch.manual_seed(0)
    one = Codebook()
    other = Codebook()
    other.load_state_dict(one.state_dict())
    counts = torch.tensor([0, 3] * 6 + [5])
    for tables in (one, other):
        revival()(tables, counts, centres=torch.zeros(V, 11), state={}, generator=generator(4))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("counts", [torch.zeros(V, dtype=torch.int64), torch.ones(V)])
def test_nothing_to_revive(counts):
    tables = Codebook()
    old = tables.codebook.clone()
    assert (
        revival()(tables, counts, centres=torch.zeros(V, 11), state={}, generator=generator()) == 0
    )
    assert torch.equal(tables.codebook, old)


def test_revival_is_due_every_so_many_steps_until_its_share():
    due = [step for step in range(1, 41) if revival().is_due(step, 40)]
    assert due == [5, 10, 15, 20]


@pytest.mark.parametrize("wrong", [{"every_steps": 0}, {"until_share": 1.1}, {"dead_below": 1.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        revival(**wrong)


def test_a_split_parts_the_parent_s_positions_even_where_features_share_a_large_mean():
    torch.manual_seed(0)
    tables = Codebook()
    features = torch.randn(400, 11) + 20 * torch.randn(11)
    with torch.no_grad():
        tables.to_logits.bias[3] = 1000.0  # everything in one code
        sums, counts = feature_sums(features, torch.full((400,), 3), V)
        assert counts.tolist() == [400 * (code == 3) for code in range(V)]
        dead, parents = torch.tensor([7]), torch.tensor([3])
        centres = sums / counts.clamp_min(1)[:, None]
        split_codes(tables, dead, parents, centres=centres, noise=0.1, generator=generator())
        ids = tables.to_logits(features).argmax(-1)
    assert set(ids.tolist()) == {3, 7}
    assert 0.35 < (ids == 7).float().mean() < 0.65


def test_feature_sums_against_a_loop():
    features = torch.randn(7, 3, 5, 11, generator=generator())
    ids = torch.randint(V - 1, (7, 3, 5), generator=generator())
    sums, counts = feature_sums(features, ids, V)
    for code in range(V):
        chosen = features[ids == code]
        assert counts[code] == len(chosen)
        torch.testing.assert_close(sums[code], chosen.sum(0), atol=1e-5, rtol=1e-5)
