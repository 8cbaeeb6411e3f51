import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from beit.data.pixels import CropBox, draw_crop, jittered_crop
from beit.data.views import EvalTransform, PixelTransform, TrainTransform, TwoViewTransform
from beit.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width, height):
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, 127 + 100 * np.sin(x / 9)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def two_views(**changes):
    return TwoViewTransform(**({"image_size": (24, 40), "token_image_size": (12, 20)} | changes))


ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
}
ORDERS = [
    ("brightness", "contrast", "saturation"),
    ("contrast", "saturation", "brightness"),
    ("saturation", "brightness", "contrast"),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_jitter_then_mirror_then_crop_equals_torchvision(order, mirrored):
    jitter = list(zip(order, (0.61, 1.37, 1.18), strict=True))
    box = CropBox(top=5, left=3, height=17, width=23)
    image = expected = smooth(61, 43)
    for name, factor in jitter:
        expected = ADJUST[name](expected, factor)
    if mirrored:
        expected = F.hflip(expected)
    expected = F.crop(expected, *box)
    result = jittered_crop(image, jitter, box, mirrored)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_both_views_are_torchvisions_resizes_of_one_crop(monkeypatch):
    box = CropBox(top=2, left=9, height=30, width=41)
    monkeypatch.setattr("beit.data.views.draw_crop", lambda *args: box)
    image = smooth(97, 53)
    view, token_view = two_views(color_jitter=0.0, flip=0.0)(image, random.Random(0))
    for result, size, mode in (
        (view, (24, 40), transforms.InterpolationMode.BICUBIC),
        (token_view, (12, 20), transforms.InterpolationMode.LANCZOS),
    ):
        expected = F.pil_to_tensor(F.resized_crop(image, *box, size, mode))
        assert result.dtype == torch.uint8
        assert torch.equal(result, expected)


def test_both_views_show_the_same_place():
    image = smooth(97, 53)  # colour is a code of the place
    transform = two_views()
    for seed in range(20):
        view, token_view = transform(image, random.Random(seed))
        small = torch.nn.functional.avg_pool2d(view.float(), 2)
        assert (small - token_view.float()).abs().mean() < 3.0


def test_crop_boxes_lie_inside_with_published_scales_and_aspects():
    rng, shares, aspects = random.Random(0), [], []
    for _ in range(4000):
        top, left, height, width = draw_crop(rng, (300, 260), (0.08, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top <= 260 - height
        assert 0 <= left <= 300 - width
        shares.append(height * width / (300 * 260))
        aspects.append(width / height)
    assert min(shares) == pytest.approx(0.08, abs=0.01)
    assert max(shares) <= 1.0
    assert min(aspects) > 0.73
    assert max(aspects) < 1.37
    torch.manual_seed(0)
    theirs = [
        transforms.RandomResizedCrop.get_params(
            torch.empty(3, 260, 300), [0.08, 1.0], [3 / 4, 4 / 3]
        )
        for _ in range(4000)
    ]
    expected = np.mean([h * w / (300 * 260) for _, _, h, w in theirs])
    assert np.mean(shares) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1), (1, 500), (499, 1)])
def test_extreme_shapes_fall_back_to_the_centre_as_torchvision(size):
    box = draw_crop(random.Random(0), size, (1.0, 1.0), (3 / 4, 4 / 3))
    image = torch.empty(3, size[1], size[0])
    expected = transforms.RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])
    assert tuple(box) == tuple(expected)
    view, token_view = two_views()(noise(*size), random.Random(0))
    assert view.shape == (3, 24, 40)
    assert token_view.shape == (3, 12, 20)


