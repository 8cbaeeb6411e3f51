"""Numbers out of a config: of the right kind, and within their limits."""

import math
from numbers import Integral, Real
from typing import Any

from beit.errors import UserError


def real_number(name: str, value: Any) -> float:
    """A finite number. Raises UserError for words, None and switches."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{name} {value!r}: expected a number")
    return value  # type: ignore[return-value]  # as it was given, for the log


def not_negative(name: str, value: Any) -> float:
    """A number of at least 0. Raises UserError otherwise."""
    if real_number(name, value) < 0:
        raise UserError(f"{name} {value!r}: expected a number of at least 0")
    return value


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """A whole number of at least so much. Raises UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise UserError(f"{name} {value!r}: expected a whole number of at least {at_least}")
    return int(value)


def checked_share(name: str, value: Any) -> float:
    """A number in [0, 1]. Raises UserError otherwise."""
    if not 0.0 <= real_number(name, value) <= 1.0:
        raise UserError(f"{name} {value!r}: must lie in [0, 1]")
    return value


def checked_normalisation(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue, of values in [0, 1].

    Raises UserError unless each is three numbers, and those of std are above 0.
    """
    for name, values, limit in (("mean", mean, ""), ("std", std, " above 0")):
        fits = isinstance(values, list | tuple) and len(values) == 3
        if fits:
            fits = all(isinstance(v, Real) and math.isfinite(v) for v in values)
        if not fits or (limit and min(values) <= 0):
            raise UserError(f"{name} {values!r}: expected three numbers{limit}, one a channel")
    return tuple(mean), tuple(std)
