"""Training steps and the batches they run on, the same for every contender."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from beit.data.masking import BlockwiseMasking
from scripts.bench.settings import VOCAB_SIZE, Shape
from scripts.bench.timing import Step


def masking(shape: Shape, *, exact: bool = True) -> BlockwiseMasking:
    """75 of 196 patches, and as large a share of another grid."""
    return BlockwiseMasking(shape.grid, exact=exact)


def mim_batch(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks that hide equally many patches in each, token ids."""
    generator, rng, draw = torch.Generator().manual_seed(0), random.Random(0), masking(shape)
    size = shape.image_size
    images = torch.randn(shape.batch_size, 3, size, size, generator=generator)
    mask = torch.from_numpy(np.stack([draw(rng) for _ in range(shape.batch_size)]))
    return images, mask, torch.randint(VOCAB_SIZE, mask.shape, generator=generator)


def labelled_batch(shape: Shape, num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, 3, shape.image_size, shape.image_size)
    images = torch.randn(size, generator=generator)
    return images, torch.randint(num_classes, size[:1], generator=generator)


def segmentation_batch(shape: Shape, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images and a class for each of their pixels."""
    images, _ = labelled_batch(shape, num_classes)
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, *images.shape[2:])
    return images, torch.randint(num_classes, size, generator=generator)


class TrainingStep:
    """Forward in bf16, backward, fused AdamW."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1.5e-3, weight_decay=0.05, fused=True
        )

    def __call__(self, *batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert torch.isfinite(loss)


def training(model: nn.Module, *batch: Tensor) -> Step:
    """A step on this batch."""
    step = TrainingStep(model)
    return lambda: step(*batch)
