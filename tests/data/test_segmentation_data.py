import logging
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit.data.batches import SegmentationBatch
from beit.data.class_shares import ClassShares, PixelCounts, count_pixels
from beit.data.images import UnreadableImage
from beit.data.label_maps import LabelIds
from beit.data.loading import LoaderSettings
from beit.data.segmentation import SegmentationData, collate_lists
from beit.data.segmentation_views import SegmentationEvalTransform, SegmentationTrainTransform
from beit.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ["paper", "ink", "blot"]


class Pairs:
    """Noise images of several sizes with label maps; those in `broken` cannot be read."""

    labels = None

    def __init__(self, count, *, broken=(), ids=None, wrong=()):
        self.count, self.broken, self.wrong = count, set(broken), set(wrong)
        self.ids = ids or LabelIds(NAMES)
        self.classes = self.ids.classes

    def __len__(self):
        return self.count

    def size(self, index):
        return 30 + index % 5, 50 + index % 7

    def load(self, index):
        if index in self.broken:
            raise UnreadableImage(self.name(index), "torn")
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 256, (*self.size(index), 3), dtype=np.uint8)
        return Image.fromarray(pixels), self.label_map(index)

    def values(self, index):
        """A third of class 0, 0 to 2 in noise below, a row that is ignored; never blots in 0."""
        rng = np.random.default_rng(1000 + index)
        height, width = self.size(index)
        values = rng.integers(0, 3 if index else 2, (height, width))
        values[: height // 3] = 0
        values[-1] = 255
        return values

    def label_map(self, index):
        if index in self.broken:
            raise UnreadableImage(self.name(index), "torn")
        values = self.values(index)
        if index in self.wrong:
            values[5, 5] = 7
        return self.ids(values, self.name(index))

    def name(self, index):
        return f"pair {index}"


def settings(**changes):
    options = {
        "global_batch_size": 7, "batch_size_per_device": 7, "num_workers": 0, "seed": 3,
        "max_unreadable_images": 2, "check_images": 5,
    }  # fmt: skip
    return LoaderSettings(**(options | changes))


def data(train=None, val=None, **changes):
    options = {
        "train_transform": SegmentationTrainTransform(
            image_size=(24, 40), short_side=28, mean=MEAN
        ),
        "eval_transform": SegmentationEvalTransform(short_side=24),
        "num_classes": "auto", "mean": MEAN, "std": STD, "loader": settings(),
    }  # fmt: skip
    return SegmentationData(train or Pairs(30), val, **(options | changes))


class Recorder(L.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(module, tmp_path, *, stage="fit", **changes):
    options = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False,
        "enable_model_summary": False, "use_distributed_sampler": False,
        "num_sanity_val_steps": 0, "default_root_dir": tmp_path,
    }  # fmt: skip
    recorder, trainer = Recorder(), L.Trainer(**(options | changes))
    getattr(trainer, stage)(recorder, datamodule=module)
    return recorder


def test_batches_of_training_and_of_validation(tmp_path):
    source = Pairs(10)
    module = data(val=source)
    assert (module.classes, module.num_classes) == (NAMES, 3)
    assert module.palette.tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    recorder = run(module, tmp_path)
    assert len(recorder.train_batches) == 4
    for batch in recorder.train_batches:
        assert isinstance(batch, SegmentationBatch)
        assert (batch.images.shape, batch.images.dtype) == ((7, 3, 24, 40), torch.float32)
        assert (batch.labels.shape, batch.labels.dtype) == ((7, 24, 40), torch.int64)
        assert batch.labels.min() >= -1
        assert batch.labels.max() <= 2
    seen = {}
    for batch in recorder.val_batches:
        for image, labels, index in zip(batch.images, batch.labels, batch.indices.tolist()):
            seen[index] = image, labels
    assert sorted(seen) == list(range(10))
    for index, (image, labels) in seen.items():
        picture, expected = source.load(index)
        assert labels.dtype == torch.int64
        assert labels.tolist() == expected.tolist()
        height, width = source.size(index)
        size = 24, int(width * 24 / height + 0.5)
        assert image.shape == (3, *size)
        resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)) / 255
        expected = torch.from_numpy((resized - MEAN) / STD).permute(2, 0, 1)
        torch.testing.assert_close(image, expected.float(), rtol=1e-5, atol=1e-5)


