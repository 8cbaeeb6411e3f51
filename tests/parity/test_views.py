"""The views against Pillow, DALL-E's range of pixels and transformers' image processor."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from transformers.models.beit.image_processing_beit import BeitImageProcessor
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

from beit.data.loading import LoaderSettings
from beit.data.masking import BlockwiseMasking
from beit.data.pixels import CropBox
from beit.data.pretraining import PretrainingData
from beit.data.views import EvalTransform, TwoViewTransform

VIEW, TOKEN_VIEW = (40, 72), (24, 44)
PROCESSORS = {"Pillow": BeitImageProcessorPil, "torchvision": BeitImageProcessor}
NORMALISATION = {
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "ImageNet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def views(**changes):
    return TwoViewTransform(image_size=VIEW, token_image_size=TOKEN_VIEW, **changes)


def edges(view, size):
    """Where the box of a ramp lies: its first and last column and row, from straight lines."""
    found = []
    for channel, length in ((0, size[1]), (1, size[0])):
        line = view[channel].double().mean(dim=channel).numpy()
        at = (np.arange(length) + 0.5) / length
        inner = slice(4, length - 4)  # the filters bend the ramp at the rim
        slope, start = np.polyfit(at[inner], line[inner], 1)
        found += [start, start + slope]
    return np.array(found)


def test_crop_boxes(measured):
    """The colour of each pixel says where it is: red its column, green its row."""
    y, x = np.mgrid[0:211, 0:251]
    ramp = Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))
    boxes = []
    for seed in range(40):
        view, token_view = views(color_jitter=0.0)(ramp, random.Random(seed))
        boxes.append(edges(view, VIEW))
        difference = np.abs(boxes[-1] - edges(token_view, TOKEN_VIEW)).max()
        # levels are whole numbers: a line through them is known to less than one at its ends
        measured("Views", "crop box of both views, pixels", "each other", difference, 1.0)
    assert np.std(boxes, axis=0).min() > 10  # they do move
    mirrored = sum(box[0] > box[1] for box in boxes)
    assert 8 < mirrored < 32


@pytest.mark.parametrize("box", [CropBox(3, 11, 137, 190), CropBox(50, 60, 13, 17)])
def test_kernels(box, measured, monkeypatch):
    monkeypatch.setattr("beit.data.views.draw_crop", lambda *_: box)
    for name, image in photographs().items():
        both = views(color_jitter=0.0, flip=0.0)(image, random.Random(0))
        crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        kernels = (
            ("encoder", VIEW, Image.Resampling.BICUBIC),
            ("tokenizer", TOKEN_VIEW, Image.Resampling.LANCZOS),
        )
        for view, (kind, size, kernel) in zip(both, kernels, strict=True):
            expected = np.asarray(crop.resize((size[1], size[0]), kernel))
            difference = np.abs(view.permute(1, 2, 0).numpy().astype(int) - expected).max()
            what = f"{kind} view of {name}, {box.height}x{box.width} px"
            measured("Views", what, f"Pillow's {kernel.name.lower()}", difference, 0)


class Recording(nn.Module):
    """A tokenizer of DALL-E's range that keeps what it is given."""

    vocab_size, stride, value_range = 13, 8, (0.1, 0.9)

    def grid(self, image_size):
        return image_size[0] // 8, image_size[1] // 8

    def encode(self, images):
        self.images = images
        return torch.zeros(len(images), *self.grid(images.shape[2:]), dtype=torch.int64)


class Photographs:
    classes = None

    def __len__(self):
        return 2

    def load(self, index):
        return list(photographs().values())[index], None

    def name(self, index):
        return list(photographs())[index]


@pytest.mark.parametrize("normalisation", NORMALISATION)
def test_ranges_of_pixels(normalisation, measured):
    mean, std = NORMALISATION[normalisation]
    data = PretrainingData(
        Photographs(),
        None,
        views=TwoViewTransform(image_size=(24, 40), token_image_size=(24, 40)),
        masking=BlockwiseMasking((3, 5)),
        tokenizer=Recording(),
        mean=mean,
        std=std,
        loader=LoaderSettings(
            global_batch_size=2,
            batch_size_per_device=2,
            num_workers=0,
            seed=3,
            max_unreadable_images=0,
            check_images=0,
        ),
    )
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(256, (2, 3, 24, 40), generator=generator, dtype=torch.uint8)
    levels[0, :, 0, 0], levels[0, :, 0, 1] = 0, 255
    images = data.normalize(levels)
    expected = (levels.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    what = f"encoder's range, {normalisation} normalisation"
    measured("Views", what, "arithmetic", (images - expected).abs().max(), 1e-5)
    data.tokenize(levels)
    expected = 0.8 * (levels.double() / 255) + 0.1
    difference = (data.tokenizer.images - expected).abs().max()
    measured("Views", "tokenizer's range", "0.8 x + 0.1 (DALL-E)", difference, 1e-6)


def photographs():
    """Two real photographs of 640x427 that come with scikit-learn."""
    images = load_sample_images()
    names = [name.rpartition("/")[2].rpartition(".")[0] for name in images.filenames]
    return dict(zip(names, map(Image.fromarray, images.images), strict=True))


# resize so that the short side is size / crop_pct, then the middle; the part of the photograph is
# such that what is cut away is even: an odd rest torchvision rounds up and theirs rounds down
@pytest.mark.parametrize(
    ("size", "crop_pct", "part"),
    [
        (224, 0.875, (600, 400)),
        (224, 0.875, (300, 420)),
        (96, 1.0, (480, 320)),
        (384, 1.0, (427, 427)),
        (32, 1.0, (640, 427)),  # small: the exact size, the aspect given up
    ],
)
@pytest.mark.parametrize("normalisation", NORMALISATION)
def test_evaluation(size, crop_pct, part, normalisation, measured):
    mean, std = NORMALISATION[normalisation]
    transform = EvalTransform(image_size=size, mean=mean, std=std, crop_pct=crop_pct)
    short = int(size / crop_pct)
    width, height = (short * side // min(part) for side in part)
    if size <= 32:
        width = height = size
    assert (width - size) % 2 == 0
    assert (height - size) % 2 == 0
    options = {
        "size": {"height": height, "width": width},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": mean,
        "image_std": std,
    }
    for backend, processor in PROCESSORS.items():
        for image in photographs().values():
            image = image.crop((0, 0, *part))
            expected = processor(**options)(images=image, return_tensors="pt").pixel_values[0]
            # torchvision rounds its bicubic sums, and their weights, elsewhere than Pillow does
            levels = (transform(image) - expected).abs() * torch.tensor(std)[:, None, None] * 255
            difference = levels.max()
            what = f"evaluation, {part[0]}x{part[1]} to {size} px, {normalisation}: levels of 255"
            allowed = 1e-3 if backend == "Pillow" else 2.01
            measured("Views", what, f"transformers' processor, {backend}", difference, allowed)
