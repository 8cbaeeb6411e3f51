"""What a config may name, told from the name, and what is found under it."""

import inspect
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import beit
from beit import building
from beit.config import config_dir
from beit.errors import UserError
from beit.security import targets

EVIL = """
open({marker!r}, 'w').close()
import os
from os import system
class Evil: pass
class Good:
    a = 1
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that makes a file when it is imported. Returns that file."""
    marker = tmp_path / "marker"
    (tmp_path / "evilpackage").mkdir()
    text = EVIL.format(marker=str(marker))
    (tmp_path / "evilpackage" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    sys.modules.pop("evilpackage", None)


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "builtins.open", "torch.load", "torch.hub.load", "torch.nn.Module"),
        *("torch.distributed.run.main", "torch.utils.cpp_extension.load", "torch.jit.load"),
        *("torchvision.datasets.utils.download_url", "torchvision.io.write_file"),
        *("lightning.pytorch.callbacks.LambdaCallback", "lightning.Fabric", "lightning.pytorch"),
        *("timm.create_model", "timm.models.load_checkpoint", "torchmetrics.utilities.plot"),
        *("beit.cli.main", "beit.runner.fit", "beit.config.compose", "beit.run_folder.make"),
        *("beit.tokenizers.pickles.LegacyUnpickler", "beit.tokenizers.pickles.read_tensors"),
        *("beit.cli.os.system", "beit.data.modules.os.system", "beit.data.sources.np.load"),
        *("beit.data.views.TwoViewTransform.__call__", "beit.models.vit.torch.load"),
        *("beit.models.vit.VisionTransformer.load_state_dict", "beit.models.__builtins__.eval"),
        *(
            "beit.errors.UserError",
            "beit.data.sources.few_labels.__globals__",
            "beit",
            "",
            ".",
            "x",
        ),
        *(
            "beit..x",
            "beit.models.vit.",
            " torch.nn.Linear",
            "torch.nn.Linear\n",
            "torch.nn.linear",
        ),
        *("beit.security.targets.trusting", "beit.checkpoints.file.write_file", 5, None, ["a"]),
        *("beit.models.vit.patch_grid", "beit.data.images.UnreadableImage", "${x}"),
    ],
)
def test_what_a_config_may_not_name(target: object) -> None:
    with pytest.raises(UserError):
        targets.resolve(target)


@pytest.mark.parametrize(
    "target",
    [
        *("beit.models.vit.VisionTransformer", "beit.data.sources.few_labels", "lightning.Trainer"),
        *("beit.tokenizers.dvae.load_dvae", "beit.job.settings.JobSettings", "torch.nn.Linear"),
        *("beit.data.sources.ClassFolder", "datetime.timedelta", "timm.data.Mixup"),
    ],
)
def test_what_it_may_name(target: str) -> None:
    module, _, name = target.rpartition(".")
    assert targets.resolve(target) is getattr(import_module(module), name)


def test_every_listed_class_is_one() -> None:
    for target in sorted(targets.CLASSES):
        assert inspect.isclass(targets.resolve(target)), target
    for target in targets.FUNCTIONS:
        assert inspect.isfunction(targets.resolve(target)), target


@pytest.mark.parametrize(
    "target",
    [
        *("beit.cli.main", "beit.runner.fit", "beit.tokenizers.pickles.read_tensors", "beit.face"),
        *("beit.security.targets.trusting", "beit.checkpoints.file.write_file", "torch.load"),
        *("beit.data._x", "beit.data.sources.__dict__", "beit.job.ranks.RankWatch"),
    ],
)
def test_the_name_alone_is_enough_to_refuse(target: str) -> None:
    assert not targets.is_allowed(target)


def test_a_listed_name_that_is_no_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "CLASSES", targets.CLASSES | {"os.getpid"})
    with pytest.raises(UserError, match="not allowed"):
        targets.resolve("os.getpid")


