import random

import numpy as np
import torch

from beit.data.randomness import keyed_global_rng, sample_rng


def draws(seed=3, epoch=2, index=11, stream="views"):
    return [sample_rng(seed, epoch, index, stream).random() for _ in range(1)]


def test_a_sample_draws_the_same_numbers_again():
    assert draws() == draws()


def test_every_part_of_the_key_counts():
    others = [
        draws(seed=4), draws(epoch=3), draws(index=12), draws(stream="mask"),
        draws(epoch=1, index=12), draws(seed=2, epoch=3),
    ]  # fmt: skip
    assert draws() not in others
    assert len({value for (value,) in others}) == len(others)


def global_draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_global_generators_are_keyed_inside_and_untouched_outside():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = global_draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with keyed_global_rng(3, 2, 11):
        first = global_draws()
    assert global_draws() == expected
    with keyed_global_rng(3, 2, 11):
        assert global_draws() == first
    with keyed_global_rng(3, 2, 12):
        assert all(a != b for a, b in zip(global_draws(), first, strict=True))


def test_global_generators_are_put_back_after_an_error():
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    try:
        with keyed_global_rng(0, 0, 0):
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.rand(()), expected)
