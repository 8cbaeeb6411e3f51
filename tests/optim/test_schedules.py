import numpy as np
import pytest

from beit.optim.schedules import warmup_cosine


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
