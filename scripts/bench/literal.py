"""The released pretraining's data path, written anew step by step from its description.

Nothing here is meant to be fast, and nothing slow: it is what a reader of the paper and of the
code's documentation would write with torchvision, Pillow and Python's `random`.
"""

import io
import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from scripts.bench.settings import MEAN, STD, Shape

MIN_BLOCK, MIN_ASPECT, ATTEMPTS = 16, 0.3, 10


class Masks:
    """Blockwise masks (h, w) of at most `target` patches: ones where they are hidden."""

    def __init__(self, grid: tuple[int, int], target: int) -> None:
        self.height, self.width = grid
        self.target = target
        self.min_block = min(MIN_BLOCK, target)
        self.log_aspect = math.log(MIN_ASPECT), math.log(1 / MIN_ASPECT)

    def __call__(self) -> np.ndarray:
        mask = np.zeros((self.height, self.width), dtype=int)
        count = 0
        while count < self.target:
            added = self._add_block(mask, self.target - count)
            if added == 0:
                break
            count += added
        return mask

    def _add_block(self, mask: np.ndarray, wanted: int) -> int:
        """How many patches the next block hides anew; 0 when all attempts failed."""
        for _ in range(ATTEMPTS):
            area = random.uniform(self.min_block, wanted)
            aspect = math.exp(random.uniform(*self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top = random.randint(0, self.height - height)
            left = random.randint(0, self.width - width)
            block = mask[top : top + height, left : left + width]
            new = height * width - int(block.sum())
            if not 0 < new <= wanted:
                continue
            for y in range(height):
                for x in range(width):
                    block[y, x] = 1
            return new
        return 0


class Views:
    """JPEG bytes -> (the encoder's view, normalised; the tokenizer's, in [0.1, 0.9]), floats.

    Jitter of the whole photograph, mirroring, one crop box, two resizes.
    """

    def __init__(self, shape: Shape) -> None:
        self.jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
        self.flip = transforms.RandomHorizontalFlip(0.5)
        self.sizes = shape.image_size, shape.token_image_size
        self.for_encoder = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )
        self.for_tokenizer = transforms.Compose(
            [transforms.ToTensor(), transforms.Lambda(lambda x: 0.8 * x + 0.1)]
        )

    def __call__(self, data: bytes) -> tuple[Tensor, Tensor]:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
        image = self.flip(self.jitter(image))
        box = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        first, second = ([size, size] for size in self.sizes)
        view = F.resized_crop(image, *box, first, InterpolationMode.BICUBIC)
        token_view = F.resized_crop(image, *box, second, InterpolationMode.LANCZOS)
        return self.for_encoder(view), self.for_tokenizer(token_view)


class Samples(torch.utils.data.Dataset):
    """(encoder's view, tokenizer's view, mask) of photographs."""

    def __init__(self, photographs: list[bytes], views: Views, masks: Masks) -> None:
        self.photographs, self.views, self.masks = photographs, views, masks

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, np.ndarray]:
        return *self.views(self.photographs[index]), self.masks()
