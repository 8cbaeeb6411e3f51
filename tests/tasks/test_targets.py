"""Targets of masked image modelling against a literal patchify, loop by loop, and plain torch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit.data.batches import MaskedBatch, MIMBatch
from beit.errors import UserError
from beit.models.heads import MIMHead, PixelHead
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.tasks.mim import MaskedImageModeling
from beit.tasks.targets import Pixels, PixelSpread, VisualTokens, patchify, unpatchify

VOCAB, SIZE, GRID = 13, 8, (3, 5)


def _images() -> torch.Tensor:
    return torch.randn(7, 3, 24, 40, generator=torch.Generator().manual_seed(7))


def _mask() -> torch.Tensor:
    return torch.rand(7, *GRID, generator=torch.Generator().manual_seed(8)) < 0.4


def _batch(pixels: bool) -> MIMBatch | MaskedBatch:
    indices = torch.arange(7)
    if pixels:
        return MaskedBatch(_images(), _mask(), indices, torch.full((7,), -1))
    token_ids = torch.randint(VOCAB, (7, *GRID), generator=torch.Generator().manual_seed(9))
    return MIMBatch(_images(), _mask(), token_ids, indices)


def _task(pixels: bool = False, *, normalized: bool = False, **choices) -> MaskedImageModeling:
    torch.manual_seed(2)
    backbone = VisionTransformer(
        (24, 40),
        SIZE,
        width=22,
        depth=4,
        num_heads=2,
        absolute_position=False,
        relative_position="shared",
        layer_scale=0.1,
        drop_path_rate=0.0,
        mask_token=True,
        final_norm=True,
        init_cut=0.02,
    )
    head = PixelHead(22, SIZE) if pixels else MIMHead(22, VOCAB)
    target = Pixels(SIZE, normalized=normalized) if pixels else VisualTokens()
    recipe = AdamWRecipe(lr=1e-3, min_lr=1e-5, weight_decay=0.05)
    return MaskedImageModeling(backbone, head, optim=recipe, target=target, **choices)


def _step(task: MaskedImageModeling, batch: MIMBatch | MaskedBatch) -> torch.Tensor:
    task._trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1)  # type: ignore[assignment]
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    return task.training_step(batch, 0)


def _literal_patch(image: np.ndarray, y: int, x: int, normalized: bool) -> list[float]:
    values = [
        float(image[channel, SIZE * y + row, SIZE * x + column])
        for channel in range(3)
        for row in range(SIZE)
        for column in range(SIZE)
    ]
    if normalized:
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        values = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
    return values


def test_patchify_is_undone() -> None:
    images = _images()
    patches = patchify(images, SIZE)
    assert patches.shape == (7, *GRID, 3 * SIZE**2)
    assert torch.equal(unpatchify(patches, SIZE), images)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("predict", ["masked", "all"])
@pytest.mark.parametrize("mask_input", [True, False])
def test_pixels_against_a_literal_rewrite(normalized: bool, predict: str, mask_input: bool) -> None:
    task = _task(True, normalized=normalized, predict=predict, mask_input=mask_input)
    batch = _batch(True)
    seen = batch.mask if mask_input else torch.zeros_like(batch.mask)
    features = task.backbone(batch.images, seen)
    losses = []
    for b in range(7):
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                if predict == "all" or batch.mask[b, y, x]:
                    wanted = _literal_patch(batch.images[b].numpy(), y, x, normalized)
                    predicted = task.head.decoder(features[b, 1 + GRID[1] * y + x])
                    losses.append(((predicted - torch.tensor(wanted)) ** 2).sum() / len(wanted))
    assert len(losses) == (7 * 15 if predict == "all" else int(batch.mask.sum()))
    torch.testing.assert_close(_step(task, batch), sum(losses) / len(losses))


def test_all_tokens_of_an_unmasked_input() -> None:
    task, batch = _task(predict="all", mask_input=False), _batch(False)
    logits = task.head.lm_head(task.backbone(batch.images, None)[:, 1:])
    expected = F.cross_entropy(logits.flatten(0, 1), batch.token_ids.flatten())
    torch.testing.assert_close(_step(task, batch), expected)
    # whatever the mask is, and every weight is used, as DDP demands
    torch.testing.assert_close(_step(task, batch._replace(mask=~batch.mask)), expected)
    _step(task, batch).backward()
    assert all(weight.grad is not None for weight in task.parameters())


@pytest.mark.parametrize("pixels", [False, True])
def test_the_gradient_comes_from_the_chosen_patches_alone(pixels: bool) -> None:
    for predict in ("masked", "all"):
        task, batch = _task(pixels, predict=predict), _batch(pixels)
        features = task.backbone(batch.images, batch.mask).detach().requires_grad_()
        task.backbone.forward = lambda *_, given=features: given
        _step(task, batch).backward()
        reached = features.grad[:, 1:].abs().sum(dim=-1).view(7, *GRID) > 0
        assert torch.equal(reached, batch.mask if predict == "masked" else torch.ones_like(reached))


def test_always_guessing_the_mean_patch_costs_the_variance() -> None:
    task, batch = _task(True), _batch(True)
    wanted = task.target.wanted(batch, batch.mask)
    meter = task.target.meter(task.head)
    assert isinstance(meter, PixelSpread)
    meter.update(wanted[:11])
    meter.update(wanted[11:])
    guess = wanted.mean(dim=0, keepdim=True).expand_as(wanted)
    torch.testing.assert_close(meter.named()["mean_patch_loss"], F.mse_loss(guess, wanted))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_perfect_prediction_draws_the_image(normalized: bool) -> None:
    task, batch = _task(True, normalized=normalized), _batch(True)
    everywhere = torch.ones_like(batch.mask)
    outputs = task.target.wanted(batch, everywhere).view(7, *GRID, -1)
    torch.testing.assert_close(task.target.drawn(outputs, batch.images), batch.images)


def test_other_patches_to_predict_are_refused() -> None:
    with pytest.raises(UserError, match=r"task\.predict=hidden: expected masked or all"):
        _task(predict="hidden")
