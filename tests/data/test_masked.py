"""Pretraining on pixels sees the crops and masks of pretraining on tokens."""

import numpy as np
import torch
from PIL import Image

from beit.data.dataset import MaskedSample, SampleKey, TwoViewSample
from beit.data.masking import RandomMasking
from beit.data.views import TwoViewTransform


def test_the_same_crops_and_masks_as_for_tokens() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (43, 61, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    masking = RandomMasking((3, 5), mask_ratio=0.4)
    views = {
        size: TwoViewTransform(image_size=(24, 40), token_image_size=size) for size in (12, 24)
    }
    key = SampleKey(seed=3, epoch=2, index=5)
    both = TwoViewSample(views[12], masking)(image, None, key)
    view, mask = MaskedSample(views[24], masking)(image, None, key)
    assert torch.equal(view, both[0])
    assert torch.equal(mask, both[4])
    assert torch.equal(mask, torch.from_numpy(masking(key.rng("mask"))))
    other = MaskedSample(views[24], masking)(image, None, SampleKey(seed=3, epoch=3, index=5))
    assert not torch.equal(view, other[0])
