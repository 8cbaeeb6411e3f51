"""Hydra's own node, resolvers and words: what is refused as soon as a config is composed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from beit import config, resolvers
from beit.errors import UserError
from beit.interop import convert
from beit.recorded import from_checkpoint
from beit.security import composing

BASIC = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
TV = "beit.data.sources.TorchvisionSource"
OPEN = {"_target_": "io.open", "file": "x"}
BASE = ["task=classification", "data=digits", "model=micro", "trainer.max_epochs=1"]


@pytest.mark.parametrize(
    "word",
    [
        "hydra.run.dir=elsewhere",
        "hydra.output_subdir=.hydra",
        "hydra.job.chdir=true",
        "+hydra.job.env_set.LD_PRELOAD=x",
        "hydra.job.env_copy=[HOME]",
        "+hydra.callbacks.x={_target_:os.system}",
        "hydra.launcher._target_=evil.Launcher",
        "hydra/job_logging=default",
        "hydra/hydra_logging=default",
        "hydra.sweep.subdir=../x",
        "hydra.sweep.dir=/somewhere",
        "hydra.searchpath=[pkg://evil]",
        "+hydra.sweeper={params:{trust:x}}",
        "trust=x",
        r"hydra.searchpath=[pkg\://evil]",
    ],
)
def test_hydras_own_keys(word: str) -> None:
    """Also by the user: each has a key of ours that does it, or reaches code."""
    words = [*BASE, word]
    if word == "hydra.sweep.dir=/somewhere":  # the user's own word, and a folder
        config.compose(words)
        return
    with pytest.raises(UserError, match=r"may not|not allowed|only folders|command line"):
        config.compose(words)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"launcher": {**BASIC, "x": OPEN}}, r"hydra\.launcher\.x may not be set"),
        ({"sweeper": {"x": OPEN}}, r"hydra\.sweeper\.x may not be set"),
        ({"sweeper": {"max_batch_size": OPEN}}, r"max_batch_size\._target_: io\.open is not"),
        ({"sweeper": {"params": {"x": "${checkpoint_value:a,b}"}}}, "may not hold an interpol"),
        ({"launcher": {"_target_": "mine.Launcher", "x": OPEN}}, r"io\.open is not allowed"),
        ({"launcher": {"_target_": "yours.Launcher"}}, r"yours\.Launcher is not allowed"),
        ({"mode": "MULTIRUN"}, r"hydra\.mode may not be set"),
    ],
)
def test_what_hydra_would_build_of_a_recipes_plugin(
    node: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of a recipe's own, `hydra/launcher: mine`, has no schema."""
    monkeypatch.setenv("BEIT_TRUST", "mine.")
    own = {"run": {"dir": "."}, "job": {"chdir": False}}
    composing.check_hydra({**own, "launcher": {"_target_": "mine.Launcher", "folder": "x"}}, [])
    with pytest.raises(UserError, match=expected):
        composing.check_hydra({**own, **node}, [])


def test_a_nested_target_of_a_launcher_is_not_built(tmp_path: Path) -> None:
    for group, text in {
        "hydra/launcher": f"_target_: {BASIC['_target_']}\nx: {{_target_: io.open, file: x}}",
        "experiment": "# @package _global_\ndefaults: [override /hydra/launcher: mine]",
    }.items():
        (tmp_path / group).mkdir(parents=True)
        (tmp_path / group / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"hydra\.launcher\.x may not be set"):
        config.compose([*BASE, "experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])


def test_no_secret_comes_in_by_way_of_hydras_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "a-key-of-mine")
    with pytest.raises(UserError, match=r"job\.name: the variable MY_API_KEY looks like a secret"):
        config.compose([*BASE, "hydra.job.name=${oc.env:MY_API_KEY}"])
    config.compose([*BASE, "+trainer.api_key=${oc.env:MY_API_KEY}"])  # stands in it as a word


def test_a_number_is_all_that_another_checkpoint_may_give(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"vocab": 13, "node": {"_target_": "os.system"}, "text": "${oc.env:HOME}", "b": True}
    monkeypatch.setattr(resolvers, "_checkpoint_config", lambda path: {"tokenizer": content})
    assert resolvers._checkpoint_value("x", "tokenizer.vocab") == 13
    for key in ("tokenizer.node", "tokenizer.text", "tokenizer.b", "tokenizer", "other.x", "b.c"):
        with pytest.raises(UserError, match="is not a tokenizer's checkpoint"):
            resolvers._checkpoint_value("x", key)


def test_hydras_node_as_shipped_is_allowed() -> None:
    from hydra import compose, initialize_config_dir

    config.register()
    for words in (BASE, [*BASE, "sweep=seeds"], [*BASE, "hydra.verbose=true"]):
        with initialize_config_dir(config_dir=str(config.config_dir()), version_base="1.3"):
            cfg = compose("train", words, return_hydra_config=True)
        composing.check_composed(cfg, words, acts=True)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.decode:x}",
        "${oc.create:{a:1}}",
        "${oc.dict.values:model}",
        "${oc.deprecated:model}",
        "${ oc.create :{a:1}}",
        "${${name}}",
        "${model.${name}}",
        "${oc.select:${name}}",
        "x ${now:%Y}${unknown:1}",
    ],
)
def test_resolvers_that_do_more_than_look_up(value: str) -> None:
    with pytest.raises(UserError, match=r"resolver|inside the name"):
        composing.check_interpolations({"a": [{"b": value}]}, composing.COMPOSED)


