"""What a config's value is taken for, against Python's own annotations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import lightning as L
import pytest

from beit.annotations import accepts, annotations, expectation
from beit.tokenizers.base import Tokenizer

Precision = annotations(L.Trainer)["precision"]
NODE = {"_target_": "beit.x"}


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (int, [3, -1], [True, 3.0, "3", None, [3]]),
        (float, [3, 0.5], [True, "abc", None]),
        (bool, [True], [1, "true", None]),
        (str, ["", "a"], [3, None, ["a"]]),
        (str | Path, ["a"], [3]),
        (Optional[int], [None, 3], ["3", 0.5]),  # noqa: UP045
        (int | Sequence[int], [3, [3, 5]], ["35", [3, "5"], None]),
        (tuple[float, float], [[0.9, 1]], [[0.9], [0.9, 1, 1], 0.9]),
        (list[int] | str | int, ["auto", 2, [0, 1]], [0.5, ["0"]]),
        (dict[str, int], [{}], [[], 3]),
        (Literal["a", 32], ["a", 32], ["b", "32", 3]),
        (Precision, ["bf16-mixed", 32, None], ["foo", 31]),
        (Tokenizer, [NODE], [3, None, {}, "dalle"]),
        (Tokenizer | None, [NODE, None], [3]),
        (Callable[[int], int], [3, {}], []),  # nothing can be told
        (Any, [3, None], []),
    ],
)
def test_accepts(annotation: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not accepts(annotation, value)] == []
    assert [value for value in wrong if accepts(annotation, value)] == []


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (float | None, "a number or null"),
        (int | Sequence[int], "a whole number or a list"),
        (tuple[float, float], "a list of 2"),
        (Literal["a", "b"] | bool, "one of a, b or true or false"),
        (Tokenizer, "a node whose _target_ makes a kind of Tokenizer"),
    ],
)
def test_expectation(annotation: Any, words: str) -> None:
    assert expectation(annotation) == words


def test_annotations_that_cannot_be_read_are_left_alone() -> None:
    def function(x: "Nowhere") -> None:  # type: ignore[name-defined] # noqa: F821
        pass

    assert annotations(function) == {}
