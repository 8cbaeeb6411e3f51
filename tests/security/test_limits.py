"""Small texts that stand for a lot are refused in milliseconds."""

import io
import time

import pytest
import yaml
from omegaconf import OmegaConf

from beit.config import config_dir
from beit.errors import UserError
from beit.security import limits


def load(text: str) -> object:
    return yaml.load(io.StringIO(text), Loader=limits.BoundedLoader)


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb(9), "stands for more than"),
        (
            "a: &a {x: 1}\n" + "b: &b {k: *a, l: *a, m: *a}\n" * 1 + "c: [" + "*b, " * 9000 + "]",
            "than",
        ),
        ("a: &a [*a]", "alias of what it stands in"),
        ("a: &a {b: *a}", "alias of what it stands in"),
        ("[" * 41 + "]" * 41, "levels deep"),
        ("x: " + "y" * limits.MAX_BYTES, "KiB"),
        ("x: " + "9" * 5000, "cannot be read"),
    ],
)
def test_what_stands_for_too_much(text: str, expected: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=expected):
        load(text)
    assert time.process_time() - start < 2  # seconds of processor time; the bomb alone takes 58


def test_the_bomb_takes_milliseconds() -> None:
    start = time.process_time()
    with limits.bounded_yaml(), pytest.raises(UserError, match="stands for more than"):
        OmegaConf.create(bomb(8))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("tag", ["object/apply:os.system", "name:os.system", "tuple"])
def test_no_tag_of_pythons_is_read(tag: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load(f"!!python/{tag} [x]")
    with pytest.raises(yaml.YAMLError):
        load("!!python/object/apply:pathlib.Path [x]")  # which OmegaConf's own reads


def test_what_is_usual_is_read_as_before() -> None:
    text = "a: &a {x: 1e-3, y: [1, 2]}\nb: {<<: *a, z: on}\nc: *a\nd: 2020-01-01\ne: null"
    assert load(text) == {
        "a": {"x": 1e-3, "y": [1, 2]},
        "b": {"x": 1e-3, "y": [1, 2], "z": True},
        "c": {"x": 1e-3, "y": [1, 2]},
        "d": "2020-01-01",
        "e": None,
    }
    for path in config_dir().rglob("*.yaml"):
        with limits.bounded_yaml():
            bounded = OmegaConf.load(path)
        assert bounded == OmegaConf.load(path)
    with limits.bounded_yaml(), pytest.raises(yaml.YAMLError, match="duplicate"):
        OmegaConf.create("a: 1\na: 2")


def test_the_bounds_end_with_the_block() -> None:
    import omegaconf._utils
    import omegaconf.basecontainer

    with limits.bounded_yaml():
        pass
    for module in (omegaconf._utils, omegaconf.basecontainer):
        assert module.get_yaml_loader is limits._plain_loader


@pytest.mark.parametrize(
    "content",
    [
        {"k0": "x" * 9, **{f"k{n}": f"${{k{n - 1}}}${{k{n - 1}}}" for n in range(1, 40)}},
        {"k0": [1], **{f"k{n}": [f"${{k{n - 1}}}"] * 3 for n in range(1, 40)}},
        {"a": {"k0": "xx", **{f"k{n}": f"${{.k{n - 1}}}${{.k{n - 1}}}" for n in range(1, 40)}}},
        {
            "b": {
                "k0": {"x": 1},
                **{
                    f"k{n}": {"p": f"${{..k{n - 1}}}", "q": f"${{..k{n - 1}}}"}
                    for n in range(1, 60)
                },
            }
        },
        {"a": "x" * 3_000_000},
    ],
)
def test_interpolations_that_explode(content: dict[str, object]) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=r"stand for more|too many levels"):
        limits.check_resolved_size(content)
    assert time.process_time() - start < 0.5


def test_interpolations_of_a_run_do_not() -> None:
    limits.check_resolved_size({"a": {"b": "${c}", "d": "${a.b}"}, "c": [1] * 100})


@pytest.mark.parametrize("word", ["a=" + "[" * 41, "a=" + "x" * 40_000])
def test_words(word: str) -> None:
    with pytest.raises(UserError, match=r"^a: a value"):
        limits.check_word(word)
    limits.check_word("data.classes=[" + ",".join(f"class{n}" for n in range(1000)) + "]")


@pytest.mark.parametrize("content", [5, [1], {1: 2}, {"a": [0] * 30_000}])
def test_plain_data(content: object) -> None:
    with pytest.raises(UserError):
        limits.check_plain(content)
    deep: object = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError):
        limits.check_plain({"a": deep})
