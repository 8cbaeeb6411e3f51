"""A probe that looks on: the training comes out the same, to the last bit, with and without it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import beit
from beit.callbacks.metrics_file import read_metrics
from beit.callbacks.online_probe import OnlineProbe
from beit.checkpoints.file import read_file
from beit.errors import UserError

Words = dict[str, list[str]]
PROBE = [
    "callbacks=[mim,online_probe]",
    "callbacks.online_probe.train_images=50",
    "callbacks.online_probe.val_images=30",
    "callbacks.online_probe.every_n_epochs=1",
    "callbacks.online_probe.probes.knn.k=[3]",
]
METRICS = ["knn_acc", "knn_layer", "linear_acc", "linear_layer"]


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("epoch*.safetensors"))


def probed(run: Path) -> list[tuple[str, ...]]:
    rows = [row for row in read_metrics(run / "metrics.csv") if row.get("probe/knn_acc")]
    return [(row["step"], *(row[f"probe/{name}"] for name in METRICS)) for row in rows]


def assert_same(one: object, other: object, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{place}.{index}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


@pytest.fixture(scope="module")
def words(runs: Path, tiny: Words) -> list[str]:
    """With randomness that a disturbed generator would show in."""
    path = f"tokenizer.path={runs}/tokenizer/checkpoints/last.safetensors"
    random = ["model.drop_path_rate=0.4", "model.drop_rate=0.1", "trainer.limit_train_batches=2"]
    return [*tiny["mim"], path, *random, "callbacks.checkpoints.keep=-1"]


@pytest.fixture(scope="module")
def bare(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A run without a probe, and the state of the generator after it."""
    folder = tmp_path_factory.mktemp("bare")
    beit.train(*words, f"paths.runs_dir={folder}", "name=bare")
    return folder / "bare", torch.get_rng_state()


def assert_same_run(run: Path, other: Path) -> None:
    for one, two in zip(checkpoints(run)[::-1], checkpoints(other)[::-1]):
        assert one.name == two.name
        content, expected = read_file(one), read_file(two)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch_metrics"):
            assert_same(content[key], expected[key], key)


def test_nothing_of_the_training_is_another(
    bare: tuple[Path, torch.Tensor], words: list[str], tmp_path: Path
) -> None:
    beit.train(*words, *PROBE, f"paths.runs_dir={tmp_path}", "name=probed")
    run = tmp_path / "probed"
    assert torch.equal(torch.get_rng_state(), bare[1])
    assert len(checkpoints(run)) == 2
    assert_same_run(run, bare[0])
    first, second = probed(run)
    assert (first[0], second[0]) == ("1", "3")
    assert all(0 <= float(first[i]) <= 1 and float(first[i + 1]) in (1, 2, 3) for i in (1, 3))
    told = (run / "train.log").read_text()
    assert "looks at the labels of 50 training and 30 validation images" in told
    assert "the training does not" in told
    # of the first epoch on: a run without the probe goes on with it, and comes to the same
    start = checkpoints(bare[0])[0]
    resumed = [*words, *PROBE, f"resume={start}", f"paths.runs_dir={tmp_path}", "name=resumed"]
    beit.train(*resumed)
    assert_same_run(tmp_path / "resumed", bare[0])
    assert probed(tmp_path / "resumed")[-1] == second


def test_other_images_may_have_the_labels(words: list[str], tmp_path: Path) -> None:
    """Pretraining on images without labels; refused without others, and nothing is left behind."""
    for number in range(64):
        pixels = np.random.default_rng(number).integers(0, 255, (36, 36, 3), dtype=np.uint8)
        folder = tmp_path / "photos" / ("ape" if number % 2 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    unlabelled = [*words, "data=unlabelled", f"paths.data_dir={tmp_path / 'photos'}"]
    unlabelled += ["trainer.max_epochs=1", f"paths.runs_dir={tmp_path / 'runs'}", "name=probed"]
    with pytest.raises(UserError, match=r"the run's images have no labels .* data@labelled=folder"):
        beit.train(*unlabelled, *PROBE)
    with pytest.raises(UserError, match="k 3000 is larger than the"):
        beit.train(*unlabelled, *PROBE, "data@labelled=digits", f"{PROBE[-1][:-3]}[3000]")
    assert not (tmp_path / "runs").exists()
    roots = [f"labelled.{part}.root={tmp_path / 'photos'}" for part in ("train", "val")]
    beit.train(*unlabelled, *PROBE, "data@labelled=folder", *roots)
    assert len(probed(tmp_path / "runs" / "probed")) == 1


@pytest.mark.slow
def test_two_processes(words: list[str], bare: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """The first rank probes, the other waits."""
    command = [sys.executable, "-m", "beit.cli", "train", *words, *PROBE, "trainer=ddp_cpu"]
    command += ["batch.per_device=16", "model.drop_rate=0.0"]
    command += [f"paths.runs_dir={tmp_path}", "name=two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(probed(tmp_path / "two")) == 2
    without = [word for word in command if word not in PROBE]
    without[-1] = "name=without"
    done = subprocess.run(without, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "two", tmp_path / "without")


@pytest.mark.parametrize(
    "wrong",
    [{"train_images": 0}, {"val_images": 0}, {"every_n_epochs": 0}, {"probes": {"a": None}}],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    options = {
        "transform": None, "probes": {"knn": object()}, "train_images": 9, "val_images": 9,
        "every_n_epochs": 1, "batch_size": 9, "seed": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match=next(iter(wrong))):
        OnlineProbe(**{**options, **wrong})
