"""A global batch of uneven parts against one cross-entropy over all of its images."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from beit.data.batches import LabelledBatch
from beit.optim.recipe import AdamWRecipe
from beit.tasks.classification import Classification

CLASSES = 5


class Backbone(nn.Module):
    def forward(self, images):
        return images.flatten(1)


class Tuned(Classification):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def batches(sizes, *, soft):
    generator = torch.Generator().manual_seed(3)
    for size in sizes:
        images = torch.randn(size, 3, 2, 2, generator=generator)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        if soft:
            labels = torch.rand(size, CLASSES, generator=generator).softmax(-1)
        yield LabelledBatch(images, labels, torch.arange(size), torch.full((size,), -1))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 2, 2], [2, 1]])  # an epoch's last may be shorter
def test_gradient_of_a_step_is_the_mean_over_its_images(tmp_path, sizes, soft):
    head = nn.Linear(12, CLASSES)
    task = Tuned(
        Backbone(), copy.deepcopy(head), num_classes=CLASSES, label_smoothing=0.1,
        optim=AdamWRecipe(lr=1.0, min_lr=0.0, weight_decay=0.0),
    )  # fmt: skip
    parts = list(batches(sizes, soft=soft))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, DataLoader(parts, batch_size=None))

    images = torch.cat([part.images for part in parts]).flatten(1)
    targets = torch.cat([part.targets for part in parts])
    F.cross_entropy(head(images), targets, label_smoothing=0.0 if soft else 0.1).backward()
    expected = head.weight.detach() - head.weight.grad
    torch.testing.assert_close(task.head.weight.detach(), expected, rtol=0, atol=1e-6)
