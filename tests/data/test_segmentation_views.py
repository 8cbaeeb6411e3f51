"""Image and label map move together: the image is a ramp of coordinates, the labels too."""

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image

from beit.data.distortion import Distortion
from beit.data.pixels import CropBox
from beit.data.segmentation_views import (
    Draws,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    cropped_labels,
    fitted,
    is_mixed,
)
from beit.errors import UserError

MEAN = (0.485, 0.456, 0.406)


def ramp(height, width):
    """Red says the row, green the column, both from 0 to 240; labels are 16 rows x 16 columns."""
    rows = (np.arange(height) + 0.5) / height * 240
    columns = (np.arange(width) + 0.5) / width * 240
    red, green = np.meshgrid(rows, columns, indexing="ij")
    pixels = np.stack([red, green, np.full_like(red, 77)], axis=-1).round().astype(np.uint8)
    labels = (red // 15).astype(np.int16) * 16 + (green // 15).astype(np.int16)
    return Image.fromarray(pixels), labels


def transform(**changes):
    options = {"image_size": (24, 40), "short_side": 28, "mean": MEAN, "distort": 0.0}
    return SegmentationTrainTransform(**(options | changes))


@pytest.mark.parametrize("size", [(31, 53), (53, 31), (9, 13), (200, 90), (24, 40)])
def test_image_and_label_map_move_together(size):
    image, labels = ramp(*size)
    counted = 0
    for seed in range(25):
        pixels, crop = transform(max_aspect=3.0)(
            image, labels, random.Random(seed), random.Random(0)
        )
        assert (pixels.shape, pixels.dtype) == ((3, 24, 40), torch.uint8)
        assert (crop.shape, crop.dtype) == ((24, 40), torch.int16)
        inside = crop >= 0
        # the place that the colours tell lies in the cell that the label says, but for the
        # smoothing of the image: two thirds of a cell, or 1.5 pixels of the original
        slack = [max(10, 1.5 * 240 / side) for side in size]
        for channel, cell, most in ((0, crop // 16, slack[0]), (1, crop % 16, slack[1])):
            told = pixels[channel].float()
            off = (told - (cell.float() * 15 + 7.5)).abs() - 7.5
            assert off[inside].max() <= most
        assert (pixels[2][inside] == 77).all()
        padding = torch.tensor([124, 116, 104], dtype=torch.uint8)
        assert (pixels[:, ~inside] == padding[:, None]).all()
        counted += int(inside.sum())
        if inside.any():  # padding is at the right and at the bottom
            rows, columns = inside.any(1), inside.any(0)
            assert bool(inside[: rows.sum(), : columns.sum()].all())
    assert counted > 0


def test_mirroring_turns_both():
    image, labels = ramp(28, 46)
    for flip, rises in ((0.0, True), (1.0, False)):
        pixels, crop = transform(flip=flip)(image, labels, random.Random(3), random.Random(0))
        middle = pixels[1, 5].int()[crop[5] >= 0]
        columns = (crop[5] % 16)[crop[5] >= 0]
        for values in (middle, columns):
            assert bool((values.diff() >= 0).all()) == rises


def test_the_crop_is_that_of_the_resized_whole():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8))
    labels = rng.integers(0, 9, (61, 83)).astype(np.int16)
    views = transform(max_class_share=1.0)
    seen = set()
    for seed in range(40):
        draws = views.draw(labels, random.Random(seed))
        height, width = draws.size
        whole = image.resize((width, height), Image.Resampling.BILINEAR)
        top, left, tall, wide = draws.box
        crop = np.asarray(whole)[top : top + tall, left : left + wide]
        crop = crop[:, ::-1] if draws.mirrored else crop
        off = np.abs(np.asarray(views.crop(image, draws)).astype(int) - crop)
        assert off.max() <= 2
        assert (off > 0).mean() < 0.01
        # Pillow takes the centres too
        whole = Image.fromarray(labels.astype(np.uint8)).resize((width, height), 0)
        crop = np.asarray(whole)[top : top + tall, left : left + wide]
        crop = crop[:, ::-1] if draws.mirrored else crop
        assert cropped_labels(labels, draws).tolist() == crop.tolist()
        seen.add((draws.mirrored, draws.size[0] > 24, draws.size[0] > 61))
    assert len(seen) == 4  # both sides, and sizes below the crop's; none is enlarged


def literal_rescale(height, width, scale):
    """mmcv.imrescale."""
    long, short = max(scale), min(scale)
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def test_sizes_are_mmcvs():
    rng = random.Random(0)
    for _ in range(300):
        height, width = rng.randint(100, 3000), rng.randint(100, 3000)
        ratio = rng.uniform(0.5, 2)
        scale = int(2048 * ratio), int(512 * ratio)
        assert fitted((height, width), *scale) == literal_rescale(height, width, scale)
    assert fitted((512, 683), 2048, 512) == (512, 683)
    assert fitted((100, 1000), 2048, 512) == (205, 2048)
    assert fitted((1, 5000), 2048, 512) == (1, 2048)


def test_factors_are_uniform_and_cover_their_range():
    labels = np.zeros((512, 600), dtype=np.int16)
    views = SegmentationTrainTransform(
        image_size=512, short_side=512, mean=MEAN, max_class_share=1.0
    )
    sides = [views.draw(labels, random.Random(seed)).size[0] for seed in range(3000)]
    assert 256 <= min(sides) <= 260
    assert 1018 <= max(sides) <= 1024
    quarters = np.histogram(sides, bins=4, range=(256, 1024))[0]
    assert np.abs(quarters - 750).max() < 120  # five standard deviations


def literal_is_mixed(labels, share):
    """mmsegmentation's condition."""
    found, counts = np.unique(labels, return_counts=True)
    counts = counts[found != -1]
    return len(counts) > 1 and np.max(counts) / np.sum(counts) < share


def test_no_class_fills_a_crop():
    labels = np.zeros((90, 120), dtype=np.int16)
    labels[:, 100:] = 1  # a sixth of the columns
    labels[:9] = -1
    views = transform(min_scale=2.0, max_scale=2.0)
    mixed = 0
    for seed in range(300):
        draws = views.draw(labels, random.Random(seed))
        mixed += literal_is_mixed(cropped_labels(labels, draws), 0.75)
    (height, width), (_, _, tall, wide) = draws.size, draws.box
    possible = [
        cropped_labels(labels, draws._replace(box=CropBox(top, left, tall, wide)))
        for top in range(height - tall + 1)
        for left in range(width - wide + 1)
    ]
    for crop in possible[::7]:
        for share in (0.3, 0.75, 0.9):
            assert is_mixed(crop, share) == literal_is_mixed(crop, share)
    # ten boxes are looked at, and the eleventh is taken
    p = np.mean([literal_is_mixed(crop, 0.75) for crop in possible])
    assert 0.02 < p < 0.15
    assert mixed / 300 == pytest.approx(1 - (1 - p) ** 11, abs=0.12)
    assert not is_mixed(np.full((3, 3), -1), 0.75)
    assert not is_mixed(np.zeros((3, 3), dtype=np.int16), 1.0)


def test_ten_crops_are_tried_and_the_next_is_taken():
    labels = np.zeros((60, 90), dtype=np.int16)
    views, drawn = transform(min_scale=2.0, max_scale=2.0), []
    box = views._box
    views._box = lambda size, rng: drawn.append(box(size, rng)) or drawn[-1]
    draws = views.draw(labels, random.Random(0))
    assert len(drawn) == 11
    assert draws.box == drawn[-1]


def test_the_same_draws_give_the_same_tensors():
    image, labels = ramp(61, 83)
    views = transform(distort=0.5)
    first = views(image, labels, random.Random(5), random.Random(6))
    again = views(image, labels, random.Random(5), random.Random(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other = views(image, labels, random.Random(5), random.Random(7))
    assert torch.equal(first[1], other[1])  # colours do not move the crop
    assert not torch.equal(first[0], other[0])


class Drawn(random.Random):
    """Chooses what it is told to; amounts are those of a seed."""

    def __init__(self, choices, seed=0):
        super().__init__(seed)
        self.choices = iter(choices)

    def random(self):
        return 0.0 if next(self.choices) else 1.0 - 2**-53

    def uniform(self, low, high):
        return low + (high - low) * super().random()

    def randrange(self, start, stop):
        return int(self.uniform(start, stop))


def literal_distortion(pixels, rng, *, brightness, contrast, saturation, hue):
    """mmsegmentation's order and arithmetic in floats, colours by the standard library."""

    def convert(values, alpha=1.0, beta=0.0):
        return np.floor(np.clip(values * alpha + beta, 0, 255))

    def amount(low, high, neutral):
        chosen, value = rng.random() < 0.5, rng.uniform(low, high)
        return value if chosen else neutral

    added = amount(-brightness, brightness, 0.0)
    early = rng.random() < 0.5
    alpha = amount(1 - contrast, 1 + contrast, 1.0)
    factor = amount(1 - saturation, 1 + saturation, 1.0)
    turned = rng.randrange(-hue, hue) if rng.random() < 0.5 else 0
    pixels = convert(pixels.astype(float), beta=added)
    if early:
        pixels = convert(pixels, alpha)
    for pixel in pixels.reshape(-1, 3):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        s = min(s * factor, 1.0)
        rgb = colorsys.hsv_to_rgb((h + turned / 180) % 1.0, s, v)
        pixel[:] = (255 * np.array(rgb)).round(6)  # 100, not 99.999...: fractions are dropped later
    return pixels if early else convert(pixels, alpha)


NUMBERS = {"brightness": 32.0, "contrast": 0.5, "saturation": 0.5, "hue": 18}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("which", ["0000", "1000", "0100", "0010", "0001", "1111"])
def test_distortion_is_mmsegmentations(which, early):
    pixels = np.random.default_rng(1).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    b, c, s, h = (letter == "1" for letter in which)
    for seed in range(6):
        choices = [b, early, c, s, h]
        expected = literal_distortion(pixels, Drawn(choices, seed), **NUMBERS)
        found = Distortion(share=0.5, **NUMBERS)(Image.fromarray(pixels), Drawn(choices, seed))
        off = np.abs(np.asarray(found) - expected)
        # exact but for the 8-bit numbers of HSV: a step of hue is 6 levels, and times the contrast
        exact = which in ("0000", "1000", "0100")
        assert off.max() <= (1e-9 if exact else 18)
        assert off.mean() < (1e-9 if exact else 2.5)
        if which != "0000":
            assert np.abs(np.asarray(found).astype(int) - pixels).mean() > 1


def test_each_distortion_is_as_likely_as_told():
    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    red = Image.new("RGB", (1, 1), (200, 50, 50))
    alone = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0}
    for name, image, amount in (
        ("brightness", grey, 32.0), ("contrast", grey, 0.5), ("saturation", red, 0.5),
        ("hue", red, 18),
    ):  # fmt: skip
        some = Distortion(share=0.5, **(alone | {name: amount}))
        changed = sum(
            some(image, random.Random(seed)).getpixel((0, 0)) != image.getpixel((0, 0))
            for seed in range(400)
        )
        assert 160 < changed < 240, name
        never = Distortion(share=0.0, **NUMBERS)
        assert never(image, random.Random(3)).getpixel((0, 0)) == image.getpixel((0, 0))


def test_evaluation_resizes_the_image_alone():
    image, _ = ramp(60, 90)
    views = SegmentationEvalTransform(short_side=(32, 40), max_aspect=4.0)
    found = views(image)
    assert (found.shape, found.dtype) == ((3, 32, 48), torch.uint8)
    resized = np.asarray(image.resize((48, 32), Image.Resampling.BILINEAR))
    assert found.permute(1, 2, 0).numpy().tolist() == resized.tolist()
    long, _ = ramp(20, 200)
    assert views(long).shape == (3, 13, 128)
    original = SegmentationEvalTransform(short_side="original")(image)
    assert original.permute(1, 2, 0).numpy().tolist() == np.asarray(image).tolist()
    assert "original" in repr(SegmentationEvalTransform(short_side="original"))
    assert "(128, 32)" in repr(views)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_scale": 0.0}, "scale 0.0..2.0: expected 0 < min"),
        ({"max_scale": 0.4}, "scale 0.5..0.4"),
        ({"max_scale": 99.0}, "max <= 16"),
        ({"max_aspect": 0.5}, "max_aspect 0.5: expected at least 1"),
        ({"max_class_share": 1.5}, r"max_class_share 1.5: must lie in \[0, 1\]"),
        ({"flip": -1}, r"flip -1: must lie"),
        ({"distort": 2.0}, "distort 2.0: must lie"),
        ({"hue": 91}, "hue 91: expected at most 90"),
        ({"contrast": 1.5}, "contrast 1.5"),
        ({"interpolation": "cubic"}, "interpolation 'cubic'"),
        ({"short_side": 0}, "expected one number or"),
        ({"mean": [0.5]}, "expected three numbers"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        transform(**changes)


def test_the_numbers_stand_in_the_log():
    told = repr(transform(distort=0.25))
    for word in ("24x40", "(112, 28)", "0.5..2", "0.75", "share=0.25", "hue=18"):
        assert word in told
    assert isinstance(Draws((1, 1), False, CropBox(0, 0, 1, 1)), tuple)
