"""Probes of frozen layers against Linears of torch trained by hand."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from beit.data.batches import LabelledBatch
from beit.errors import UserError
from beit.models.probes import LayerProbes
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.tasks.linear_probe import LinearProbing

WIDTH, DEPTH, CLASSES = 22, 4, 5


def make_task(layers="all", **changes):
    torch.manual_seed(0)
    backbone = VisionTransformer(
        image_size=(24, 40), patch_size=8, width=WIDTH, depth=DEPTH, num_heads=2,
        absolute_position=False, relative_position="shared", layer_scale=0.1,
        drop_path_rate=0.5, drop_rate=0.5, mask_token=False, final_norm=True, init_cut=2.0,
    )  # fmt: skip
    head = LayerProbes(WIDTH, CLASSES, depth=DEPTH, layers=layers)
    optim = AdamWRecipe(lr=1.0, min_lr=0.0, weight_decay=0.0)
    return LinearProbing(backbone, head, optim=optim, num_classes=CLASSES, **changes)


def batch(size, seed=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 24, 40, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return LabelledBatch(images, labels, torch.arange(size), torch.full((size,), -1))


def features(backbone, images, layer):
    """By a hook on the block, in evaluation mode."""
    kept = []
    hook = backbone.blocks[layer - 1].register_forward_hook(lambda *_: kept.append(_[2]))
    with torch.no_grad():
        backbone.eval()(images)
    hook.remove()
    return torch.cat([kept[0][:, 0], kept[0][:, 1:].mean(dim=1)], dim=1)


class ByGradientDescent(LinearProbing):
    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=1.0)


def fit(task, folder, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    loaders = [DataLoader([batch(size)], batch_size=None) for size in (7, 11)]
    trainer.fit(task, *loaders)
    return trainer


def test_each_layers_probe_steps_by_its_own_cross_entropy(tmp_path):
    task = make_task([2, 4])
    task.__class__ = ByGradientDescent
    before = copy.deepcopy(task)
    trainer = fit(task, tmp_path)
    seen, others = batch(7), batch(11)
    shares = []
    for layer, probe, old in zip((2, 4), task.head.probes, before.head.probes, strict=True):
        x = features(before.backbone, seen.images, layer)
        F.cross_entropy(old(x), seen.targets).backward()
        torch.testing.assert_close(probe.weight.detach(), old.weight.detach() - old.weight.grad)
        torch.testing.assert_close(probe.bias.detach(), old.bias.detach() - old.bias.grad)
        y = features(before.backbone, others.images, layer)
        shares.append(float((probe(y).argmax(dim=1) == others.targets).float().mean()))
        logged = trainer.callback_metrics[f"val/acc1_layer_{layer:02d}"]
        assert float(logged) == pytest.approx(shares[-1])
    assert float(trainer.callback_metrics["val/acc1"]) == pytest.approx(max(shares))
    best = shares.index(max(shares))
    assert float(trainer.callback_metrics["val/best_layer"]) == (2, 4)[best]
    expected = task.head.probes[best](features(before.backbone, others.images, (2, 4)[best]))
    torch.testing.assert_close(task.eval()(others.images), expected)


def test_the_backbone_is_frozen_and_drops_nothing(tmp_path):
    task = make_task()
    before = {key: value.clone() for key, value in task.backbone.state_dict().items()}
    task.__class__ = ByGradientDescent
    fit(task, tmp_path)
    assert all(torch.equal(before[key], v) for key, v in task.backbone.state_dict().items())
    assert not task.train().backbone.training
    images = batch(7).images
    assert torch.equal(task(images), task(images))  # with half of everything dropped otherwise


def test_probes_start_as_the_released_ones():
    head = LayerProbes(768, 1000, depth=2)
    assert head.layers == (1, 2)
    for probe in head.probes:
        assert probe.weight.shape == (1000, 2 * 768)
        assert float(probe.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
        assert float(probe.weight.detach().abs().max()) > 0.03  # nothing is cut off
        assert not probe.bias.any()


@pytest.mark.parametrize("layers", [[0], [5], [], "last", [1, 9]])
def test_a_layer_that_there_is_not_is_refused(layers):
    with pytest.raises(UserError, match=r"this network has layers 1 to 4, counted from 1"):
        LayerProbes(WIDTH, CLASSES, depth=DEPTH, layers=layers)


def test_a_probe_is_only_of_layers_in_the_list():
    assert isinstance(make_task([3]).head.probes, nn.ModuleList)
    assert make_task([3, 1, 3]).head.layers == (1, 3)
