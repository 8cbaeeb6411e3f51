"""What a sweep runs beside its members: which commands, in which order, and what is kept."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from beit import config, planned, stages, sweep
from beit.errors import UserError
from beit.explain import choices
from beit.stages import Stage
from beit.sweep import Sweep

PLAN = {
    "before": ["x/tokenizer"],
    "after": ["x/finetune"],
    "evaluations": {"knn": {"labels_per_class": 5}},
}
TYPED = ["sweep=x", "seed=3", "data=folder", "data.num_classes=4", "paths.data_dir=d", "optim.lr=1"]
SHARED = ["data=folder", "data.num_classes=4", "paths.data_dir=d"]


class Done:
    """Stands for a process: fails where its words say so, and leaves metrics."""

    started: ClassVar[list[list[str]]] = []
    fails: ClassVar[set[str]] = set()

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "beit.cli"]
        self.started.append(command[3:])
        what = " ".join(command[3:])
        self.code = int(any(word in what for word in self.fails))
        if not self.code:
            Path(env["BEIT_SWEEP_RESULT"]).write_text(json.dumps({"val/acc1": len(what)}))

    def wait(self) -> int:
        return self.code


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> type[Done]:
    monkeypatch.setattr(sweep.subprocess, "Popen", Done)
    Done.started, Done.fails = [], set()
    return Done


def test_the_words_of_each_stage() -> None:
    assert stages.before(PLAN, TYPED) == [
        Stage("x/tokenizer", "train", ["experiment=x/tokenizer", *SHARED, "resume=auto"])
    ]
    finetune, knn = stages.after(PLAN, TYPED, Path("s/0"), seed=3)
    weights = "s/0/checkpoints/last.safetensors"
    own = ["experiment=x/finetune", "seed=3", f"init_from={weights}"]
    assert finetune == Stage("finetune", "train", [*own, *SHARED, "resume=auto"], "s/0/finetune")
    words = [f"checkpoint={weights}", "evaluation=knn", "seed=3", *SHARED, *stages.ONE_DEVICE]
    words += ["labels_per_class=5", "output=s/0/knn", "overwrite=true"]
    assert knn == Stage("knn", "evaluate", words, "s/0/knn")


@pytest.mark.parametrize(
    "value",
    [None, True, 5, 1e-5, "a, b", [1, "x y"], {"a": {"b": [None, False]}}, "", []]
    + ["null", "True", "5", "-1.5", "1e-5", "1_0", "Inf", "nan", "x1", "1x", "e5", "a/5"],
)
def test_settings_of_an_evaluation_are_read_by_hydra_as_themselves(value: Any) -> None:
    plan = PLAN | {"after": [], "evaluations": {"knn": {"key": value}}}
    (knn,) = stages.after(plan, [], Path("s/0"), seed=0)
    (word,) = [word for word in knn.words if word.startswith("key=")]
    (read,) = OverridesParser.create().parse_overrides([word])
    assert OmegaConf.to_object(OmegaConf.create([read.value()]))[0] == value


def test_a_sweep_on_several_devices_evaluates_on_one() -> None:
    typed = ["trainer=ddp", "trainer.devices=4", "trainer.precision=16-mixed", "data=cifar10"]
    typed += ["loader.num_workers=5", "loader.last_batch=keep"]  # the last is of training alone
    _, knn = stages.after(PLAN, typed, Path("s/0"), seed=3)
    own = [word for word in knn.words if word.partition("=")[0] not in ("checkpoint", "output")]
    cfg = config.compose([w for w in own if w != "overwrite=true"], config_name="evaluate")
    assert (cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.strategy) == (1, 1, "auto")
    assert (cfg.trainer.accelerator, cfg.trainer.precision) == ("gpu", "16-mixed")
    assert cfg.loader.num_workers == 5


@pytest.mark.parametrize("name", choices("sweep"))
def test_every_sweep_can_be_told_what_follows(name: str) -> None:
    words = [f"sweep={name}", "experiment=demo/pretrain", "sweep.after=[a]", "sweep.metric=m"]
    cfg = config.compose(words)
    assert (list(cfg.sweep.after), cfg.sweep.metric) == (["a"], "m")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"before": ["demo/tokeniser"]}, "demo/tokeniser: .*did you mean demo/tokenizer"),
        ({"after": ["demo/finetun"]}, "finetun: .*did you mean demo/finetune"),
        ({"evaluations": {"kmm": {}}}, "kmm: evaluation=kmm does not exist"),
        ({"evaluations": {"knn": {"labels": 5}}}, "knn: labels is not a key"),
    ],
)
def test_what_could_not_follow_is_told_before_anything_runs(
    plan: dict[str, Any], said: str, tmp_path: Path, done: type[Done]
) -> None:
    full = {"metric": "m", "before": [], "after": [], "evaluations": {}, "search": None, **plan}
    cfg = OmegaConf.create({"sweep": full, "seed": 0})
    member = sweep.Member(0, ["data=digits"], str(tmp_path / "0"))
    with pytest.raises(UserError, match=said):
        planned.run(Sweep(["-m"]), member, cfg, {})
    assert not done.started
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["a/b-c.d", "with space", "it's", "a\\b", "\\' \\", "x=1,2", "[a]", "$"]
)
def test_a_quoted_text_is_read_by_hydra_as_itself(text: str) -> None:
    (word,) = OverridesParser.create().parse_overrides([f"key={stages.quoted(text)}"])
    assert word.value() == text


def start(folder: Path, *words: str) -> Sweep:
    made = Sweep(["-m"], metric="finetune/val/acc1")
    made.prepare(folder, [Stage("tokenizer", "train", ["do=tokenizer", "resume=auto"])])
    for number in (0, 1):
        place = str(folder / str(number) / "finetune")
        finetune = Stage("finetune", "train", [f"do=finetune{number}", "resume=auto"], place)
        probe = Stage("knn", "evaluate", [f"do=knn{number}"])
        own = [f"do=pretrain{number}", *words]
        made.run(folder / str(number), number, own, [finetune, probe])
    return made


def what_ran(done: type[Done]) -> list[str]:
    return [word[3:] for words in done.started for word in words if word.startswith("do=")]


def test_a_chain_stops_where_it_fails_and_goes_on_there(tmp_path: Path, done: type[Done]) -> None:
    done.fails = {"finetune0"}
    first = start(tmp_path / "s")
    rest = ["pretrain1", "finetune1", "knn1"]
    assert what_ran(done) == ["tokenizer", "pretrain0", "finetune0", *rest]
    assert [member.state for member in first.members[1:]] == [
        "finetune failed, exit code 1",
        "done",
    ]
    assert set(first.members[2].metrics) == {"val/acc1", "finetune/val/acc1", "knn/val/acc1"}
    assert first.code() == 1
    assert first.table().count("\n") == 2  # what runs before the members is none of them
    done.started.clear()
    done.fails.clear()
    again = start(tmp_path / "s", "resume=auto")
    assert what_ran(done) == ["finetune0", "knn0"]
    assert again.code() == 0
    assert set(again.members[1].metrics) == set(first.members[2].metrics)
    assert [len(words) for words in done.started if "paths.output_dir" in words[-1]] == [4]


def test_without_what_they_need_no_member_runs(tmp_path: Path, done: type[Done]) -> None:
    done.fails = {"tokenizer"}
    with pytest.raises(UserError, match="tokenizer, which the members need: failed"):
        start(tmp_path / "s")
    assert what_ran(done) == ["tokenizer"]


@pytest.mark.parametrize(
    "words",
    [
        "sweep.evaluations.knn.output=x",
        "sweep.evaluations.knn.trust=x",
        "sweep.after=['x trust=[os.]']",
        "sweep.before=['a=b']",
    ],
)
def test_a_stages_words_are_no_place_for_others(words: str) -> None:
    with pytest.raises(UserError, match="may not be"):
        config.compose(["sweep=table4", f"+{words}" if "evaluations" in words else words])


def test_table_4_is_the_papers() -> None:
    """Each row differs from the first in what its name says, and in nothing else."""
    tokens_only = {"views_per_image", "token_cache"}
    of_pixels = {"task.target", "task.head", "views", "datamodule", *tokens_only}
    rows = {
        "no_blockwise": {"masking"},
        "pixels": of_pixels,
        "pixels_no_blockwise": {"masking", *of_pixels},
        "all_patches": {"task.predict"},
        "unmasked_input": {"task.predict", "task.mask_input"},
        "longer": {"trainer"},
    }
    cfg = config.compose(["sweep=table4"])
    members = config.compose(["sweep=table4"]).sweep
    assert (list(members.before), list(members.after)) == (
        ["table4/tokenizer"],
        ["table4/finetune"],
    )
    for row, expected in rows.items():
        other = config.compose([f"experiment=table4/{row}"])
        assert _differing(cfg, other) == expected, row
    longer = config.compose(["experiment=table4/longer"])
    assert cfg.views_per_image == longer.trainer.max_epochs  # the crops of an epoch are all rows'
    assert longer.trainer.max_epochs / cfg.trainer.max_epochs == pytest.approx(800 / 300)


def _differing(one: Any, other: Any) -> set[str]:
    from omegaconf import OmegaConf

    plain = [OmegaConf.to_container(cfg, resolve=False) for cfg in (one, other)]
    for cfg in plain:
        cfg |= {f"task.{key}": value for key, value in cfg.pop("task").items()}
        for key in ("name", "sweep", "hydra"):
            cfg.pop(key, None)
    keys = plain[0].keys() | plain[1].keys()
    return {key for key in keys if plain[0].get(key) != plain[1].get(key)}