def test_every_shipped_config_names_what_is_allowed() -> None:
    found = 0
    for path in config_dir().rglob("*.yaml"):
        content = OmegaConf.to_container(OmegaConf.load(path))
        targets.check_nodes(content, lambda place: f"{path}: {place}")  # noqa: B023
        found += len(list(targets.nodes(content)))
    assert found > 30


def test_of_our_own_rooms_only_classes_are_reached() -> None:
    """Every name in every module of ours: modules, functions and what is imported stay closed."""
    for module in pkgutil.walk_packages(beit.__path__, "beit."):
        for name, value in vars(import_module(module.name)).items():
            target = f"{module.name}.{name}"
            try:
                assert targets.resolve(target) is value
            except UserError:
                continue
            if target not in targets.FUNCTIONS:
                assert inspect.isclass(value), target
                assert f"{value.__module__}.".startswith(targets.ROOMS), target
                assert not value.__module__.startswith("beit.tokenizers.pickles"), target


def test_nothing_is_imported_before_all_is_checked(package: Path) -> None:
    node = {
        "_target_": "torch.nn.Sequential",
        "_args_": [{"_target_": "torch.nn.Identity"}, [{"_target_": "evilpackage.Evil"}]],
    }
    for target in ("evilpackage.Evil", "evilpackage.os.system"):
        node["_args_"][1][0]["_target_"] = target
        with pytest.raises(UserError, match=r"_args_.*1.*not allowed"):
            building.instantiate(node)
    assert not package.exists()
    assert "evilpackage" not in sys.modules


def test_the_user_may_vouch_for_a_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("trust=evilpackage.", "trust=[other,evilpackage]", "trust=evilpackage.Good"):
        with targets.trusting(["a=1", word]) as words:
            assert words == ["a=1"]
            assert building.instantiate({"_target_": "evilpackage.Good"}).a == 1
            with pytest.raises(UserError):  # leads out of the package
                targets.resolve("evilpackage.os.system")
            for name in ("os", "system"):
                with pytest.raises(UserError, match="not allowed"):
                    targets.resolve(f"evilpackage.{name}")
            with pytest.raises(UserError, match="not allowed"):
                targets.resolve("evilpackages.Good")
        with pytest.raises(UserError, match="not allowed"):
            targets.resolve("evilpackage.Good")
    assert package.exists()
    monkeypatch.setenv(targets.TRUST, "evilpackage.")
    assert targets.resolve("evilpackage.Good").a == 1
    with pytest.raises(UserError, match="expected a package"), targets.trusting(["trust=a b"]):
        pass


def test_trust_is_no_key_of_a_config(tmp_path: Path) -> None:
    from beit import config

    (tmp_path / "experiment").mkdir()
    for text in ("trust: [evilpackage.]", "hydra: {job: {env_set: {BEIT_TRUST: evilpackage.}}}"):
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        words = ["task=classification", "data=digits", "model=micro", "experiment=mine"]
        with pytest.raises(Exception, match=r"trust|env_set"):
            config.check(config.compose([*words, f"hydra.searchpath=[{tmp_path}]"]))


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.nn.Identity", "_x_": 1},
        {"_target_": "torch.nn.Identity", 5: 1},
        {"_target_": "lightning.pytorch.loggers.WandbLogger", "settings": {"base_url": "x"}},
        {"_target_": "torch.nn.Linear", "in_features": "${oc.env:HOME}", "out_features": 2},
    ],
)
def test_what_a_node_may_not_hold(node: dict[object, object]) -> None:
    with pytest.raises(UserError):
        building.instantiate(node)


def test_nothing_of_plain_data_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a stranger's, and what it refers to would be in the message."""
    monkeypatch.setenv("SOMETHING", "marker")
    node = {"_target_": "torch.nn.Linear", "in_features": "${oc.env:SOMETHING}", "out_features": 2}
    with pytest.raises(UserError, match="may not hold an interpolation") as caught:
        building.instantiate(node)
    assert "marker" not in str(caught.value)
