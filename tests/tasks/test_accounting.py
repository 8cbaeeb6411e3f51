"""The global batch's mean against one big cross-entropy, and counts against numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit.tasks.accounting import MeanOverGlobalBatch, TokenHistogram

VOCAB = 13


def _task(model: nn.Module, accumulate: int) -> SimpleNamespace:
    trainer = SimpleNamespace(accumulate_grad_batches=accumulate, world_size=1)
    return SimpleNamespace(trainer=trainer, parameters=model.parameters)


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [([11], 1), ([11, 3], 2), ([1, 7, 5], 3), ([11, 3], 3), ([5], 2)],  # the last two cut short
)
def test_accumulated_gradient_is_that_of_one_mean_over_all_terms(
    sizes: list[int], accumulate: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    model = nn.Linear(22, VOCAB)
    inputs = [torch.randn(n, 22, generator=generator) for n in sizes]
    targets = [torch.randint(VOCAB, (n,), generator=generator) for n in sizes]

    average = MeanOverGlobalBatch()
    task = _task(model, accumulate)
    for i, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        total = F.cross_entropy(model(x), y, reduction="sum")
        (average(task, total, y.numel(), i) / accumulate).backward()
    average.correct_gradients(task)
    ours = model.weight.grad.clone()

    model.zero_grad()
    F.cross_entropy(model(torch.cat(inputs)), torch.cat(targets)).backward()
    torch.testing.assert_close(ours, model.weight.grad, rtol=1e-5, atol=1e-7)


def test_loss_of_a_single_micro_batch_is_the_plain_mean() -> None:
    model = nn.Linear(22, VOCAB)
    x, y = torch.randn(7, 22), torch.randint(VOCAB, (7,))
    total = F.cross_entropy(model(x), y, reduction="sum")
    loss = MeanOverGlobalBatch()(_task(model, 1), total, y.numel(), 0)
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y))


def test_an_empty_mask_cannot_reach_the_loss() -> None:
    with pytest.raises(AssertionError, match="empty mask"):
        MeanOverGlobalBatch()(_task(nn.Linear(2, 2), 1), torch.tensor(0.0), 0, 0)


def test_token_histogram_against_numpy() -> None:
    ids = np.random.default_rng(3).integers(0, VOCAB - 2, size=(7, 3, 5))
    histogram = TokenHistogram(VOCAB)
    histogram.update(torch.from_numpy(ids[:4]))
    histogram.update(torch.from_numpy(ids[4:]))
    counts = np.bincount(ids.ravel(), minlength=VOCAB)
    shares = counts[counts > 0] / counts.sum()
    assert histogram.commonest_share() == pytest.approx(counts.max() / counts.sum())
    assert histogram.used_share() == pytest.approx((counts > 0).mean())
    assert histogram.perplexity() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
