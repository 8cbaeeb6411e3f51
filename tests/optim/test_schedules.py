import numpy as np
import pytest

from beit.optim.schedules import warmup_cosine, warmup_linear


@pytest.mark.parametrize(("total", "warmup"), [(37, 5), (11, 0), (11, 1), (7, 7)])
def test_agrees_with_the_arrays_of_the_released_code(total, warmup):
    lr, min_lr = 1.5e-3, 1e-5
    rising = np.linspace(0, lr, warmup)
    falling = min_lr + 0.5 * (lr - min_lr) * (
        1 + np.cos(np.pi * np.arange(total - warmup) / max(total - warmup, 1))
    )
    expected = np.concatenate([rising, falling])
    got = [
        warmup_cosine(step, total_steps=total, warmup_steps=warmup, lr=lr, min_lr=min_lr)
        for step in range(total)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_values_by_hand():
    form = {"total_steps": 15, "warmup_steps": 5, "lr": 1.0, "min_lr": 0.2}
    steps = {0: 0.0, 2: 0.5, 4: 1.0, 5: 1.0, 10: 0.6, 15: 0.2, 99: 0.2}
    for step, value in steps.items():
        assert warmup_cosine(step, **form) == pytest.approx(value)


@pytest.mark.parametrize(("total", "warmup"), [(37, 5), (11, 0), (11, 1), (7, 7)])
@pytest.mark.parametrize("min_lr", [0.0, 1e-5])
def test_linear_agrees_with_the_hooks_of_mmcv_written_out(total, warmup, min_lr):
    """Poly of power 1, by step; its warm-up takes a share of the rate that poly has by then."""
    lr, ratio = 7e-4, 1e-6
    expected = []
    for step in range(total + 1):
        rate = (lr - min_lr) * (1 - step / total) ** 1.0 + min_lr
        if step < warmup:
            rate = rate * (1 - (1 - step / warmup) * (1 - ratio))
        expected.append(rate)
    form = {"total_steps": total, "warmup_steps": warmup, "lr": lr, "min_lr": min_lr}
    got = [warmup_linear(step, **form) for step in range(total + 1)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert got[-1] == min_lr
    assert warmup == 0 or got[0] == pytest.approx(lr * 1e-6)


def test_linear_by_hand():
    form = {"total_steps": 10, "warmup_steps": 2, "lr": 1.0, "min_lr": 0.0}
    steps = {0: 1e-6, 1: 0.9 * 0.5000005, 2: 0.8, 5: 0.5, 9: 0.1, 10: 0.0, 99: 0.0}
    for step, value in steps.items():
        assert warmup_linear(step, **form) == pytest.approx(value)
