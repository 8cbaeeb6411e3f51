"""Optimizer steps by hand; each row is what a Trainer of Lightning 2.6 makes."""

import pytest

from beit.tasks.planning import plan


@pytest.mark.parametrize(
    ("batches", "accumulate", "limit", "max_epochs", "max_steps", "expected"),
    [
        (10, 1, None, 3, -1, (10, 30)),
        (10, 1, 1.0, 3, -1, (10, 30)),
        (10, 1, 0.5, 3, -1, (5, 15)),
        (20, 2, 7, 3, -1, (4, 12)),
        (20, 2, 100, 3, -1, (10, 30)),
        (21, 2, None, 3, -1, (11, 33)),
        (10, 1, None, 3, 12, (10, 12)),
        (10, 1, None, -1, 12, (10, 12)),
        (10, 1, None, None, 12, (10, 12)),
    ],
)
def test_plan_by_hand(
    batches: int,
    accumulate: int,
    limit: float | int | None,
    max_epochs: int | None,
    max_steps: int,
    expected: tuple[int, int],
) -> None:
    found = plan(
        batches, accumulate=accumulate, limit=limit, max_epochs=max_epochs, max_steps=max_steps
    )
    assert found == expected
