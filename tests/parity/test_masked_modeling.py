"""Masked image modelling against transformers' `BeitForMaskedImageModeling`.

Theirs is asked with mean pooling: with CLS pooling it applies the final norm twice. Their labels
are ids of the masked patches alone, (M,).
"""

import pytest
import torch
from other_beits import (
    POSITIONS,
    VOCAB,
    WIDTH,
    copy_to_transformers,
    make_ours,
    masked_modeling_names,
    mend_transformers,
    randomise,
    transformers_config,
)
from transformers import BeitForMaskedImageModeling

from beit.data.batches import MIMBatch
from beit.models.heads import MIMHead
from beit.optim.recipe import AdamWRecipe
from beit.tasks.mim import MaskedImageModeling

BATCH, GRIDS = 7, {"square": (24, 24), "non-square": (24, 40)}
ALLOWED = {"float32": (1e-5, 1e-5, 1e-4), "bf16": (0.05, 0.02, 0.25)}  # logits, loss, gradients


def make_task(image_size, positions):
    backbone = make_ours(image_size, positions, layer_scale=0.1, mask_token=True, final_norm=True)
    task = MaskedImageModeling(
        backbone,
        MIMHead(WIDTH, VOCAB),
        optim=AdamWRecipe(lr=1e-3, min_lr=0.0, weight_decay=0.05),
    )
    randomise(backbone, task.head)
    return task


def training_loss(task, batch, monkeypatch):
    """The loss of a training step, as one device without accumulation sees it."""
    monkeypatch.setattr(type(task), "trainer", Alone)
    monkeypatch.setattr(type(task), "log", lambda self, *args, **kwargs: None)
    return task.training_step(batch, 0)


class Alone:
    accumulate_grad_batches = 1
    world_size = 1


@pytest.mark.parametrize("number", ALLOWED)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_loss_and_gradients(positions, grid, number, measured, monkeypatch):
    image_size = GRIDS[grid]
    task = make_task(image_size, positions)
    config = transformers_config(image_size, positions, layer_scale=0.1, pooling="mean")
    theirs = BeitForMaskedImageModeling(config)
    copy_to_transformers(task.backbone, task.head, theirs, masked_modeling_names)
    if grid == "non-square":
        mend_transformers(monkeypatch, task.backbone.grid)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCH, 3, *image_size, generator=generator)
    mask = torch.rand(BATCH, *task.backbone.grid, generator=generator) < 0.4
    token_ids = torch.randint(VOCAB, mask.shape, generator=generator)
    batch = MIMBatch(images, mask, token_ids, torch.arange(BATCH))

    with torch.autocast("cpu", torch.bfloat16, enabled=number == "bf16"):
        logits = task(images, mask)
        loss = training_loss(task, batch, monkeypatch)
        expected = theirs(images, mask.flatten(1), labels=token_ids[mask])
    at_masked = expected.logits[mask.flatten(1)]
    of_logits, of_loss, of_gradients = ALLOWED[number]
    against = f"transformers, {number}"
    what = f"masked modelling, {positions}"
    unit = 1.0 if number == "float32" else at_masked.abs().max().item()
    difference = (logits.float() - at_masked.float()).abs().max().item() / unit
    measured("Heads and taps", f"{what}: logits", against, difference, of_logits)
    difference = (loss - expected.loss).abs().item()
    measured("Heads and taps", f"{what}: loss", against, difference, of_loss)

    loss.backward()
    expected.loss.backward()
    parameters = dict(theirs.named_parameters())
    for module in (task.backbone, task.head):
        for name, parameter in module.named_parameters():
            gradient = torch.cat([parameters[n].grad for n in masked_modeling_names(name)])
            if number == "float32":
                difference = (parameter.grad - gradient).abs().max() / gradient.abs().max()
            else:
                difference = (parameter.grad - gradient).norm() / gradient.norm()
            measured("Heads and taps", f"{what}: gradients", against, difference, of_gradients)
