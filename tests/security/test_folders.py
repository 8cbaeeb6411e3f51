"""Where a run may write: its own folder, below the user's."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from beit import config
from beit.errors import UserError
from beit.security.composing import check_composed

BASE = ["task=classification", "data=digits", "model=micro", "trainer.max_epochs=1", "name=x"]
CHECKPOINTS = "lightning.pytorch.callbacks.ModelCheckpoint"
SET = "beit.data.sources.TorchvisionSource"


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    content = OmegaConf.to_container(config.compose(BASE), resolve=False)
    return OmegaConf.create({**content, "hydra": {"sweep": {"dir": "${paths.runs_dir}/x"}}})


@pytest.fixture
def mine(composed: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Checks a config with these lines of a recipe and words of the user's, as if in `here`."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def check(text: str, *words: str) -> None:
        given = OmegaConf.create(text or "{}"), OmegaConf.from_dotlist([*words])
        cfg = OmegaConf.merge(composed, *given)
        check_composed(cfg, list(words), acts=False)

    return check


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("paths: {output_dir: /somewhere}", "paths.output_dir"),
        ("paths: {output_dir: ../x}", "paths.output_dir"),
        ("paths: {output_dir: runs}", "paths.output_dir"),
        ("paths: {output_dir: runs/../x}", "paths.output_dir"),
        ("paths: {runs_dir: /somewhere}", "paths.runs_dir"),
        ("paths: {runs_dir: ~/x}", "paths.runs_dir"),
        ("paths: {runs_dir: '${oc.env:HOME}'}", "paths.runs_dir"),
        ("trainer: {default_root_dir: /x}", "trainer.default_root_dir"),
        ("trainer: {default_root_dir: elsewhere}", "trainer.default_root_dir"),
        ("callbacks: {curves: {folder: '${paths.output_dir}/../y'}}", "callbacks.curves.folder"),
        ("callbacks: {curves: {metrics_file: m.csv}}", "callbacks.curves.metrics_file"),
        ("callbacks: {checkpoints: {folder: /x}}", "callbacks.checkpoints.folder"),
        ("logger: {csv: {save_dir: .}}", "logger.csv.save_dir"),
        ("logger: {tensorboard: {version: ../../../x}}", "logger.tensorboard.version"),
        ("logger: {tensorboard: {name: /x}}", "logger.tensorboard.name"),
        (
            f"callbacks: {{a: {{_target_: {CHECKPOINTS}, dirpath: 's3://x'}}}}",
            "callbacks.a.dirpath",
        ),
        (f"callbacks: {{a: {{_target_: {CHECKPOINTS}, filename: a/../../b}}}}", "a.filename"),
        (f"callbacks: {{a: {{_target_: {CHECKPOINTS}, filename: a/../b}}}}", "a.filename"),
        (f"callbacks: {{a: {{_target_: {CHECKPOINTS}, filename: 'file://x'}}}}", "a.filename"),
        (f"callbacks: {{a: {{_target_: {CHECKPOINTS}, filename: ~/x}}}}", "a.filename"),
        (f"callbacks: {{a: {{_target_: {CHECKPOINTS}, _args_: [x]}}}}", "a._args_"),
        (f"data: {{train: {{_target_: {SET}, download: true, root: /x}}}}", "data.train.root"),
        (f"data: {{train: {{_target_: {SET}, download: true, _args_: [/x]}}}}", "train.root"),
        (f"data: {{train: {{a: {{_target_: {SET}, download: true, root: /x}}}}}}", "train.a.root"),
        (f"model: {{x: {{_target_: {SET}, download: true, root: data}}}}", "model.x.download"),
        (f"views: {{x: {{_target_: {CHECKPOINTS}, dirpath: /x}}}}", "views.x: .*writes"),
        ("task: {x: {_target_: beit.loggers.wandb.BoundedWandbLogger}}", "task.x: .*writes"),
        ("hydra: {sweep: {dir: /x}}", "hydra.sweep.dir"),
    ],
)
def test_a_recipe_may_not_choose_where_to_write(text: str, key: str, mine) -> None:
    with pytest.raises(UserError, match=key):
        mine(text)


def test_what_people_do_is_allowed(mine, tmp_path: Path) -> None:
    mine("")
    mine("name: a/b/c")
    mine("paths: {runs_dir: mine}")
    mine("paths: {output_dir: '${paths.runs_dir}/a/${name}'}")
    for word in (f"paths.runs_dir={tmp_path}/r", "paths.runs_dir=../r", "paths.data_dir=/x"):
        mine("", word)
    mine("", f"paths.output_dir={tmp_path}/anywhere")
    mine(f"callbacks: {{a: {{_target_: {CHECKPOINTS}, dirpath: '${{paths.output_dir}}/b/c'}}}}")
    given = f"data: {{train: {{_target_: {SET}, download: true, root: "
    mine(given + "'${paths.data_dir}'}}", "paths.data_dir=/x")
    mine(given + "/elsewhere}}", "data.train.root=/somewhere")
    with pytest.raises(UserError, match=r"paths\.data_dir=/x lies outside"):
        mine(given + "/x/y}}\npaths: {data_dir: /x}")


def test_links_are_followed(mine, tmp_path: Path) -> None:
    runs = tmp_path / "here" / "runs"
    (tmp_path / "elsewhere").mkdir()
    runs.mkdir()
    (runs / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"paths\.output_dir=runs/x lies outside"):
        mine("")
    (runs / "x").unlink()
    runs.rmdir()
    runs.symlink_to(tmp_path / "elsewhere")  # where the user keeps runs, by the user's own link
    mine("")
    (runs.parent / "other").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"paths\.runs_dir=other lies outside"):
        mine("paths: {runs_dir: other}")


def test_the_users_own_file_may_choose(mine, tmp_path: Path, monkeypatch) -> None:
    from beit.security import folders

    own = tmp_path / "configs"
    (own / "local").mkdir(parents=True)
    (own / "local" / "default.yaml").write_text("paths: {runs_dir: /somewhere}\n")
    monkeypatch.setattr(config, "config_dir", lambda: own)
    assert folders._local_paths() == {"runs_dir": "/somewhere"}
    mine("paths: {runs_dir: /somewhere}")
    with pytest.raises(UserError, match=r"paths\.output_dir=/other"):
        mine("paths: {runs_dir: /somewhere, output_dir: /other}")
    with pytest.raises(UserError, match=r"paths\.runs_dir=/other"):  # not the user's value
        mine("paths: {runs_dir: /other}")
    (own / "local" / "default.yaml").write_text("a: [unclosed")
    assert folders._local_paths() == {}


def test_what_cannot_be_told_is_refused(mine) -> None:
    with pytest.raises(UserError, match=r"paths\.output_dir=.*lies outside"):
        config.compose([*BASE[:-1], "name=../../x"])
    with pytest.raises(UserError, match=r"paths\.output_dir cannot be told before the run"):
        config.compose([*BASE[:-1], "name='${hydra:job.num}'"])
