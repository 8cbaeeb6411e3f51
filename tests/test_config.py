"""The checks across fields, and the arithmetic of the global batch."""

from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf

from beit import checks, config
from beit.errors import UserError
from beit.schema import TrainConfig


@pytest.mark.parametrize(
    ("global_size", "per_device", "devices", "expected"),
    [(2048, 128, 16, 1), (2048, 128, 8, 2), (2048, 64, 1, 32), (7, 7, 1, 1)],
)
def test_accumulation_makes_up_the_global_batch(
    global_size: int, per_device: int, devices: int, expected: int
) -> None:
    found = config.accumulation(global_size=global_size, per_device=per_device, devices=devices)
    assert found == expected
    assert found * per_device * devices == global_size


@pytest.mark.parametrize(
    ("global_size", "per_device", "devices", "words"),
    [
        (2048, 96, 8, ["2048", "96", "8", "batch.per_device=64"]),
        (100, 10, 3, ["100", "3", "batch.global_size"]),
        (64, 128, 2, ["batch.per_device=32"]),
        (0, 1, 1, ["at least 1"]),
    ],
)
def test_an_impossible_batch_is_refused_with_its_numbers(
    global_size: int, per_device: int, devices: int, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        config.accumulation(global_size=global_size, per_device=per_device, devices=devices)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.open",
        "beitx.y",
        "torchx.z",
        "beit.cli.sys.getrecursionlimit",  # reached through a module of ours
        "beit.run_folder.subprocess.Popen",
        "torch.hub.get_dir",  # a function of another package
        "lightning.pytorch",  # a module
    ],
)
def test_a_config_cannot_name_any_function_it_likes(target: str) -> None:
    node = OmegaConf.create({"a": [{"b": {"_target_": target, "_args_": ["true"]}}]})
    with pytest.raises(UserError, match="not allowed"):
        config.instantiate(node)


def test_what_is_resolved_late_is_checked_too() -> None:
    inner = "${oc.create:{_target_:pathlib.Path,_args_:[x]}}"
    for text in (inner, "\\" + inner):  # escaped, it is left to Hydra
        node = {"_target_": "torch.nn.Sequential", "_args_": [text]}
        for given in (node, OmegaConf.create(node)):
            with pytest.raises(UserError, match=r"not allowed|may not hold"):
                config.instantiate(given)


def test_a_wrong_argument_names_the_class() -> None:
    node = {"_target_": "beit.models.heads.MIMHead", "width": 22, "vocab": 13}
    with pytest.raises(UserError, match=r"MIMHead.*vocab"):
        config.instantiate(OmegaConf.create(node))


DEMO = ["task=classification", "data=digits", "model=micro", "name=x", "trainer.max_epochs=1"]
SIZES = ["batch.global_size=8", "batch.per_device=8"]


def test_what_has_no_value_is_named() -> None:
    expected = r"^batch\.global_size and batch\.per_device have no value"
    with pytest.raises(UserError, match=expected):
        config.check(config.compose(DEMO))
    with pytest.raises(UserError, match=r"^batch\.per_device has no value"):
        config.check(config.compose([*DEMO, SIZES[0]]))


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_epochs and trainer\.max_steps"):
        config.check(config.compose([*DEMO, *SIZES, "trainer.max_epochs=-1"]))


@pytest.mark.parametrize(
    ("task", "word", "home"),
    [
        ("classification", "labelled_images=3", "segmentation"),
        ("classification", "views_per_image=3", "mim"),
        ("classification", "token_cache=folder", "mim"),
        ("mim tokenizer=dvae_tiny", "labels_per_class=3", "classification"),
    ],
)
def test_a_word_of_another_task_is_refused(task: str, word: str, home: str) -> None:
    words = [*DEMO[1:], *SIZES, *f"task={task}".split(), word]
    name, _, _ = task.partition(" ")
    with pytest.raises(UserError, match=rf"{word} is of task={home}.*alone, and this is {name}"):
        config.check(config.compose(words))


def test_a_task_of_the_users_own_may_read_any_word() -> None:
    words = [*DEMO, *SIZES, "labelled_images=3"]
    for given, refused in (([], True), (["datamodule.train.per_class=${labelled_images}"], False)):
        content = OmegaConf.to_container(config.compose([*words, *given]), resolve=False)
        with pytest.raises(UserError) if refused else nullcontext():
            checks.check_read(content, TrainConfig())


def test_resume_and_init_from_exclude_each_other() -> None:
    cfg = config.compose([*DEMO, *SIZES, "resume=b.safetensors", "init_from=a.safetensors"])
    with pytest.raises(UserError, match="exclude each other"):
        config.check(cfg)
    cfg.resume = "auto"  # one command line for the first start and for each that follows
    config.check(cfg)


def test_a_size_that_memory_does_not_allow_is_refused_before_anything_is_built() -> None:
    words = [*DEMO, *SIZES, "model.patch_size=1"]
    config.check(config.compose([*words, "model.image_size=32"]))
    with pytest.raises(UserError, match=r"^model.image_size=\[?9999.*99,980,002 tokens take"):
        config.check(config.compose([*words, "model.image_size=9999"]))


def test_the_resolved_config_is_plain_data() -> None:
    settled = config.plain(config.compose([*DEMO, *SIZES]))
    assert settled["task"]["backbone"]["width"] == settled["model"]["width"] == 192
    assert settled["loader"]["global_batch_size"] == 8


def test_a_seed_gives_the_same_backbone_whatever_head_it_has() -> None:
    def first_weights(*words: str) -> torch.Tensor:
        cfg = config.compose(["model=micro", "data=digits", "model.init_cut=2.0", *words])
        torch.manual_seed(5)
        return config.instantiate(cfg.task).backbone.patch_embed.proj.weight

    expected = first_weights("task=classification")
    for words in (["pooling=cls"], ["data.num_classes=3"], ["model.drop_path_rate=0"]):
        assert torch.equal(first_weights("task=classification", *words), expected)
    assert torch.equal(first_weights("task=linear_probe"), expected)


_SIZES = ["batch.global_size=8", "batch.per_device=8", "trainer.max_epochs=1"]


@pytest.mark.parametrize(
    ("choice", "key", "value"),
    [("hub", "repo", "owner/name"), ("torchvision", "name", "Flowers102"), ("list", "classes", [])],
)
def test_a_data_config_serves_as_labelled_images_too(choice: str, key: str, value: object) -> None:
    words = ["data=unlabelled", *_SIZES, f"data@labelled={choice}", f"labelled.{key}={value}"]
    cfg = config.compose(
        ["task=mim", "model=micro", "tokenizer=trained", "tokenizer.path=x", *words]
    )
    config.check(cfg)
    assert cfg.labelled.train[key] == cfg.labelled.val[key] == value