def test_two_views_depend_on_the_generator_alone():
    transform, image = two_views(), noise(50, 40)
    random.seed(0), torch.manual_seed(0)
    first = transform(image, random.Random(3))
    random.seed(9), torch.manual_seed(9)
    again = transform(image, random.Random(3))
    other = transform(image, random.Random(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_flip_and_jitter_switches():
    image = smooth(40, 24)
    whole = {"min_scale": 1.0, "min_ratio": 5 / 3, "max_ratio": 5 / 3, "color_jitter": 0.0}
    plain, _ = two_views(flip=0.0, **whole)(image, random.Random(0))
    mirrored, _ = two_views(flip=1.0, **whole)(image, random.Random(0))
    assert torch.equal(plain, F.pil_to_tensor(image))
    assert torch.equal(mirrored, plain.flip(-1))


def test_pixel_transform_is_one_crop():
    transform = PixelTransform(image_size=(24, 40), min_scale=0.3)
    pixels = transform(noise(70, 50), random.Random(0))
    assert pixels.shape == (3, 24, 40)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, transform(noise(70, 50), random.Random(0)))


@pytest.mark.parametrize(("width", "height"), [(300, 260), (260, 300), (100, 90), (224, 224)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_eval_transform_equals_torchvision(width, height, crop_pct):
    expected = transforms.Compose(
        [
            transforms.Resize(int(48 / crop_pct), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(48),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )(smooth(width, height))
    result = EvalTransform(image_size=48, mean=MEAN, std=STD, crop_pct=crop_pct)(
        smooth(width, height)
    )
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("image_size", "crop_pct"),
    [(32, 1.0), ((24, 32), 1.0), (40, 0.875), (224, 0.875), (376, 0.875), (384, 1.0), (512, 1.0)],
)
def test_automatic_crop_share_is_the_released_rule(image_size, crop_pct):
    options = {"image_size": image_size, "mean": MEAN, "std": STD}
    image = smooth(61, 43)
    automatic = EvalTransform(**options, crop_pct="auto")
    assert automatic.crop_pct == crop_pct
    assert torch.equal(automatic(image), EvalTransform(**options, crop_pct=crop_pct)(image))
    for wrong in (0.0, 1.1, "whole", None):
        with pytest.raises(UserError, match=f"crop_pct {wrong!r}: .*auto"):
            EvalTransform(**options, crop_pct=wrong)


def test_eval_transform_leaves_small_images_of_the_right_size_alone():
    transform = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD, crop_pct=1.0)
    image = noise(32, 24)
    expected = F.normalize(F.to_tensor(image), MEAN, STD)
    torch.testing.assert_close(transform(image), expected, atol=1e-5, rtol=0)
    assert transform(noise(97, 31)).shape == (3, 24, 32)


@pytest.mark.parametrize("size", [(24, 40), (24, 32)])
def test_train_transform_is_a_function_of_the_key(size):
    transform = TrainTransform(image_size=size, mean=MEAN, std=STD)
    image = noise(70, 50)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    first = transform(image, 1, 2, 3)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert first.shape == (3, *size)
    assert first.dtype == torch.float32
    assert torch.equal(transform(image, 1, 2, 3), first)
    assert not torch.equal(transform(image, 1, 3, 3), first)
    assert not torch.equal(transform(image, 1, 2, 4), first)


def test_train_transform_small_images_are_padded_and_shifted():
    plain = {"auto_augment": None, "color_jitter": 0.0, "random_erasing": 0.0, "flip": 0.0}
    transform = TrainTransform(image_size=24, mean=MEAN, std=STD, **plain)
    image = noise(24, 24)
    padded = F.pad(F.normalize(F.to_tensor(image), [0] * 3, [1] * 3), [4] * 4)
    padded = F.normalize(padded, MEAN, STD)
    shifts = [padded[:, y : y + 24, x : x + 24] for y in range(9) for x in range(9)]
    for index in range(10):
        result = transform(image, 0, 0, index)
        assert any(torch.allclose(result, shift, atol=1e-5) for shift in shifts)


def test_randaugments_highest_level_leaves_a_picture():
    # posterizing to no bits at all is an error in Pillow 13, and reached only now and then
    highest = {"auto_augment": "rand-m10-n2-inc1", "color_jitter": 0.0, "random_erasing": 0.0}
    transform = TrainTransform(image_size=24, mean=(0, 0, 0), std=(1, 1, 1), **highest)
    for index in range(200):
        assert transform(noise(24, 24), 0, 0, index).max() > 0


def test_train_transform_prints_its_recipe():
    text = repr(TrainTransform(image_size=224, mean=MEAN, std=STD))
    for word in ("RandAugment", "RandomResizedCrop", "0.08", "RandomErasing", "0.25"):
        assert word in text
    assert "RandAugment(rand-m9-mstd0.5-inc1)" in text
    assert "ColorJitter" not in text  # RandAugment takes its place
    assert "\n" not in text
    for policy in ("rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m5-w4-d2", None):
        text = repr(TrainTransform(image_size=224, mean=MEAN, std=STD, auto_augment=policy))
        assert len(text) < 500
        assert policy is None or policy in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_augment": "rond-m9"}, "auto_augment 'rond-m9': expected rand-m9-mstd0.5-inc1"),
        ({"auto_augment": "rand-magnitude9"}, "auto_augment 'rand-magnitude9'"),
        ({"auto_augment": "rand-m9-tother"}, "auto_augment 'rand-m9-tother'"),
        ({"auto_augment": "v1"}, "auto_augment 'v1'"),
        ({"auto_augment": 9}, "auto_augment 9"),
        ({"auto_augment": None, "color_jitter": -0.1}, "color_jitter -0.1"),
        ({"auto_augment": None, "color_jitter": "much"}, "color_jitter 'much': expected a number"),
        ({"small_crop_padding": -1}, "small_crop_padding -1"),
        ({"interpolation": ["bicubic"]}, "interpolation"),
    ],
)
def test_wrong_training_augmentation_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        TrainTransform(**({"image_size": 24, "mean": MEAN, "std": STD} | change))


def test_repr_prints_the_numbers():
    text = repr(two_views())
    for word in ("24x40 bicubic", "12x20 lanczos", "0.08..1", "color_jitter=0.4", "flip=0.5"):
        assert word in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_scale": 0.0}, "crop scale 0.0"),
        ({"max_scale": 1.5}, "crop scale"),
        ({"flip": 1.5}, "flip 1.5"),
        ({"color_jitter": -0.1}, "color_jitter -0.1"),
        ({"image_interpolation": "cubic"}, "interpolation 'cubic'.*bicubic"),
        ({"image_size": 0}, "image_size 0: "),
        ({"flip": "half"}, "flip 'half': expected a number"),
        ({"min_scale": "small"}, "min_scale 'small': expected a number"),
        ({"max_ratio": None}, "max_ratio None: expected a number"),
        ({"token_interpolation": 3}, "interpolation 3"),
    ],
)
def test_wrong_numbers_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        two_views(**change)
