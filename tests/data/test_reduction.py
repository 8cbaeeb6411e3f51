"""Scaled JPEG decoding: the same draws and place, nearly the same pixels, the same caution."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_sample_images

from beit import config
from beit.data import images, opening
from beit.data.dataset import KeyedDataset, TrainLabelledSample, TwoViewSample
from beit.data.fast_views import FastTwoViewTransform
from beit.data.images import LazyJpeg, UnreadableImage, open_lazily, open_rgb
from beit.data.masking import BlockwiseMasking
from beit.data.pixels import CropBox
from beit.data.reduction import part, reduction
from beit.data.sources import ClassFolder, FlatFolder, ParquetSource, Subset, opened
from beit.data.views import TrainTransform, TwoViewTransform

SIZES = {"image_size": (24, 40), "token_image_size": (12, 20)}
KINDS = [TwoViewTransform, FastTwoViewTransform]
ORIENTATIONS = range(1, 9)
# upright pixels -> as they are stored
STORED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: np.rot90,
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 95} | options))
    return buffer.getvalue()


def turned(image, orientation, **options):
    """A JPEG whose upright pixels are the image's."""
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(image))))
    exif = stored.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(stored, exif=exif, **options)


def ramp(width, height):
    """Red tells the column and green the row."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 250 / width, y * 250 / height, 0 * x + 99], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.fixture(scope="module")
def photograph():
    """640x427, as a JPEG."""
    return encoded(Image.fromarray(load_sample_images().images[0]))


def test_the_largest_reduction_that_leaves_enough_pixels():
    for box, by in (
        ((448, 448), 2), ((447, 448), 1), ((448, 447), 1), ((895, 5000), 2), ((896, 896), 4),
        ((1791, 1791), 4), ((1792, 1792), 8), ((9999, 9999), 8), ((3, 3), 1),
    ):  # fmt: skip
        assert reduction(CropBox(5, 7, *box), (224, 224), (112, 112)) == by
    assert reduction(CropBox(0, 0, 100, 100), (24, 50), (50, 20)) == 2  # each direction by itself
    assert reduction(CropBox(0, 0, 100, 100), (24, 51)) == 1


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_upright_size_is_known_from_the_header(orientation, monkeypatch):
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("its pixels were asked for"))
    assert open_lazily(turned(ramp(53, 31), orientation), "x").size == (53, 31)


@pytest.mark.parametrize("by", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}])
def test_reduced_pixels_are_those_of_pillows_draft(by, mode, options):
    data = encoded(ramp(101, 67).convert(mode), **options)
    with Image.open(io.BytesIO(data)) as expected:
        expected.draft(None, (101 // by, 67 // by))
        expected.load()
    found = open_lazily(data, "x").read(by)
    assert found.size == (-(-101 // by), -(-67 // by))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected.convert("RGB")))
    # and it is the picture: blocks of the whole one
    whole = np.asarray(open_rgb(data, "x"), dtype=float)[: 64 // by * by, : 96 // by * by]
    blocks = whole.reshape(64 // by, by, 96 // by, by, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(found)[: 64 // by, : 96 // by] - blocks).mean() < 2


@pytest.mark.parametrize("by", [2, 4, 8])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_crop_lies_where_it_lay(orientation, mirrored, by):
    """To half a pixel of the full image, in whose ramp a pixel is a level.

    No reduction divides its sides: a block counted from the wrong corner is 1 to 5 pixels off.
    """
    image, box = ramp(253, 235), CropBox(top=31, left=18, height=170, width=203)
    data = turned(image, orientation, subsampling="4:4:4")
    seen = ImageOps.mirror(image) if mirrored else image
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    expected = np.asarray(seen.resize((20, 16), Image.Resampling.BICUBIC, corners), dtype=float)
    taken = part(open_lazily(data, "x"), box, mirrored, reduced_by=by)
    assert taken.image.size == (-(-253 // by), -(-235 // by))
    whole = ImageOps.mirror(taken.image) if mirrored else taken.image
    left, top = taken.box.left, taken.box.top
    cut = whole.crop((left, top, left + taken.box.width, top + taken.box.height))
    found = np.asarray(cut.resize((20, 16), Image.Resampling.BICUBIC, taken.inside), dtype=float)
    inner = (found - expected)[3:-3, 3:-3]  # a filter sees an edge where the crop was cut
    assert np.abs(inner.mean(axis=(0, 1))).max() < 0.45


@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_are_the_same(kind, photograph):
    """In pixels of the full image, and as many of them."""
    whole, scaled = kind(**SIZES), kind(**SIZES, scaled_decoding=True)
    image = open_rgb(photograph, "x")
    for seed in range(50):
        first, second = random.Random(seed), random.Random(seed)
        assert scaled._draw(open_lazily(photograph, "x"), first) == whole._draw(image, second)
        assert first.getstate() == second.getstate()
    first, second = random.Random(3), random.Random(3)
    scaled(open_lazily(photograph, "x"), first)
    whole(image, second)
    assert first.getstate() == second.getstate()


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_nothing_differs(kind, photograph):
    image = open_rgb(photograph, "x")
    for seed in range(8):
        expected = kind(**SIZES)(image, random.Random(seed))
        for transform, given in (
            (kind(**SIZES), open_lazily(photograph, "x")),
            (kind(**SIZES, scaled_decoding=True), image),  # it has been read
        ):
            found = transform(given, random.Random(seed))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_switched_on_pixels_differ_a_little(kind, photograph):
    """Real detail, read at 1/2 to 1/8: from Pillow's full decoding and the same box."""
    differences, reduced = [], 0
    for seed in range(30):
        lazy = open_lazily(photograph, "x")
        found = kind(**SIZES, scaled_decoding=True)(lazy, random.Random(seed))
        expected = kind(**SIZES)(open_rgb(photograph, "x"), random.Random(seed))
        both = list(zip(found, expected, strict=True))
        differences += [(a.float() - b.float()).abs().mean().item() for a, b in both]
        reduced += any(not torch.equal(a, b) for a, b in both)
    assert reduced > 25
    assert np.mean(differences) < 2.2
    assert max(differences) < 8


