"""Mistakes in what a node gives its constructor, and faults of the program, told apart."""

import pytest
from omegaconf import OmegaConf

from beit import building
from beit.errors import UserError
from beit.models import heads

HEAD = "beit.models.heads.MIMHead"


def test_a_foreign_refusal_has_the_key_that_the_user_would_change() -> None:
    cfg = OmegaConf.create(
        {
            "head": {"_target_": HEAD, "width": 22, "vocab_size": "${size}"},
            "task": {"_target_": "torch.nn.Sequential", "_args_": ["${head}"]},
            "size": -13,
        }
    )
    # torch's RuntimeError does not say which argument: all of the node's are named
    with pytest.raises(UserError, match=r"^head\(width=22, vocab_size=-13\): .*negative") as caught:
        building.instantiate(cfg.head)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(UserError, match=r"^head\(width=22, vocab_size=-13\): "):
        building.instantiate(cfg.task)
    with pytest.raises(UserError, match=r"^parts\[1\]\(width=22, vocab_size=-13\): "):
        building.instantiate({"parts": [5, {"_target_": HEAD, "width": 22, "vocab_size": -13}]})


def test_an_argument_that_is_named_is_blamed_where_it_stands() -> None:
    cfg = OmegaConf.create(
        {
            "trainer": {"_target_": "lightning.Trainer", "accelerator": "${which}"},
            "which": "foo",
        }
    )
    with pytest.raises(UserError, match=r"^which=foo: .*invalid accelerator"):
        building.instantiate(cfg.trainer)


def test_an_assertion_of_a_library_is_a_mistake() -> None:
    node = {"_target_": "torch.nn.MultiheadAttention", "embed_dim": 22, "num_heads": 3}
    with pytest.raises(UserError, match=r"^torch\.nn\..*=.*embed_dim must be divisible"):
        building.instantiate(node)


def test_our_own_refusals_have_the_key_of_their_node() -> None:
    cfg = OmegaConf.create({"a": {"head": {"_target_": HEAD.replace("MIM", "Classification")}}})
    cfg.a.head.update({"width": 22, "num_classes": 0})
    with pytest.raises(UserError, match=r"^a\.head: num_classes 0 must be at least 1$"):
        building.instantiate(cfg.a.head)


@pytest.mark.parametrize("fault", [TypeError, AssertionError, ZeroDivisionError, KeyError])
def test_a_fault_of_the_program_stays_one(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if our own code had raised it
    scope = {"__name__": "beit.models.vit", "fault": fault}
    exec("def broken(*_, **__):\n    raise fault('deep within')", scope)
    monkeypatch.setattr(heads, "truncated_normal_", scope["broken"])
    with pytest.raises(fault, match="deep within") as caught:
        building.instantiate({"_target_": HEAD, "width": 22, "vocab_size": 13})
    assert not isinstance(caught.value, UserError)
    assert caught.traceback[-1].name == "broken"


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ((), "task"),
        (("head",), "task.head"),
        (("head", "width"), "model.width"),
        (("backbone",), "model"),
        (("backbone", "width"), "model.width"),
        (("data", "source"), "data.train"),
        (("list", 1), "task.list[1]"),
        (("no",), "task.no"),
    ],
)
def test_located_follows_interpolations(place: tuple[str | int, ...], key: str) -> None:
    cfg = OmegaConf.create(
        {
            "task": {
                "backbone": "${model}",
                "head": {"width": "${model.width}"},
                "data": {"source": "${data.train}"},
                "list": [1, 2],
            },
            "model": {"width": 22},
            "data": {"train": {"path": "x"}},
        }
    )
    assert building.located(cfg.task, place) == key


def test_an_argument_given_in_python_is_checked_too() -> None:
    node = OmegaConf.create({"model": {"_target_": HEAD, "width": 22}})
    with pytest.raises(UserError, match=r"^model\.vocab_sise .* did you mean vocab_size\?$"):
        building.instantiate(node.model, vocab_sise=13)
