"""Pretraining, fine-tuning on one labelled set, fine-tuning on another: a chain by files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import beit
from beit import config, runner
from beit.checkpoints.models import read_checkpoint
from beit.interop.convert import any_checkpoint

Words = dict[str, list[str]]
TABLE = "relative_position_bias_table"


@pytest.fixture(scope="module")
def chain(runs: Path, tiny: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The middle one: three classes of noise, from the pretrained network."""
    folder = tmp_path_factory.mktemp("chain")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b", "c"):
            place = folder / "photos" / part / name
            place.mkdir(parents=True)
            for number in range(40 if part == "train" else 4):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    words = [word for word in tiny["classification"] if word != "data=digits"]
    start = f"init_from={runs / 'pretrain' / 'checkpoints' / 'last.safetensors'}"
    where = (f"paths.runs_dir={folder}", f"paths.data_dir={folder / 'photos'}", "name=middle")
    beit.train(*words, "data=folder", *where, start, "optim.lr=1e-2")
    return folder / "middle" / "checkpoints" / "last.safetensors"


def target(words: list[str], start: Path):
    cfg = config.compose([*words, f"init_from={start}", "name=x"])
    config.check(cfg)
    return runner.build(cfg, world_size=config.settle_devices(cfg))[0]


def test_the_head_is_fresh_and_all_else_is_carried_over(chain: Path, tiny: Words) -> None:
    task = target(tiny["classification"], chain)
    middle = read_checkpoint(chain)
    stored = middle.tensors(list(middle.shapes))
    ours = task.state_dict()
    fresh = {"head.head.weight", "head.head.bias"}
    assert set(stored) == set(ours)
    for key, value in ours.items():
        assert (key in fresh) == (value.shape != stored[key].shape)
        assert key in fresh or torch.equal(value, stored[key]), key
    # the norm before the head was learnt, and goes along, as in the released code
    assert not torch.equal(stored["head.fc_norm.bias"], torch.zeros(22))
    assert len(ours["head.head.weight"]) == 10
    assert float(ours["head.head.weight"].abs().max()) < 1e-4  # 0.001 of a deviation of 0.02


def test_a_larger_grid_keeps_the_network_but_for_its_tables(chain: Path, tiny: Words) -> None:
    words = [*tiny["classification"], "model.image_size=56"]  # 8x8 patches become 14x14
    task, ours = target(words, chain), {}
    ours = task.state_dict()
    stored = read_checkpoint(chain)
    for key, value in ours.items():
        old = stored.tensors([key])[key]
        if not key.endswith(TABLE):
            assert "head.head." in key or torch.equal(value, old), key
            continue
        assert (len(old), len(value)) == (15 * 15 + 3, 27 * 27 + 3)
        assert torch.equal(value[-3:], old[-3:])
        before, after = old[:-3].view(15, 15, 2), value[:-3].view(27, 27, 2)
        # geometric: the nearest neighbours stay one patch away, and the farthest the farthest
        assert torch.allclose(
            after[12:15, 12:15], before[6:9, 6:9], atol=2e-3 * float(old.abs().max())
        )
        assert torch.allclose(after[::26, ::26], before[::14, ::14], atol=1e-5)


def test_the_report_names_the_head(chain: Path, tiny: Words, caplog: pytest.LogCaptureFixture):
    from beit.checkpoints.models import initialise

    cfg = config.compose([*tiny["classification"], "name=x"])
    task = config.instantiate(cfg.task)
    report = initialise(task, chain)
    assert set(report.missing) == {"head.head.weight", "head.head.bias"}
    assert set(report.unexpected) == {"head.head.weight", "head.head.bias"}
    assert any_checkpoint(chain).classes == ["a", "b", "c"]


def test_cls_pooling_takes_the_backbones_own_norm(runs: Path, tiny: Words) -> None:
    pretrained = runs / "pretrain" / "checkpoints" / "last.safetensors"
    task = target([*tiny["classification"], "pooling=cls"], pretrained)
    stored = read_checkpoint(pretrained).part("backbone")
    assert torch.equal(task.backbone.norm.weight, stored["norm.weight"])
    assert task.head.fc_norm is None
    images = torch.randn(3, 3, 32, 32)
    task.eval()
    torch.testing.assert_close(task(images), task.head.head(task.backbone(images)[:, 0]))