def test_those_of_the_shipped_configs_are_enough() -> None:
    for path in config.config_dir().rglob("*.yaml"):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if path.name != "train.yaml":
            composing.check_interpolations(content, composing.PURE)
    for value in ("${oc.env:HOME}", "${now:%Y}", "${hydra:job.num}"):
        with pytest.raises(UserError, match="resolver"):  # not in a checkpoint
            composing.check_recorded({"name": value})
        composing.check_interpolations(value, composing.COMPOSED)


def test_every_member_of_a_sweep_is_looked_at(tmp_path: Path) -> None:
    """The loader that sweeps use for each member is the one that checks."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    config.register()
    with initialize_config_dir(config_dir=str(config.config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        with config.vetted():
            master = loader.load_configuration("train", BASE, RunMode.MULTIRUN)
            loader.load_sweep_config(master, [*BASE, "seed=1"])
            with pytest.raises(UserError, match="not allowed"):
                loader.load_sweep_config(master, [*BASE, "model._target_=os.system"])
            with pytest.raises(UserError, match="may not be set"):
                loader.load_sweep_config(master, [*BASE, "hydra.run.dir=x"])
        loader.load_sweep_config(master, [*BASE, "hydra.run.dir=x"])  # Hydra is as it was


def test_a_bomb_in_a_folder_of_configs(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "model" / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"bomb\.yaml stands for more than"):
        config.compose([*BASE[:2], "model=bomb", f"hydra.searchpath=[file://{tmp_path}]"])


@pytest.fixture(scope="module")
def composed() -> str:
    """The config of a run as JSON: composing takes a tenth of a second."""
    cfg = config.compose([*BASE, "name=x"])
    return json.dumps(OmegaConf.to_container(cfg, resolve=False))


@pytest.fixture
def content(composed: str) -> dict[str, object]:
    return json.loads(composed)


def _carries(content: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint has this config."""
    found = SimpleNamespace(composed=content)
    monkeypatch.setattr(convert, "any_checkpoint", lambda path: found)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"_target_": "os.system"}}, "os.system is not allowed"),
        ({"name": "${oc.env:HOME}"}, "resolver oc.env"),
        ({"model": {"width": "${oc.select:${name}}"}}, "inside the name"),
        ({"task": {"a": {"b": "${task.a}${task.a}"}}}, None),
        ({"trainer": 5}, "not one of a training run"),
        ({"data": {"train": {"_target_": TV, "download": True, "root": "/x"}}}, "outside of paths"),
        ({"views": {"x": {"_target_": TV, "download": True}}}, "only what stands in data"),
        ({"model": {"_target_": "lightning.pytorch.loggers.CSVLogger"}}, "writes, and may only"),
    ],
)
def test_the_config_of_a_strangers_checkpoint(
    changes: dict[str, object],
    expected: str | None,
    content: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content.update(changes)
    _carries(content, monkeypatch)
    if expected is None:
        from_checkpoint("x", [])  # what refers to itself is found when it is looked up
        return
    with pytest.raises(UserError, match=expected):
        from_checkpoint("x", [])


def test_a_word_does_not_bring_a_target_into_a_recorded_config(
    content: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    _carries(content, monkeypatch)
    for word in ("model._target_=os.system", "name=" + "[" * 50):
        with pytest.raises(UserError):
            from_checkpoint("x", [word])
    assert from_checkpoint("x", ["name=y", "seed=3"]).seed == 3
