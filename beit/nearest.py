"""The right word nearest to a wrong one."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, options: Iterable[object], *, otherwise: str = "") -> str:
    """`did you mean X?`, or `otherwise`: without one, what the options are."""
    known = [str(option) for option in options]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return otherwise or f"expected {'one of ' if len(known) > 1 else ''}{', '.join(known)}"
