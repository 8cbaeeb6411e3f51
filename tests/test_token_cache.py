"""A pretraining with the token cache is the pretraining without it, minus the tokenizer."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import beit
from beit import config, runner
from beit.data.pretraining import PretrainingData
from beit.errors import UserError
from beit.tokenizers.dvae import DiscreteVAE

Words = dict[str, list[str]]


@pytest.fixture(scope="module")
def words(runs: Path, tiny: Words) -> list[str]:
    """A pretraining of 4 epochs with 2 views an image."""
    path = f"tokenizer.path={runs}/tokenizer/checkpoints/last.safetensors"
    return [*tiny["mim"], path, "trainer.max_epochs=4", "views_per_image=2"]


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ("train/loss", "val/loss")
    return [(row["step"], row[key]) for row in rows for key in keys if row[key]]


@pytest.fixture(scope="module")
def plain(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    beit.train(*words, f"paths.runs_dir={folder}", "name=run")
    return folder / "run"


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: DiscreteVAE, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the tokenizer was asked")

    monkeypatch.setattr(DiscreteVAE, "encode", refuse)


def test_losses_are_the_same_with_a_cache(
    words: list[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    encode = DiscreteVAE.encode
    monkeypatch.setattr(
        DiscreteVAE, "encode", lambda self, x: asked.append(len(x)) or encode(self, x)
    )
    here = [*words, f"paths.runs_dir={tmp_path}", f"token_cache={tmp_path}/tokens"]
    beit.train(*here, "name=filling")
    assert losses(tmp_path / "filling") == losses(plain)
    first = sum(asked)
    cfg = config.compose([*here, "name=again"])
    data = config.instantiate(cfg.datamodule)
    assert isinstance(data, PretrainingData)
    caches = data.caches
    there = {role: len(cache) - cache.missing().size for role, cache in caches.items()}
    assert first == sum(there.values())  # no view was worked out twice
    assert there["val"] == 60  # the two batches that validation is limited to
    assert there["train"] < 4 * 96  # some came again, in batches of known and unknown ones
    asked.clear()
    beit.train(*here, "name=again")
    assert losses(tmp_path / "again") == losses(plain)
    assert asked == []
    shutil.rmtree(tmp_path / "tokens")
    found = beit.evaluate(tmp_path / "again" / "checkpoints" / "last.safetensors")
    assert f"{found['val/loss']:.3f}" == f"{float(losses(plain)[-1][1]):.3f}"
    assert not (tmp_path / "tokens").exists()  # an evaluation writes nothing


def test_tokenize_fills_the_cache_ahead(
    words: list[str],
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = [*words, f"paths.runs_dir={tmp_path}", f"token_cache={tmp_path}/tokens", "name=run"]
    counts = runner.tokenize(config.compose(here))
    assert counts == {"train": 2 * 1437, "val": 360, "unreadable": 0}
    assert runner.tokenize(config.compose(here)) == {"train": 0, "val": 0, "unreadable": 0}
    with monkeypatch.context() as patch:
        patch.setattr(DiscreteVAE, "encode", lambda self, x: pytest.fail("the tokenizer was asked"))
        beit.train(*here)
    assert losses(tmp_path / "run") == losses(plain)


def test_tokenize_goes_on_where_it_was_interrupted(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [*words, f"paths.runs_dir={tmp_path}", f"token_cache={tmp_path}/tokens", "name=run"]
    encode, calls = DiscreteVAE.encode, []

    def interrupted(self: DiscreteVAE, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(DiscreteVAE, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.tokenize(config.compose(here))
    monkeypatch.setattr(DiscreteVAE, "encode", encode)
    counts = runner.tokenize(config.compose(here))
    assert counts["train"] == 2 * 1437 - sum(calls[:4])


def test_ranks_share_the_work_whatever_their_pace(words: list[str], tmp_path: Path) -> None:
    here = [*words, f"paths.runs_dir={tmp_path}", f"token_cache={tmp_path}/tokens", "name=run"]
    data = config.instantiate(config.compose(here).datamodule)
    counts = [data.fill_caches(torch.device("cpu"), rank=rank, world_size=3) for rank in (2, 0, 1)]
    assert [count["train"] for count in counts] == [958, 958, 958]
    assert all(cache.missing().size == 0 for cache in data.caches.values())


def test_views_come_again_and_masks_do_not(words: list[str], tmp_path: Path) -> None:
    cfg = config.compose([*words, f"paths.runs_dir={tmp_path}", "name=run"])
    data = config.instantiate(cfg.datamodule).loaders.train_data
    view, again, other = (data[epoch, 5].tensors for epoch in (0, 2, 1))
    assert torch.equal(view[0], again[0])
    assert torch.equal(view[1], again[1])
    assert not torch.equal(view[0], other[0])
    assert not torch.equal(view[4], again[4])


@pytest.mark.parametrize(
    ("changed", "named"),
    [("seed=5", "seed was 0 and is 5"), ("views.min_scale=0.5", "drawn_by was")],
)
def test_another_runs_cache_is_refused_and_left_alone(
    words: list[str], tmp_path: Path, changed: str, named: str
) -> None:
    here = [*words, f"paths.runs_dir={tmp_path}", f"token_cache={tmp_path}/tokens"]
    for cache in config.instantiate(config.compose([*here, "name=x"]).datamodule).caches.values():
        cache.open()
    with pytest.raises(UserError, match=re.escape(named)):
        beit.train(*here, "name=other", changed)
    assert not (tmp_path / "other").exists()


def test_a_cache_needs_views_that_come_again(runs: Path, tiny: Words, tmp_path: Path) -> None:
    path = f"tokenizer.path={runs}/tokenizer/checkpoints/last.safetensors"
    here = [*tiny["mim"], path, f"paths.runs_dir={tmp_path}", f"token_cache={tmp_path}/tokens"]
    with pytest.raises(UserError, match=r"without views_per_image.*set views_per_image=K"):
        beit.train(*here, "name=run")
    with pytest.raises(UserError, match="token_cache=x is of task=mim alone"):
        beit.train(*tiny["tokenizer"], f"paths.runs_dir={tmp_path}", "token_cache=x", "name=run")


def test_stand_ins_are_not_kept(words: list[str], tmp_path: Path) -> None:
    """The row of an unreadable image stays empty: it may be mended."""
    from beit.data.images import UnreadableImage

    here = [*words, f"paths.runs_dir={tmp_path}", f"token_cache={tmp_path}/tokens", "name=run"]
    cfg = config.compose(here)
    data = config.instantiate(cfg.datamodule)
    source = data.loaders.train_data.source
    load = source.load

    class Broken:
        labels, classes = source.labels, source.classes

        def __len__(self) -> int:
            return len(source)

        def name(self, index: int) -> str:
            return source.name(index)

        def load(self, index: int) -> object:
            if index == 7:
                raise UnreadableImage("seven", "truncated")
            return load(index)

    data.loaders.train_data.source = Broken()
    counts = data.fill_caches(torch.device("cpu"), rank=0, world_size=1)
    assert counts == {"train": 2 * 1436, "val": 360, "unreadable": 2}
    assert np.array_equal(data.caches["train"].missing(), [7, 1437 + 7])
    sample = data.loaders.train_data[0, 7]
    assert sample.tensors[1] is not None  # its stand-in is tokenized each time
    assert int(sample.tensors[3]) == -1