def test_padding_is_nothing_after_the_normalisation(tmp_path):
    views = SegmentationTrainTransform(image_size=(24, 40), short_side=10, max_scale=1, mean=MEAN)
    (batch, *_) = run(data(train_transform=views), tmp_path).train_batches
    padding = batch.images[:, :, -1]
    assert padding.abs().max() < 0.5 / 255 / min(STD)
    assert (batch.labels[:, -1] == -1).all()
    assert (batch.labels[:, 0, 0] == 0).all()


def crops(tmp_path, *, workers, seed=3, **changes):
    """index -> its images and labels in two epochs, as bytes."""
    loader = settings(num_workers=workers, seed=seed)
    module = data(loader=loader, **changes)
    recorder = run(module, tmp_path, max_epochs=2)
    found = {}
    for number, batch in enumerate(recorder.train_batches):
        for image, labels, index in zip(batch.images, batch.labels, batch.indices.tolist()):
            found[number // 4, index] = image.numpy().tobytes(), labels.numpy().tobytes()
    return found


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    alone, shared = (crops(tmp_path, workers=workers) for workers in (0, 2))
    assert alone == shared
    assert len(alone) == 56
    twice = [(alone[0, index], alone[1, index]) for index in range(30) if (1, index) in alone and
             (0, index) in alone]  # fmt: skip
    assert all(first != second for first, second in twice)
    other = crops(tmp_path, workers=0, seed=4)
    assert all(alone[key] != other[key] for key in alone.keys() & other.keys())
    # colours and crops are drawn apart
    grey = SegmentationTrainTransform(image_size=(24, 40), short_side=28, mean=MEAN, distort=0)
    plain = crops(tmp_path, workers=0, train_transform=grey)
    assert all(alone[key][1] == plain[key][1] for key in alone)
    assert sum(alone[key][0] != plain[key][0] for key in alone) > 40


def test_unreadable_pairs(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "beit"):
        recorder = run(data(Pairs(30, broken=[4]), Pairs(10, broken=[3])), tmp_path)
    stood_in = [index for batch in recorder.train_batches for index in batch.failed.tolist()]
    assert set(stood_in) <= {-1, 4}
    seen = torch.cat([batch.indices for batch in recorder.val_batches])
    assert sorted(seen.tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert sum(len(batch.images) for batch in recorder.val_batches) == 9
    assert any("unreadable validation image, left out: pair 3: torn" in m for m in caplog.messages)
    with pytest.raises(UserError, match="unreadable validation image pair 3: torn; none is skip"):
        run(data(val=Pairs(10, broken=[3])), tmp_path, stage="validate")


def test_lists_are_kept_by_the_sample():
    tensors = [(torch.full((3, 4, n + 1), n), torch.full((2, n + 3), n)) for n in range(3)]
    samples = [SimpleNamespace(tensors=t, index=n, failed=-1) for n, t in enumerate(tensors)]
    batch = collate_lists(samples).kept(torch.tensor([True, False, True]))
    assert [image.shape[-1] for image in batch.images] == [1, 3]
    assert [labels.shape[-1] for labels in batch.labels] == [3, 5]
    assert batch.indices.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 4}, r"num_classes 4: the data set has 3 classes \(paper ... blot\)"),
        ({"val": Pairs(3, ids=LabelIds(["ink", "paper", "blot"]))}, "differing in the order"),
        ({"val": Pairs(3, ids=LabelIds(4))}, "training has 3 classes and validation 4, differing"),
        ({"mean": (0.5, 0.5)}, "mean .* expected three numbers"),
        ({"histogram_maps": -1}, "histogram_maps -1: expected a whole number"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(UserError, match=said):
        data(**options)


def test_the_classes_are_counted_before_training(caplog):
    module = data(val=Pairs(10))
    with caplog.at_level(logging.INFO, "beit"):
        module.check(world_size=1, accumulate=1)
    table = next(message for message in caplog.messages if "share of each class" in message)
    values = np.concatenate([Pairs(30).values(index).ravel() for index in range(30)])
    lines = table.split("\n")
    assert "training all 30 label maps, validation all 10 label maps" in lines[0]
    for number, name in enumerate(NAMES):
        line = lines[2 + number].split()
        assert line[:2] == [str(number), name]
        share = 100 * np.mean(values[values != 255] == number)
        assert float(line[2].rstrip("%")) == pytest.approx(share, abs=0.0006)
    assert float(lines[5].split()[2].rstrip("%")) == pytest.approx(
        100 * np.mean(values == 255), abs=0.0006
    )
    caplog.clear()
    module.check(world_size=1, accumulate=1, stage="validate")  # nothing is trained
    data(histogram_maps=0).check(world_size=1, accumulate=1)
    assert not caplog.messages


def test_a_wrong_value_is_found_before_training():
    module = data(Pairs(30, wrong=[11]))  # not among the five that are tried
    with pytest.raises(UserError, match="pair 11: value 7; the 3 classes are 0 to 2"):
        module.check(world_size=1, accumulate=1)


def test_classes_that_never_occur_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "beit"):
        data(Pairs(30, ids=LabelIds([*NAMES, "hole", "fold"]))).check(world_size=1, accumulate=1)
    assert caplog.messages == [
        "training: 2 of 5 classes do not occur in all 30 label maps: hole, fold"
    ]


