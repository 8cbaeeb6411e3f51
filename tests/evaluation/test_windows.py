"""Windows against literal loops over whole pictures, in which nothing is done in bands."""

import pytest
import torch
import torch.nn.functional as F

from beit.errors import UserError
from beit.evaluation import windows as rooms
from beit.evaluation.resizing import resized_rows, source_rows
from beit.evaluation.windows import MultiScale, SlidingWindow, WholeImage, offsets

K = 5


class Network:
    """A fixed convolution of stride 4 with 5 classes, which looks beyond single pixels."""

    def __init__(self, stride=4):
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(K, 3, stride + 3, stride + 3, generator=generator)
        self.stride, self.batches = stride, []

    def __call__(self, images):
        self.batches.append(tuple(images.shape))
        return F.conv2d(images, self.weight, stride=self.stride, padding=2)


def photograph(height, width, seed=7):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def bilinear(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def literal_slide(network, image, window, stride, size):
    """mmsegmentation's slide_inference of one image, window by window, at full size."""
    (ch, cw), (sh, sw) = window, stride
    h, w = image.shape[1:]
    image = F.pad(image, (0, max(0, cw - w), 0, max(0, ch - h)))
    ph, pw = image.shape[1:]
    total, count = torch.zeros(1, K, ph, pw), torch.zeros(1, 1, ph, pw)
    for i in range(max(ph - ch + sh - 1, 0) // sh + 1):
        for j in range(max(pw - cw + sw - 1, 0) // sw + 1):
            y2, x2 = min(i * sh + ch, ph), min(j * sw + cw, pw)
            y1, x1 = max(y2 - ch, 0), max(x2 - cw, 0)
            logits = bilinear(network(image[None, :, y1:y2, x1:x2]), (ch, cw))
            total += F.pad(logits, (x1, pw - x2, y1, ph - y2))
            count[:, :, y1:y2, x1:x2] += 1
    assert count.min() > 0
    return bilinear((total / count)[:, :, :h, :w], size)[0]


def whole(inference, network, image, size):
    return torch.cat(list(inference.scores(network, image, size)), dim=1)


def assert_same_ids(ids, scores):
    """The same classes, but where the two best are as good as equal."""
    best = scores.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(ids.long()[clear], best.indices[0][clear])
    assert ids.dtype == torch.int16


CASES = [  # image, original size, window, stride, windows per pass
    ((61, 83), (61, 83), (24, 40), (16, 26), 3),
    ((61, 83), (103, 141), (24, 40), (16, 26), 1),
    ((61, 83), (33, 29), (24, 40), (24, 40), 100),
    ((24, 40), (47, 53), (24, 40), (16, 26), 2),  # one window
    ((17, 83), (17, 83), (24, 40), (7, 11), 4),  # lower than a window
    ((17, 31), (19, 67), (24, 40), (16, 26), 4),  # smaller than a window
]


@pytest.mark.parametrize("band_bytes", [1, 9_999, 2**26])
@pytest.mark.parametrize(("shape", "size", "window", "stride", "per_pass"), CASES)
def test_sliding_equals_the_literal_loop(
    monkeypatch, band_bytes, shape, size, window, stride, per_pass
):
    monkeypatch.setattr(rooms, "BAND_BYTES", band_bytes)
    network, image = Network(), photograph(*shape)
    slide = SlidingWindow(window, stride=stride, windows_per_pass=per_pass)
    expected = literal_slide(Network(), image, window, stride, size)
    found = whole(slide, network, image, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert all(shape[0] <= per_pass for shape in network.batches)
    assert all(shape[2:] == window for shape in network.batches)
    assert_same_ids(slide(network, image, size), expected)


def test_every_window_is_seen_once(monkeypatch):
    monkeypatch.setattr(rooms, "BAND_BYTES", 1)
    network = Network()
    slide = SlidingWindow((24, 40), stride=(16, 26), windows_per_pass=2)
    slide(network, photograph(61, 83), (103, 141))
    rows, columns = len(offsets(61, 24, 16)), len(offsets(83, 40, 26))
    assert sum(shape[0] for shape in network.batches) == rows * columns


def test_offsets_by_hand():
    assert offsets(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]
    assert offsets(512, 512, 341) == [0]
    assert offsets(513, 512, 341) == [0, 1]
    assert offsets(512 + 341, 512, 341) == [0, 341]


def test_whole_image_is_the_window_where_one_covers_it():
    image, size = photograph(24, 40), (47, 53)
    slide = SlidingWindow((24, 40), stride=(16, 26), windows_per_pass=1)
    one = whole(slide, Network(), image, size)
    assert torch.equal(whole(WholeImage(8), Network(), image, size), one)


def test_whole_image_is_padded_to_the_patch():
    image, size = photograph(21, 37), (21, 37)
    network = Network()
    found = whole(WholeImage(8), network, image, size)
    assert network.batches == [(1, 3, 24, 40)]
    padded = F.pad(image, (0, 3, 0, 3))[None]
    expected = bilinear(Network()(padded), (24, 40))[0, :, :21, :37]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("band_bytes", [1, 2**26])
@pytest.mark.parametrize("short_side", ["original", 30])
def test_several_scales_equal_the_literal_mean(monkeypatch, band_bytes, short_side):
    monkeypatch.setattr(rooms, "BAND_BYTES", band_bytes)
    window, stride, size, ratios = (24, 24), (16, 16), (67, 95), (0.5, 1.0, 1.75)
    image = photograph(41, 59)
    scales = MultiScale(
        window, stride=stride, windows_per_pass=3, short_side=short_side, ratios=ratios, flip=True
    )
    base = 41 if short_side == "original" else short_side
    total = torch.zeros(K, *size)
    for ratio in ratios:
        short = max(24, ratio * base)
        new = int(41 * short / 41 + 0.5), int(59 * short / 41 + 0.5)
        options = {"mode": "bilinear", "align_corners": False, "antialias": True}
        view = image if new == (41, 59) else F.interpolate(image[None], size=new, **options)[0]
        for mirrored in (False, True):
            seen = view.flip(-1) if mirrored else view
            scores = literal_slide(Network(), seen, window, stride, size).softmax(dim=0)
            total += scores.flip(-1) if mirrored else scores
    found = whole(scales, Network(), image, size)
    torch.testing.assert_close(found, total / 6, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(size))


def test_small_scales_are_lifted_to_the_window():
    scales = MultiScale(
        512, stride=341, windows_per_pass=1, short_side="original", flip=False,
        ratios=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    )  # fmt: skip
    assert scales.sizes(512, 683) == [
        (512, 683), (512, 683), (512, 683), (640, 854), (768, 1025), (896, 1195)
    ]  # fmt: skip


def test_rows_of_a_resize_are_those_of_the_whole():
    picture = photograph(13, 11)
    for target in [(13, 11), (29, 23), (7, 11), (13, 5), (1, 1)]:
        expected = bilinear(picture[None], target)[0]
        for begin in range(target[0]):
            for end in range(begin + 1, target[0] + 1):
                first, after = source_rows(begin, end, height=13, target=target[0])
                found = resized_rows(
                    picture[:, first:after], first, begin, end, height=13, target=target
                )
                torch.testing.assert_close(found, expected[:, begin:end], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SlidingWindow(24, stride=25, windows_per_pass=1), "leaves gaps"),
        (lambda: SlidingWindow(24, stride=16, windows_per_pass=0), "windows_per_pass 0"),
        (lambda: WholeImage(0), "multiple 0"),
        (
            lambda: MultiScale(
                24, stride=9, windows_per_pass=1, short_side=9, ratios=[], flip=True
            ),
            "at least one",
        ),
        (
            lambda: MultiScale(
                24, stride=9, windows_per_pass=1, short_side=0, ratios=[1], flip=True
            ),
            "short_side 0",
        ),
    ],
)
def test_impossible_settings_are_refused(build, words):
    with pytest.raises(UserError, match=words):
        build()