@pytest.mark.parametrize("kind", KINDS)
def test_each_view_is_the_same_without_the_other(kind, photograph):
    """Though the tokenizer's, half as large, would bear twice the reduction."""
    transform = kind(**SIZES, scaled_decoding=True)
    for seed in range(10):
        both = transform(open_lazily(photograph, "x"), random.Random(seed))
        first, _ = transform(open_lazily(photograph, "x"), random.Random(seed), token_view=False)
        second = transform.token_view(open_lazily(photograph, "x"), random.Random(seed))
        assert torch.equal(first, both[0])
        assert torch.equal(second, both[1])


@pytest.mark.parametrize("kind", KINDS)
def test_its_repr_tells_it_apart(kind):
    off, on = repr(kind(**SIZES)), repr(kind(**SIZES, scaled_decoding=True))
    assert "scaled" not in off  # as caches that were made before have it
    assert on == f"{off[:-1]}, scaled_decoding=True)"


def readable(data, by):
    try:
        open_lazily(data, "x").read(by)
    except UnreadableImage:
        return False
    return True


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_what_is_broken_is_broken_at_any_size(options, photograph):
    data = encoded(open_rgb(photograph, "x").crop((0, 0, 203, 101)), **options)
    rng = random.Random(1)
    for _ in range(40):
        end = rng.randrange(700, len(data) - 40)
        assert [readable(data[:end], by) for by in (1, 2, 4, 8)] == [False] * 4
    for _ in range(80):
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 3, 30))):
            flipped[rng.randrange(2, len(data))] = rng.randrange(256)
        assert len({readable(bytes(flipped), by) for by in (1, 2, 4, 8)}) == 1


def test_limits_hold_before_anything_is_decoded(monkeypatch, photograph):
    monkeypatch.setattr(opening, "MAX_PIXELS", 640 * 427 - 1)
    with pytest.raises(UnreadableImage, match="640x427 pixels exceed the limit"):
        open_lazily(photograph, "x")
    with pytest.raises(UnreadableImage, match="no image of a known format"):
        open_lazily(b"<html>", "x")
    with pytest.raises(UnreadableImage, match="No such file"):
        open_lazily("none.jpg", "x")


