import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from beit.data.fast_views import FastTwoViewTransform
from beit.data.pixels import draw_crop, draw_jitter
from beit.data.views import TwoViewTransform
from beit.errors import UserError

SIZES = {"image_size": (24, 40), "token_image_size": (12, 20)}


@pytest.fixture(scope="module")
def image():
    """Soft colours, so that no adjustment reaches black or white."""
    pixels = np.random.default_rng(0).integers(85, 145, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC)


def both(image, seed, **changes):
    """(exact, fast) views of the same draws."""
    exact = TwoViewTransform(**SIZES, token_interpolation="bicubic", **changes)
    fast = FastTwoViewTransform(**SIZES, **changes)
    return exact(image, random.Random(seed)), fast(image, random.Random(seed))


def test_without_jitter_only_the_resizing_differs(image):
    for seed in range(20):
        for exact, fast in zip(*both(image, seed, color_jitter=0.0), strict=True):
            assert fast.shape == exact.shape
            assert fast.dtype == torch.uint8
            assert fast.is_contiguous()
            assert (fast.int() - exact.int()).abs().max() <= 2


def test_with_jitter_they_agree_to_a_level_in_the_mean(image):
    differences = []
    for seed in range(40):
        for exact, fast in zip(*both(image, seed), strict=True):
            differences.append((fast.float() - exact.float()).flatten())
    together = torch.cat(differences)
    assert together.abs().max() <= 4
    assert together.abs().mean() < 1
    assert abs(together.mean()) < 0.3  # no darker and no brighter


def test_the_adjustments_are_those_of_torchvision_in_floating_point(image):
    """In the order drawn, on the whole image, in float; then crop, resize and mirror."""
    fast = FastTwoViewTransform(**SIZES, min_ratio=5 / 3, max_ratio=5 / 3)
    adjust = {
        "brightness": TF.adjust_brightness,
        "contrast": TF.adjust_contrast,
        "saturation": TF.adjust_saturation,
    }
    for seed in range(10):
        rng = random.Random(seed)
        jitter, mirrored = draw_jitter(rng, 0.4), rng.random() < 0.5
        box = draw_crop(rng, image.size, (0.08, 1.0), (5 / 3, 5 / 3))
        pixels = TF.to_tensor(image)
        for name, factor in jitter:
            pixels = adjust[name](pixels, factor)
        pixels = TF.hflip(pixels) if mirrored else pixels
        expected = TF.resized_crop(pixels, *box, [24, 40], TF.InterpolationMode.BICUBIC)
        found = fast(image, random.Random(seed))[0]
        # a level and a half darker, as Pillow, and what a mean of every 16th pixel makes
        assert ((found.float() + 1.5) - expected * 255).abs().mean() < 1.2


def test_the_second_view_alone_is_the_second_view(image):
    fast = FastTwoViewTransform(**SIZES)
    both_views = fast(image, random.Random(5))
    assert torch.equal(fast.token_view(image, random.Random(5)), both_views[1])
    first, nothing = fast(image, random.Random(5), token_view=False)
    assert torch.equal(first, both_views[0])
    assert nothing is None


def test_a_filter_that_torch_lacks_is_refused():
    with pytest.raises(UserError, match=r"lanczos: the fast views know bicubic and bilinear"):
        FastTwoViewTransform(**SIZES, token_interpolation="lanczos")


def test_one_pixel_is_enough():
    views = FastTwoViewTransform(**SIZES)(Image.new("RGB", (1, 1), (9, 90, 200)), random.Random(0))
    assert [view.shape for view in views] == [(3, 24, 40), (3, 12, 20)]
