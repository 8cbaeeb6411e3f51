"""Every file of the trainer, logger and callbacks groups builds what it says."""

import inspect
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from beit.checkpoints.file import read_file

# what files of a group refer to in the rest of a config
RUN = {
    "seed": 0,
    "model": {"image_size": 32},
    "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
CONFIGS = Path(__file__).parents[2] / "configs"


def names(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def build(group, name, tmp_path):
    """The group's file alone, with what it refers to."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = compose(config_name=f"{group}/{name}")[group]
    root = OmegaConf.create({"paths": {"output_dir": str(tmp_path)}, **RUN, group: node})
    return OmegaConf.create(OmegaConf.to_container(root, resolve=True))[group]


@pytest.mark.parametrize("name", names("trainer"))
def test_trainer(name, tmp_path):
    node = build("trainer", name, tmp_path)
    node.max_epochs = 1
    arguments = OmegaConf.to_container(node)
    strategy = arguments["strategy"]
    assert get_class(arguments.pop("_target_")) is L.Trainer
    inspect.signature(L.Trainer.__init__).bind(None, **arguments)
    assert isinstance(arguments["devices"], int)  # the accumulation is worked out from it
    assert isinstance(arguments["num_nodes"], int)
    assert arguments["use_distributed_sampler"] is False
    if strategy != "auto":
        strategy = instantiate(strategy)
        assert 60 <= strategy._timeout.total_seconds() <= 3600
    if arguments["accelerator"] == "cpu":
        trainer = instantiate(node, logger=False, _convert_="all")
        assert trainer.num_devices == arguments["devices"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("csv", ["MetricsFile"]),
        ("tensorboard", ["TensorBoardLogger"]),
        ("default", ["MetricsFile", "TensorBoardLogger"]),
        ("wandb", ["MetricsFile", "BoundedWandbLogger"]),
        ("none", []),
    ],
)
def test_logger(name, kinds, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = [instantiate(node) for node in build("logger", name, tmp_path).values()]
    assert [type(logger).__name__ for logger in loggers] == kinds
    assert len(names("logger")) == 5


@pytest.mark.parametrize("name", names("callbacks"))
def test_callbacks(name, tmp_path):
    nodes = build("callbacks", name, tmp_path)
    callbacks = [instantiate(node, _convert_="all") for node in nodes.values()]
    assert all(isinstance(callback, L.Callback) for callback in callbacks)
    if name not in ("none", "default") and len(nodes) == 1:
        assert list(nodes) == [name]  # a file is named for its one callback


def test_where_the_default_loggers_write(tmp_path, fit):
    nodes = build("logger", "default", tmp_path / "run")
    fit(callbacks=[], logger=[instantiate(node) for node in nodes.values()])
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_checkpoints_and_resume(tmp_path, fit, kit):
    """Newest and best are kept; a resumed run ends where an uninterrupted one does."""

    def nodes(folder):
        node = build("callbacks", "checkpoints", folder)["checkpoints"]
        return [instantiate(node, best_by="val/loss", best_mode="min", keep=1)]

    def csv(folder):
        return [instantiate(node) for node in build("logger", "csv", folder).values()]

    class NoDropout(kit.Task):
        def __init__(self):
            torch.manual_seed(1)
            super().__init__()
            self.dropout.p = 0.0

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.5 / (self.current_epoch + 1), batch_size=7)

    whole, _ = fit(task=NoDropout(), callbacks=nodes(tmp_path / "a"), max_epochs=3)
    fit(
        task=NoDropout(),
        callbacks=nodes(tmp_path / "b"),
        logger=csv(tmp_path / "b"),
        max_epochs=1,
    )
    folder = tmp_path / "b" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.safetensors",
        "epoch0000-step0000004.safetensors",
        "last.safetensors",
    ]
    resumed, _ = fit(
        task=NoDropout(),
        callbacks=nodes(tmp_path / "b"),
        logger=csv(tmp_path / "b"),
        max_epochs=3,
        resume=folder / "last.safetensors",
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.safetensors",
        "epoch0002-step0000012.safetensors",
        "last.safetensors",
    ]
    assert (folder / "last.safetensors").resolve().name == "epoch0002-step0000012.safetensors"
    # the score of the best, as of the newest epoch, went into it
    state = read_file(folder / "last.safetensors")["callbacks"]["CheckpointKeeper"]
    assert state == {"best_score": 1.5 / 3, "best_step": 12}
    assert whole.net.weight.equal(resumed.net.weight)
    lines = (tmp_path / "b" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [
        *("0", "1", "2", "3", "3"),  # four steps and a validation
        *("4", "5", "6", "7", "7"),
        *("8", "9", "10", "11", "11"),
    ]
