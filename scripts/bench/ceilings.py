"""What the machine can do at all: large matrix products, and copying memory."""

from collections.abc import Callable
from functools import partial

import torch

from scripts.bench.timing import seconds_of

# rows, inner, columns: a large square, and the MLP of a base-size step of 16 images
_PRODUCTS = ((2048, 2048, 2048), (3152, 768, 3072))
_QUICK_PRODUCTS = ((64, 64, 64),)
_COPIED = 2**28  # bytes, well beyond the caches
_TRIES = 6

Ceilings = dict[str, float]


def measure(*, quick: bool) -> Ceilings:
    """Best of some tries: flop/s of products in bf16 and fp32, bytes/s of a copy."""
    shapes = _QUICK_PRODUCTS if quick else _PRODUCTS
    found = {
        name: max(_product(*shape, dtype) for shape in shapes)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return {**found, "copy": _copy(_COPIED >> 8 if quick else _COPIED)}


def best(one: Ceilings, other: Ceilings) -> Ceilings:
    """The higher of each: the machine was seen to do it."""
    return {name: max(value, other.get(name, 0.0)) for name, value in one.items()}


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    return 2 * rows * inner * columns / _fastest(partial(torch.nn.functional.linear, left, right))


def _copy(count: int) -> float:
    """A byte that is copied is counted once."""
    source, target = torch.ones(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)
    return count / _fastest(partial(target.copy_, source))


def _fastest(step: Callable[[], object]) -> float:
    return min(seconds_of(step) for _ in range(_TRIES))
