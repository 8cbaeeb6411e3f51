"""The loss of a global batch in uneven parts, what it reaches, and what the task predicts."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from beit.callbacks.randomness import KeyedRandomness
from beit.data.batches import SegmentationBatch
from beit.errors import UserError
from beit.evaluation import memory
from beit.evaluation.windows import SlidingWindow
from beit.models.pyramid import FeaturePyramid, PlainMaps
from beit.models.segmentation import FCNHead, LinearHead, UPerNetHead
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.tasks.segmentation import Segmentation

K, WIDTH, TAPS = 5, 22, [0, 1, 1, 2]


class PlainHead(nn.Module):
    """A 1x1 convolution on one map: without BatchNorm a batch may be cut anywhere."""

    def __init__(self, map_index):
        super().__init__()
        self.conv_seg = nn.Conv2d(WIDTH, K, 1)
        self.map_index = map_index

    def forward(self, maps):
        return self.conv_seg(maps[self.map_index])


class Tuned(Segmentation):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def make_task(
    *, plain=True, drop_path_rate=0.0, kind=Tuned, taps=TAPS, weight=0.4, class_weights=None
):
    torch.manual_seed(3)
    backbone = VisionTransformer(
        (24, 40), 8, width=WIDTH, depth=3, num_heads=2, absolute_position=False,
        relative_position="per_block", layer_scale=0.1, drop_path_rate=drop_path_rate,
        mask_token=False, final_norm=False, init_cut=2.0,
    )  # fmt: skip
    if plain:
        parts = [PlainMaps(WIDTH, taps=taps, patch_size=8), PlainHead(3)]
        auxiliary = [PlainHead(0), PlainHead(2)]
    else:
        parts = [
            FeaturePyramid(WIDTH, taps=taps, patch_size=8),
            UPerNetHead(WIDTH, K, channels=7, dropout=0.0),
        ]
        auxiliary = [FCNHead(WIDTH, K, channels=3, dropout=0.0)]
    return kind(
        backbone, *parts, auxiliary, num_classes=K, auxiliary_weight=weight,
        class_weights=class_weights,
        optim=AdamWRecipe(lr=1.0, min_lr=0.0, weight_decay=0.0),
        inference=SlidingWindow((24, 40), stride=(16, 26), windows_per_pass=2),
    )  # fmt: skip


def batches(sizes, *, ignored=0.3):
    generator = torch.Generator().manual_seed(5)
    for i, size in enumerate(sizes):
        images = torch.randn(size, 3, 24, 40, generator=generator)
        labels = torch.randint(K, (size, 24, 40), generator=generator)
        # the parts hold different shares of labelled pixels
        hidden = torch.rand(labels.shape, generator=generator) < ignored * (i + 1) / len(sizes)
        labels[hidden] = -1
        indices = torch.arange(size) + 10 * i
        yield SegmentationBatch(images, labels, indices, torch.full((size,), -1))


def trainer(folder, *, accumulate=1, callbacks=()):
    return L.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip


def fit(task, parts, folder, **options):
    trainer(folder, **options).fit(task, DataLoader(parts, batch_size=None))


def literal_loss(task, images, labels, class_weights=(1, 1, 1, 1, 1)):
    """Head and auxiliary heads, over all pixels, labelled or not."""
    counted = torch.tensor([*class_weights, 0])[labels]  # -1 is the last
    tokens = task.backbone.forward_blocks(images, taps=TAPS)
    maps = [x[:, 1:].transpose(1, 2).reshape(len(x), WIDTH, 3, 5) for x in tokens]
    total = 0.0
    for head, weight in [(task.head, 1.0), (task.auxiliary[0], 0.4), (task.auxiliary[1], 0.4)]:
        logits = F.interpolate(head(maps), size=(24, 40), mode="bilinear", align_corners=False)
        chosen = logits.log_softmax(dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        total = total - weight * (chosen * counted).sum() / labels.numel()
    return total


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 2, 2], [2, 1]])  # an epoch's last may be shorter
@pytest.mark.parametrize("class_weights", [None, [0.3, 4, 0, 1, 2.5]])
def test_a_step_is_that_of_the_whole_global_batch(tmp_path, sizes, class_weights):
    task = make_task(class_weights=class_weights)
    before = copy.deepcopy(task)
    parts = list(batches(sizes))
    fit(task, parts, tmp_path, accumulate=3)
    images, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    before.train()
    literal_loss(before, images, labels, class_weights or (1,) * K).backward()
    for (name, ours), (_, old) in zip(task.named_parameters(), before.named_parameters()):
        expected = old.detach() - old.grad
        torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=2e-6, msg=name)


def test_an_image_without_a_label_adds_pixels_and_no_loss(tmp_path):
    logged = []

    class Told(Tuned):
        def log(self, name, value, **options):
            logged.append((name, float(value)))

    part = next(batches([3]))
    part.labels[1] = -1
    task = make_task(kind=Told)
    expected = literal_loss(task, part.images, part.labels).item()
    fit(task, [part], tmp_path, accumulate=1)
    assert dict(logged)["train/loss"] == pytest.approx(expected, rel=1e-5)
    part.labels[:] = -1
    fit(task, [part], tmp_path, accumulate=1)
    assert dict(logged)["train/loss"] == 0


def test_gradients_reach_every_parameter():
    task = make_task(plain=False)
    task.train()
    images, labels = next(batches([3]))[:2]
    maps = task.maps(images)
    for head in (task.head, *task.auxiliary):
        logits = F.interpolate(head(maps), size=(24, 40), mode="bilinear")
        F.cross_entropy(logits, labels, ignore_index=-1).backward(retain_graph=True)
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_logits_are_at_the_images_size():
    task = make_task(plain=False).eval()
    images = torch.randn(2, 3, 24, 40)
    coarse = task.head(task.pyramid(task.backbone.forward_blocks(images, taps=TAPS), (3, 5)))
    assert coarse.shape == (2, K, 12, 20)
    expected = F.interpolate(coarse, size=(24, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(task(images), expected)
    ids = task.predict(images[0], (24, 40))
    assert torch.equal(ids.long(), expected[0].argmax(dim=0))


def test_stochastic_depth_is_keyed_by_sample(tmp_path):
    """However the global batch is cut, the same samples drop the same branches."""
    images, labels = torch.randn(4, 3, 24, 40), torch.randint(K, (4, 24, 40))
    weights = []
    for cut in (4, 1):
        parts = [
            SegmentationBatch(
                images[i : i + cut], labels[i : i + cut], torch.arange(i, i + cut),
                torch.full((cut,), -1),
            )
            for i in range(0, 4, cut)
        ]  # fmt: skip
        task = make_task(drop_path_rate=0.5)
        fit(task, parts, tmp_path, accumulate=4 // cut, callbacks=[KeyedRandomness(7)])
        weights.append(task.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=2e-6, msg=name)


def test_optimizer_has_all_parts_and_scales_the_backbone_alone():
    task = make_task(plain=False, kind=Segmentation)
    modules = {name: getattr(task, name) for name in ("backbone", "pyramid", "head", "auxiliary")}
    recipe = AdamWRecipe(lr=1.0, min_lr=0.0, weight_decay=0.1, layer_decay=0.5)
    optimizer, _ = recipe.build(modules, steps_per_epoch=1, total_steps=1, depth=3)
    scale = {
        name: group["lr_scale"] for group in optimizer.param_groups for name in group["param_names"]
    }
    assert len(scale) == len(list(task.parameters()))
    assert {v for k, v in scale.items() if not k.startswith("backbone.")} == {1.0}
    assert scale["backbone.blocks.2.mlp.fc1.weight"] == 0.5
    assert scale["backbone.patch_embed.proj.weight"] == 0.5**4


def test_a_step_moves_every_part(tmp_path):
    task = make_task(plain=False, kind=Segmentation)
    before = copy.deepcopy(task)
    part = next(batches([3]))
    data = L.LightningDataModule()
    data.train_dataloader = lambda: DataLoader([part], batch_size=None)
    data.micro_batches = lambda **_: 1
    trainer(tmp_path).fit(task, datamodule=data)
    for (name, now), (_, old) in zip(task.named_parameters(), before.named_parameters()):
        assert not torch.equal(now, old), name


def test_each_validation_is_measured_by_itself():
    """Against counts of the classes that the task predicts."""
    task, logged = make_task().eval(), {}
    task.log = lambda name, value, **_: logged.update({name: float(value)})
    for seed, count in ((1, 2), (2, 1)):
        draw = torch.Generator().manual_seed(seed)
        images = [torch.randn(3, 24, 40, generator=draw) for _ in range(count)]
        labels = [torch.randint(-1, K - 1, (31, 50), generator=draw) for _ in images]
        task.validation_step(SegmentationBatch(images, labels, None, None), 0)
        task.on_validation_epoch_end()
        with torch.no_grad():
            found = torch.stack([task.predict(image, (31, 50)) for image in images])
        truth = torch.stack(labels)
        found, truth = found[truth >= 0], truth[truth >= 0]
        of_classes = [
            float(((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum())
            for k in range(K)
            if k in found or k in truth
        ]
        assert logged["val/miou"] == pytest.approx(sum(of_classes) / len(of_classes))
        assert logged["val/pixel_acc"] == pytest.approx(float((found == truth).float().mean()))


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"pyramid\.taps=\[0, 1, 1, 3\]: a model of 3 blocks"):
        make_task(taps=[0, 1, 1, 3])
    for wrong, told in {
        (1, 1, 1, 1): "expected 5 numbers",
        (0, 0, 0, 0, 0): "not all 0",
        (1, 1, -1, 1, 1): r"class_weights\[2\] -1: expected a number of at least 0",
        (1, 1, 1, 1, "x"): r"class_weights\[4\] 'x'",
    }.items():
        with pytest.raises(UserError, match=told):
            make_task(class_weights=wrong)
    with pytest.raises(UserError, match="auxiliary_weight -1"):
        make_task(weight=-1)


def test_a_window_that_cannot_fit_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(memory, "attention_bytes", lambda *sizes: 2**30)
    task = make_task()
    with pytest.raises(UserError, match="2 windows of 24x40 px in one pass: attention alone needs"):
        fit(task, list(batches([2])), tmp_path, accumulate=1)
    assert task.trainer.global_step == 0


def test_a_linear_head_fits_too():
    assert LinearHead(WIDTH, K)([torch.randn(2, WIDTH, 3, 5)] * 4).shape == (2, K, 3, 5)
