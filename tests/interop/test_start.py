"""A new run's start from converted and foreign files, of the same grid and of others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir

from beit.checkpoints.models import initialise
from beit.interop.checks import networks
from beit.models.heads import ClassificationHead
from beit.models.position import resize_relative_table

ROOT = Path(__file__).parents[2]
TABLE = "relative_position_bias_table"


def finetuning_task(kit, size, classes=5, positions="per_block"):
    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, _ = networks(kit.make(positions=positions, size=size))
            self.head = ClassificationHead(22, classes)

    return Task()


@pytest.mark.parametrize("layout", ["unilm", "huggingface", "ours"])
def test_a_run_starts_from_pretrained_files_of_others(layout, tmp_path, kit):
    weights = kit.make("mim", "shared")
    task = finetuning_task(kit, 40)
    path = kit.save(weights, layout, tmp_path)
    # as within a training run, where no second config can be composed
    with initialize_config_dir(config_dir=str(ROOT / "configs"), version_base="1.3"):
        report = initialise(task, path)
    expected = resize_relative_table(weights.backbone[f"rel_pos_bias.{TABLE}"], (3, 3), (5, 5))
    for block in task.backbone.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, expected)
    key = "blocks.2.mlp.fc1.weight"
    assert torch.equal(task.backbone.state_dict()[key], weights.backbone[key])
    assert len(report.resized) == 3
    assert report.copied
    assert "head.lm_head.weight" in report.unexpected
    assert {"head.head.weight", "head.fc_norm.weight"} <= set(report.missing)


@pytest.mark.parametrize("classes", [5, 4])
def test_a_run_starts_from_finetuned_files_of_others(classes, tmp_path, kit):
    weights, task = kit.make(), finetuning_task(kit, 24, classes)
    report = initialise(task, kit.save(weights, "timm", tmp_path))
    assert torch.equal(task.head.fc_norm.weight, weights.head["fc_norm.weight"])
    carried = classes == 5  # a head of other classes begins anew
    assert ("head.head.weight" in report.loaded) == carried
    assert ("head.head.weight" in report.missing) != carried


def test_the_report_of_a_start_names_what_was_assumed(tmp_path, kit, caplog):
    path = tmp_path / "bare.pth"
    torch.save({"model": kit.make().released()}, path)
    with caplog.at_level("INFO", logger="beit"):
        initialise(finetuning_task(kit, 24), path)
    assert "normalize=imagenet" in caplog.text


def places(source, target):
    """Where the source's offsets lie: 1, 1 + q, ... with q in [1.01, 1.5] to reach the target's."""
    ratios = np.linspace(1.01, 1.5, 100_000)
    sums = sum(ratios**i for i in range(source - 1))
    ratio = ratios[np.abs(sums - (target - 1)).argmin()]
    outward = np.cumsum(ratio ** np.arange(source - 1))
    return np.concatenate([-outward[::-1], [0.0], outward])


def resized_by_scipy(table, source, target):
    """The released code's resizing, on each axis by itself, with SciPy's spline."""
    spline = pytest.importorskip("scipy.interpolate").RectBivariateSpline
    (h, w), (new_h, new_w) = source, target
    surfaces = table[:-3].double().numpy().reshape(2 * h - 1, 2 * w - 1, -1)
    ys, xs = places(h, new_h), places(w, new_w)
    at = np.arange(1 - new_h, new_h), np.arange(1 - new_w, new_w)
    heads = [spline(ys, xs, surfaces[..., i])(*at) for i in range(table.shape[1])]
    return torch.cat([torch.tensor(np.stack(heads, axis=-1)).flatten(0, 1).float(), table[-3:]])


@pytest.mark.parametrize("layout", ["unilm", "ours"])
@pytest.mark.parametrize(("size", "grid"), [((40, 24), (5, 3)), ((48, 72), (6, 9))])
def test_a_run_starts_from_another_grid_that_is_not_square(size, grid, layout, tmp_path, kit):
    """3x5 patches to 6x9, and to 5x3, which has as many positions in another order."""
    weights = kit.make("mim", "shared", size=(24, 40))
    task = finetuning_task(kit, size)
    report = initialise(task, kit.save(weights, layout, tmp_path))
    table = weights.backbone[f"rel_pos_bias.{TABLE}"]
    expected = resized_by_scipy(table, (3, 5), grid)
    for block in task.backbone.blocks:
        found = block.attn.relative_position_bias_table
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-4)
    assert [len(shape) for _, *shape in report.resized] == [2] * 3


def test_positions_of_another_grid_that_is_not_square(tmp_path, kit):
    weights, task = (
        kit.make("mim", "absolute", size=(24, 40)),
        finetuning_task(kit, (40, 24), positions="absolute"),
    )
    initialise(task, kit.save(weights, "ours", tmp_path))
    stored = weights.backbone["pos_embed"]
    patches = stored[0, 1:].T.reshape(1, 22, 3, 5)
    expected = torch.nn.functional.interpolate(patches, (5, 3), mode="bicubic")[0].flatten(1).T
    assert torch.equal(task.backbone.pos_embed[0, 0], stored[0, 0])
    torch.testing.assert_close(task.backbone.pos_embed[0, 1:].detach(), expected)


@pytest.mark.parametrize("classes", [5, 4])
@pytest.mark.parametrize("layout", ["unilm", "huggingface", "ours"])
def test_a_run_starts_from_a_segmentation_model(layout, classes, tmp_path, kit):
    """Pyramid and heads with it, but for the last layers where the classes are others."""
    weights = kit.make("segmentation")
    changed = {k: v[:classes] if "conv_seg" in k else v for k, v in weights.head.items()}
    backbone, head = networks(weights.changed(head=changed))
    task = torch.nn.Module()
    task.backbone, task.pyramid, task.head = backbone, head["pyramid"], head["head"]
    task.auxiliary = head["auxiliary"]
    report = initialise(task, kit.save(weights, layout, tmp_path))
    state = task.state_dict()
    other = [k for k in weights.head if "conv_seg" in k and classes != 5]
    assert report.missing == other
    for key, value in weights.head.items():
        assert torch.equal(state[key], value) == (key not in other), key
