"""What several test files share: a run of each stage, small enough to make once a session."""

import logging
from pathlib import Path

import pytest

import beit

TINY = [
    "data=digits",
    "logger=csv",
    "loader.num_workers=0",
    "loader.check_images=3",
    "batch.global_size=32",
    "batch.per_device=32",
    "trainer.limit_train_batches=3",
    "trainer.max_epochs=2",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
]
TINY_VIT = [
    "model=micro",
    "model.width=22",
    "model.num_heads=2",
    "model.depth=3",
    "model.drop_path_rate=0.0",
    "optim.warmup_epochs=0",
]
TINY_TOKENIZER = [
    "task=tokenizer",
    "tokenizer=dvae_tiny",
    "tokenizer.hidden_dim=16",
    "optim.warmup_steps=2",
]
TINY_MIM = [
    "task=mim",
    "tokenizer=trained",
    "masking.min_block_patches=4",
    "views.flip=0.0",
    *TINY_VIT,
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write what was measured into docs/")


@pytest.fixture(autouse=True)
def log_as_at_first() -> None:
    """What an earlier test made of the program's log is not this test's business."""
    logger = logging.getLogger("beit")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny() -> dict[str, list[str]]:
    """Words of the command line that make a run of each task tiny."""
    return {
        "mim": [*TINY_MIM, *TINY],
        "classification": ["task=classification", *TINY_VIT, *TINY],
        "tokenizer": [*TINY_TOKENIZER, *TINY],
    }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, list[str]]) -> Path:
    """A folder with the runs `tokenizer`, `pretrain` and `finetune`, of a few steps each."""
    folder = tmp_path_factory.mktemp("runs")
    where = f"paths.runs_dir={folder}"
    beit.train(*tiny["tokenizer"], where, "name=tokenizer")
    path = f"tokenizer.path={folder}/tokenizer/checkpoints/last.safetensors"
    beit.train(*tiny["mim"], path, where, "name=pretrain")
    start = f"init_from={folder}/pretrain/checkpoints/last.safetensors"
    beit.train(*tiny["classification"], start, where, "name=finetune")
    return folder