@pytest.fixture
def folder(tmp_path, photograph):
    """Class folders of four JPEGs, the second of which is cut short, and a PNG."""
    image = open_rgb(photograph, "x")
    for number in range(4):
        path = tmp_path / "data" / "ab"[number // 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part_of = encoded(image.crop((number * 30, 0, number * 30 + 500, 400)))
        path.write_bytes(part_of[: len(part_of) // 2] if number == 1 else part_of)
    image.save(tmp_path / "data" / "b" / "4.png")
    return tmp_path / "data"


def test_sources_open_what_they_load(folder, tmp_path):
    from datasets import Dataset

    files = [*sorted(folder.glob("*/*.jpg")), folder / "b" / "4.png"]
    rows = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], "label": [*range(5)]}
    (tmp_path / "pack").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "pack" / "train.parquet")
    plain, kinds = ClassFolder(folder), []
    for source in (
        plain,
        FlatFolder(folder),
        ParquetSource(tmp_path / "pack", "train"),
        Subset(plain, count=5, seed=1),
    ):
        for index in range(5):
            image, label = opened(source, index)
            expected = _outcome(lambda source=source, index=index: source.load(index)[0])
            lazy = isinstance(image, LazyJpeg)
            assert _outcome(image.read if lazy else lambda image=image: image) == expected
            assert label == (None if source.labels is None else source.labels[index])
            kinds.append("lazy" if lazy else "read")
    assert (kinds.count("lazy"), kinds.count("read")) == (4 * 4, 4)


def _outcome(read):
    """The pixels, or why there are none."""
    try:
        return read().tobytes()
    except UnreadableImage as error:
        return str(error)


def test_a_source_that_opens_nothing_loads():
    class Plain:
        classes = labels = None

        def load(self, index):
            return Image.new("RGB", (3, 5)), index

    assert opened(Plain(), 7)[1] == 7
    assert opened(Plain(), 7)[0].size == (3, 5)


def samples(folder, *, scaled):
    views = FastTwoViewTransform(**SIZES, scaled_decoding=scaled)
    source = ClassFolder(folder)
    yield KeyedDataset(source, TwoViewSample(views, BlockwiseMasking((3, 5))), seed=3)
    transform = TrainTransform(
        image_size=(24, 40), mean=(0.5,) * 3, std=(0.5,) * 3, scaled_decoding=scaled,
        auto_augment=None, random_erasing=0.0,
    )  # fmt: skip
    yield KeyedDataset(source, TrainLabelledSample(transform), seed=3)


def test_another_stands_in_for_what_is_found_broken_later(folder):
    for whole, scaled in zip(
        samples(folder, scaled=False), samples(folder, scaled=True), strict=True
    ):
        read = []
        scaled.reading = read.append
        for epoch in range(3):
            expected, found = whole[epoch, 1], scaled[epoch, 1]
            assert found.failed == 1
            assert (found.index, found.reason) == (expected.index, expected.reason)
            assert "truncated" in found.reason
            assert read[:1] == [1]
            assert read[-1] == found.index
            # the draws of the sample, the pixels of the other image
            a, b = found.tensors[0].float(), expected.tensors[0].float()
            assert (a - b).abs().mean() < 0.05 * (b.max() - b.min())


def test_a_classifiers_crops_are_drawn_as_timm_draws_them(photograph):
    image = open_rgb(photograph, "x")
    plain = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "random_erasing": 0.0}
    for size in ((300, 330), (24, 40)):
        for changes in ({"auto_augment": None, "color_jitter": 0.0}, {}):
            whole = TrainTransform(image_size=size, **plain, **changes)
            scaled = TrainTransform(image_size=size, **plain, **changes, scaled_decoding=True)
            differences = []
            for index in range(12):
                expected, found = whole(image, 1, 2, index), scaled(image, 1, 2, index)
                assert torch.equal(found, expected)
                found = scaled(open_lazily(photograph, "x"), 1, 2, index)
                differences.append((found - expected).abs().mean().item())
            if size == (300, 330):  # too large for any reduction
                assert not any(differences)
            else:  # RandAugment may make more of a difference
                assert 0 < np.mean(differences) < (6 if changes == {} else 2)


def test_a_small_classifier_reads_whole_images():
    small = TrainTransform(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, scaled_decoding=True)
    assert not small.scaled_decoding
    assert "scaled" not in repr(small)
    large = TrainTransform(image_size=40, mean=(0.5,) * 3, std=(0.5,) * 3, scaled_decoding=True)
    assert "scaled decoding" in repr(large)


def test_by_default_the_fast_views_alone_are_scaled():
    for views, expected in (("two_view", False), ("two_view_fast", True)):
        cfg = config.compose(["experiment=pretrain/base_300ep", f"views={views}"])
        assert cfg.views.scaled_decoding is expected
    cfg = config.compose(["experiment=finetune/base_pt22k"])
    assert cfg.views.train.scaled_decoding is False
    assert "scaled_decoding" not in cfg.views.eval