def test_nothing_but_ignored_pixels_is_refused_where_all_were_seen():
    nothing = PixelCounts(np.zeros(3, dtype=np.int64), ignored=50, maps=9, of=9)
    with pytest.raises(UserError, match="training: no pixel of all 9 label maps has a class"):
        ClassShares(NAMES, {"training": nothing}).check()
    ClassShares(NAMES, {"training": nothing._replace(maps=2), "validation": nothing}).check()
    with pytest.raises(UserError, match="no pixel of all 30 label maps"):
        data(Pairs(30, ids=LabelIds([*NAMES], ignore=[255, 9], id_map={77: 0}))).check(
            world_size=1, accumulate=1
        )


def test_files_of_0_and_255_are_thought_of():
    counts = PixelCounts(np.array([80, 0]), ignored=20, maps=9, of=9)
    (told,) = ClassShares(["paper", "ink"], {"training": counts}).warnings()
    assert told.startswith("training: 1 of 2 classes do not occur in all 9 label maps: ink; of fil")
    assert told.endswith("say data.ids.ignore=[] data.ids.id_map='{0: 0, 255: 1}'")


def test_nothing_but_ignored_pixels_is_warned_of():
    nothing = PixelCounts(np.zeros(3, dtype=np.int64), ignored=50, maps=2, of=9)
    shares = ClassShares(NAMES, {"training": nothing})
    assert shares.warnings() == [
        "training: no pixel of 2 of 9 label maps has a class; all are ignored"
    ]
    assert "100.000%" in shares.table()


def test_the_count_is_bounded(monkeypatch):
    source, read = Pairs(1000), []
    label_map = source.label_map
    source.label_map = lambda index: read.append(index) or label_map(index)
    counts = count_pixels(source, maps=40, seconds=60)
    assert (counts.maps, counts.of) == (40, 1000)
    assert sorted(read) == np.linspace(0, 999, 40).round().astype(int).tolist()
    read.clear()
    clock = iter(range(1000))
    monkeypatch.setattr("beit.data.class_shares.time.monotonic", lambda: next(clock))
    counts = count_pixels(source, maps=1000, seconds=7.5)
    assert counts.maps == len(read) == 8
    # spread over the whole set all the same
    assert max(np.diff(sorted(read))) < 300
    assert counts.looked_at == "8 of 1000 label maps"
    broken = count_pixels(Pairs(5, broken=[2]), maps=5, seconds=1e9)
    assert (broken.maps, broken.of) == (4, 5)
