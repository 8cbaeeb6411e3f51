"""The pixels of our evaluation are those of transformers' processor, and where they are not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop
from transformers import AutoImageProcessor, BeitImageProcessor

from beit.data.views import EvalTransform
from beit.interop import convert
from beit.interop.weights import Preprocessing

try:
    from transformers import BeitImageProcessorPil
except ImportError:  # version 4: Pillow's has the plain name, and knows no shortest edge
    BeitImageProcessorPil = BeitImageProcessor
    KEEPS_ASPECT = False
else:
    KEEPS_ASPECT = True
needs_aspect = pytest.mark.skipif(not KEEPS_ASPECT, reason="transformers 4 gives up the aspect")


@pytest.mark.parametrize("crop_mode", ["squash", pytest.param("center", marks=needs_aspect)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_the_processor_makes_our_pixels(interpolation, crop_pct, crop_mode, tmp_path, kit):
    plain = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), interpolation, crop_pct, crop_mode)
    weights = kit.make(size=56).changed(preprocessing=plain)
    folder = kit.save(weights, "huggingface", tmp_path)
    # what is cut off is even here: the test below has the odd rests
    height, width = (62, 88) if crop_pct == 0.9 else (90, 70)
    smooth = np.add.outer(np.arange(height), np.arange(width))[..., None] * np.array([1, 0.5, 0.8])
    image = Image.fromarray(smooth.astype(np.uint8))
    ours = EvalTransform(
        image_size=56,
        mean=plain.mean,
        std=plain.std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
    )(image)
    processor = BeitImageProcessorPil.from_pretrained(folder)
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert type(AutoImageProcessor.from_pretrained(folder)).__name__.startswith(
        "BeitImageProcessor"
    )
    found = convert.read(folder).preprocessing
    assert int(56 / found.crop_pct) == int(56 / crop_pct)  # 0.9 is written as 62 pixels
    assert replace(found, crop_pct=crop_pct) == plain


@needs_aspect
@pytest.mark.parametrize("rest", range(9))
def test_what_is_cut_off_an_odd_rest(rest, kit, tmp_path):
    """The pixel at column x has colour x. Ours and torchvision's cut round(rest / 2), half to even.

    Theirs cut rest // 2 in both backends: one pixel less of a rest that leaves 3 divided by 4.
    """
    size = 40
    row = np.arange(size + rest, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(row[:, None], (size, size + rest, 3)).copy())
    plain = Preprocessing((0.0,) * 3, (1.0,) * 3, "bicubic", crop_pct=1.0)
    folder = kit.save(kit.make(size=size).changed(preprocessing=plain), "huggingface", tmp_path)
    ours = EvalTransform(image_size=size, mean=plain.mean, std=plain.std, crop_pct=1.0)(image)
    left = round(ours[0, 0, 0].item() * 255)
    assert left == round(rest / 2)
    assert np.asarray(CenterCrop(size)(image))[0, 0, 0] == left
    for processor in (BeitImageProcessorPil, BeitImageProcessor):
        pixels = processor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
        assert round(pixels[0, 0, 0, 0].item() * 255) == rest // 2
    assert (left != rest // 2) == (rest % 4 == 3)
