import logging
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from torch import nn

from beit.data import fingerprint
from beit.data.batches import LabelledBatch, MIMBatch, PixelBatch
from beit.data.fast_views import FastTwoViewTransform
from beit.data.loading import LoaderSettings
from beit.data.masking import BlockwiseMasking
from beit.data.modules import ClassificationData, TokenizerData
from beit.data.pretraining import PretrainingData
from beit.data.sources import UnreadableImage
from beit.data.views import EvalTransform, PixelTransform, TrainTransform, TwoViewTransform
from beit.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Pictures:
    """Noise images with labels 0, 1, 2, 0, ...; those in `broken` cannot be read."""

    def __init__(self, size, *, labelled=True, broken=()):
        self.size, self.broken = size, set(broken)
        self.classes = ["ape", "bee", "cow"] if labelled else None
        self.labels = np.arange(size) % 3 if labelled else None

    def __len__(self):
        return self.size

    def load(self, index):
        if index in self.broken:
            raise UnreadableImage(self.name(index), "truncated")
        pixels = np.random.default_rng(index).integers(0, 256, (26, 44, 3), dtype=np.uint8)
        return Image.fromarray(pixels), None if self.labels is None else int(self.labels[index])

    def name(self, index):
        return f"picture {index}"


class ThresholdTokenizer(nn.Module):
    """Stride 4; a token says in which thirteenth of the value range the mean of its place lies."""

    vocab_size, stride, value_range = 13, 4, (-1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def grid(self, image_size):
        return image_size[0] // 4, image_size[1] // 4

    def encode(self, images):
        self.seen.append((images, torch.is_autocast_enabled("cpu")))
        means = nn.functional.avg_pool2d(images.mean(1), 4)
        return ((means + 1) / 2 * 13).long().clamp(0, 12)


def settings(**changes):
    options = {
        "global_batch_size": 7, "batch_size_per_device": 7, "num_workers": 0, "seed": 3,
        "max_unreadable_images": 2, "check_images": 5,
    }  # fmt: skip
    return LoaderSettings(**(options | changes))


def pretraining(train=None, val=None, **changes):
    options = {
        "views": TwoViewTransform(image_size=(24, 40), token_image_size=(12, 20)),
        "masking": BlockwiseMasking((3, 5)), "tokenizer": ThresholdTokenizer(),
        "mean": MEAN, "std": STD, "loader": settings(),
    }  # fmt: skip
    return PretrainingData(train or Pictures(30, labelled=False), val, **(options | changes))


def classification(train=None, val=None, **changes):
    size = (24, 40)
    options = {
        "train_transform": TrainTransform(image_size=size, mean=MEAN, std=STD),
        "eval_transform": EvalTransform(image_size=size, mean=MEAN, std=STD),
        "num_classes": 3, "mixing": None, "loader": settings(),
    }  # fmt: skip
    return ClassificationData(train or Pictures(30), val, **(options | changes))


def test_a_source_is_looked_through_once(tmp_path, monkeypatch):
    looked = []
    of_source = fingerprint.of_source
    monkeypatch.setattr(fingerprint, "of_source", lambda s: looked.append(s) or of_source(s))
    train, val = Pictures(30), Pictures(11)
    data = pretraining(train, val, views_per_image=2, token_cache=tmp_path)
    found = [data.fingerprint() for _ in range(2)]
    assert looked == [train, val]
    assert found[0] == found[1]
    assert found[0]["val"] == of_source(val)
    assert data.caches["train"].made_of["data"] == of_source(train)["sha256"]


def test_a_token_cache_tells_scaled_decoding_apart(tmp_path):
    for kind in (TwoViewTransform, FastTwoViewTransform):
        made_of = []
        for scaled in (False, True):
            views = kind(
                image_size=(24, 40), token_image_size=(12, 20), scaled_decoding=scaled,
                token_interpolation="bicubic",
            )  # fmt: skip
            data = pretraining(views=views, views_per_image=2, token_cache=tmp_path)
            made_of.append(data.caches["train"].made_of)
        assert [key for key in made_of[0] if made_of[0][key] != made_of[1][key]] == ["drawn_by"]


class Recorder(L.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append(batch)
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, tmp_path, **options):
    task = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, use_distributed_sampler=False,
        num_sanity_val_steps=0, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return task


def test_pretraining_batches(tmp_path):
    data = pretraining(val=Pictures(9, labelled=False))
    task = fit(data, tmp_path)
    assert len(task.train_batches) == 4
    assert [len(batch.indices) for batch in task.val_batches] == [4, 5]
    batch = task.train_batches[0]
    assert isinstance(batch, MIMBatch)
    assert batch.images.shape == (7, 3, 24, 40)
    assert batch.mask.shape == batch.token_ids.shape == (7, 3, 5)
    raw = next(iter(data.loaders.train(data.trainer)))  # epoch 0 has ended: other images
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = (raw.images / 255 - mean) / std
    torch.testing.assert_close(data.normalize(raw.images), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(data.denormalize(expected), raw.images / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_tokenizer_gets_its_own_range_and_no_gradient(precision):
    data = pretraining(tokenizer_precision=precision)
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 12, 20)
    token_ids = data.tokenize(images)
    assert token_ids.dtype == torch.int64
    assert token_ids.unique().tolist() == [0, 12]
    pixels, autocast = data.tokenizer.seen[0]
    assert pixels.amin((1, 2, 3)).tolist() == [-1.0, 1.0]
    assert autocast == (precision == "bf16")
    assert not data.tokenizer.weight.requires_grad
    assert not data.tokenizer.training


def test_validation_draws_the_same_views_every_time(tmp_path):
    data = pretraining(val=Pictures(9, labelled=False))
    first, second = fit(data, tmp_path), None
    trainer = data.trainer
    second = Recorder()
    trainer.validate(second, datamodule=data, verbose=False)
    for a, b in zip(first.val_batches, second.val_batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_classification_batches(tmp_path):
    data = classification(val=Pictures(8), num_classes="auto")
    assert data.num_classes == 3
    assert data.classes == ["ape", "bee", "cow"]
    task = fit(data, tmp_path)
    batch = task.train_batches[0]
    assert isinstance(batch, LabelledBatch)
    assert batch.targets.tolist() == [index % 3 for index in batch.indices.tolist()]
    assert batch.images.dtype == torch.float32
    assert torch.cat([b.targets for b in task.val_batches]).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_mixing_is_for_training_and_a_function_of_the_position(tmp_path):
    def run(seed):
        np.random.seed(seed)
        mixing = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=None)
        loader = settings(global_batch_size=6, batch_size_per_device=6)
        data = classification(val=Pictures(8), mixing=mixing, num_classes="auto", loader=loader)
        data.check(world_size=1, accumulate=1)
        return fit(data, tmp_path)

    first, second = run(0), run(1)
    for a, b in zip(first.train_batches, second.train_batches, strict=True):
        assert a.targets.shape == (6, 3)
        torch.testing.assert_close(a.targets.sum(1), torch.ones(6))
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
    assert not torch.equal(first.train_batches[0].targets, first.train_batches[1].targets)
    assert first.val_batches[0].targets.shape == (4,)


def test_mixing_needs_an_even_batch():
    data = classification(mixing=Mixup(num_classes=3))
    with pytest.raises(UserError, match=r"batch per device 7.*even"):
        data.check(world_size=1, accumulate=1)


def test_tokenizer_batches_are_in_the_unit_range(tmp_path):
    views = PixelTransform(image_size=(12, 20))
    data = TokenizerData(Pictures(30), Pictures(5), views=views, loader=settings())
    task = fit(data, tmp_path)
    assert isinstance(task.train_batches[0], PixelBatch)
    images = torch.cat([batch.images for batch in task.train_batches])
    assert images.min() == 0.0
    assert images.max() == 1.0


def test_steps_per_epoch_need_no_trainer():
    data = pretraining(Pictures(100, labelled=False))
    assert data.steps_per_epoch(world_size=2, accumulate=3) == 2  # 100 / 42
    with pytest.raises(UserError, match=r"100 training images.*105"):
        data.check(world_size=5, accumulate=3)


def test_an_impossible_global_batch_is_refused_with_the_numbers(tmp_path):
    data = pretraining(loader=settings(global_batch_size=21))
    with pytest.raises(UserError, match=r"global batch 21: 7 per device x 1.*x 2.*make 14"):
        fit(data, tmp_path, accumulate_grad_batches=2)


def test_grid_mismatch_names_both_sides():
    with pytest.raises(UserError, match=r"3x5 tokens.*12x20.*mask has 4x5.*16x20"):
        pretraining(masking=BlockwiseMasking((4, 5)))


def test_label_mistakes():
    with pytest.raises(UserError, match=r"training images have no labels"):
        classification(Pictures(30, labelled=False))
    with pytest.raises(UserError, match=r"training label 2 of picture 2 is outside 0 to 1.*3"):
        classification(num_classes=2)
    other = Pictures(9)
    other.classes = ["ape", "bee", "dog"]
    with pytest.raises(UserError, match=r"differing in cow, dog.*data.classes=\[ape,bee,cow\]"):
        classification(val=other)
    for wrong in ("ten", 0, 2.5, None, True):
        with pytest.raises(UserError, match=f"^num_classes {wrong!r}: expected .*auto$"):
            classification(num_classes=wrong)
    with pytest.raises(UserError, match="no validation data"):
        classification().check(world_size=1, accumulate=1, stage="validate")


def test_unreadable_images_are_named_once_and_limited(tmp_path, caplog):
    data = pretraining(Pictures(30, labelled=False, broken={3, 4}))
    with caplog.at_level(logging.WARNING):
        task = fit(data, tmp_path)
    assert sorted(data.loaders.unreadable.names.values()) == ["picture 3", "picture 4"]
    assert sum("picture 3: truncated" in message for message in caplog.messages) == 1
    assert all(len(batch.indices) == 7 for batch in task.train_batches)
    seen = torch.cat([batch.indices for batch in task.train_batches]).tolist()
    assert not {3, 4} & set(seen)

    too_many = pretraining(Pictures(30, labelled=False, broken=range(9, 15)))
    with pytest.raises(UserError, match=r"3 unreadable images, more than max_.*=2"):
        fit(too_many, tmp_path)


def test_check_finds_unreadable_images_before_training(caplog):
    ruined = pretraining(Pictures(30, labelled=False, broken=range(30)))
    with pytest.raises(UserError, match=r"5 of 5 training images.*picture 0: truncated"):
        ruined.check(world_size=1, accumulate=1)
    data = pretraining(Pictures(30, labelled=False, broken={0}))
    with caplog.at_level(logging.WARNING):
        data.check(world_size=1, accumulate=1)
    assert "picture 0: truncated" in caplog.text
    assert data.loaders.unreadable.names == {("training", 0): "picture 0"}


def validate(data, tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.validate(Recorder(), datamodule=data, verbose=False)


def test_evaluation_refuses_an_unreadable_image_in_one_line(tmp_path):
    source = Pictures(9, labelled=False, broken={1})
    data = pretraining(val=source, loader=settings(num_workers=1))
    with pytest.raises(UserError, match=r"^unreadable validation image picture 1: trunc.*$"):
        validate(data, tmp_path)
    few = pretraining(val=Pictures(5, labelled=False, broken={1}))
    with pytest.raises(UserError, match="1 of 5 validation images tried are unreadable"):
        few.check(world_size=1, accumulate=1, stage="validate")


def test_validation_while_fitting_leaves_unreadable_images_out(tmp_path, caplog):
    data = classification(val=Pictures(9, broken={1, 6}))
    with caplog.at_level(logging.INFO):
        data.check(world_size=1, accumulate=1)
        task = fit(data, tmp_path, check_val_every_n_epoch=1)
    seen = torch.cat([batch.indices for batch in task.val_batches]).tolist()
    assert seen == [0, 2, 3, 4, 5, 7, 8]
    targets = torch.cat([batch.targets for batch in task.val_batches]).tolist()
    assert targets == [index % 3 for index in seen]
    for name in ("picture 1: truncated", "picture 6: truncated"):
        assert sum(name in message for message in caplog.messages) == 1
    assert caplog.messages[-1].startswith("2 unreadable images in this run: 0 training")

    # training and validation together are above the limit of two
    broken = Pictures(30, broken={3, 4})
    with pytest.raises(UserError, match=r"^3 unreadable images, more than max_.*=2.*picture \d"):
        fit(classification(broken, val=Pictures(9, broken={1})), tmp_path)


def test_a_validation_batch_without_a_readable_image_keeps_one_stand_in(tmp_path):
    loader = settings(global_batch_size=2, batch_size_per_device=2)
    data = classification(val=Pictures(8, broken={2, 3}), loader=loader)
    task = fit(data, tmp_path)
    assert [len(batch.indices) for batch in task.val_batches] == [2, 1, 2, 2]
    stand_in = task.val_batches[1]
    assert stand_in.indices.item() not in (2, 3)
    assert stand_in.targets.item() == stand_in.indices.item() % 3


def test_no_line_about_unreadable_images_where_there_are_none(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(pretraining(), tmp_path)
    assert "unreadable" not in caplog.text


def test_every_rank_has_a_validation_batch():
    loader = settings(global_batch_size=400, batch_size_per_device=400)
    data = classification(Pictures(800), Pictures(360), loader=loader)
    data.check(world_size=2, accumulate=1)
    for rank in range(2):
        trainer = SimpleNamespace(
            global_rank=rank, world_size=2,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )  # fmt: skip
        (indices,) = (sample for sample in data.loaders.val(trainer).batch_sampler)
        assert indices == [(0, index) for index in range(rank * 180, rank * 180 + 180)]
    few = classification(
        val=Pictures(3), loader=settings(global_batch_size=1, batch_size_per_device=1)
    )
    for stage in ("fit", "validate"):
        with pytest.raises(UserError, match="3 validation images are fewer than 4 devices"):
            few.check(world_size=4, accumulate=1, stage=stage)


def test_transforms_and_sizes_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="beit.data"):
        fit(pretraining(), tmp_path)
    words = ("TwoViewTransform(", "BlockwiseMasking(", "vocab_size=13", "value_range=-1..1",
             "mean (0.5, 0.4, 0.3), std (0.2, 0.3, 0.4)")  # fmt: skip
    for word in words:
        assert word in caplog.text


@pytest.mark.parametrize(("image_size", "warned"), [(7, True), ((12, 20), False)])
def test_a_tokenizer_of_another_size_is_warned_of(tmp_path, caplog, image_size, warned):
    tokenizer = ThresholdTokenizer()
    tokenizer.image_size = image_size
    with caplog.at_level(logging.INFO):
        fit(pretraining(tokenizer=tokenizer), tmp_path)
    lines = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert any("trained at 7x7 px and gets 12x20 px" in line for line in lines) == warned


def numbered(size, count):
    """Labels below `count`, which is all that is known of the classes."""
    pictures = Pictures(size)
    pictures.classes = [str(number) for number in range(count)]
    pictures.labels = np.arange(size) % count
    return pictures


def test_numbered_classes_may_be_missing_in_validation():
    data = classification(numbered(30, 3), numbered(9, 2), num_classes="auto")
    assert (data.num_classes, data.classes) == (3, ["0", "1", "2"])
    with pytest.raises(UserError, match=r"validation label 3 .* outside 0 to 2"):
        classification(numbered(30, 3), numbered(9, 4), num_classes="auto")
    data = classification(numbered(30, 3), numbered(9, 4), num_classes=4)
    assert data.classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_batch_size", 0), ("batch_size_per_device", 0), ("timeout_seconds", -1.0),
        ("timeout_seconds", "long"), ("batch_size_per_device", "7"), ("num_workers", 1.5),
        ("seed", None), ("check_images", True),
    ],
)  # fmt: skip
def test_settings_are_checked(name, value):
    with pytest.raises(UserError, match=f"^{name} {value!r}: expected a"):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5, 0.4)}, r"mean .0\.5, 0\.4.: expected three numbers"),
        ({"mean": "abc"}, "mean 'abc': expected three numbers"),
        ({"mean": 0.5}, "mean 0.5: expected three numbers"),
        ({"std": (0.2, 0.0, 0.3)}, r"std .0\.2, 0\.0, 0\.3.: expected three numbers above 0"),
    ],
)
def test_normalisations_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        pretraining(**change)
    for transform in (TrainTransform, EvalTransform):
        with pytest.raises(UserError, match=message):
            transform(**({"image_size": 24, "mean": MEAN, "std": STD} | change))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "30 training images, 4 steps of 7 an epoch; the last 2 of its order are left out"),
        ({"last_batch": "keep"}, "4 steps of 7 an epoch; a last step sees the remaining 2"),
    ],
)
def test_the_last_batch_is_told_and_planned(tmp_path, caplog, changes, line):
    caplog.set_level("INFO", logger="beit")
    data = pretraining(loader=settings(**changes))
    task = fit(data, tmp_path)
    assert line in caplog.text
    kept = "last_batch" in changes
    assert data.steps_per_epoch(world_size=1, accumulate=1) == 4 + kept
    sizes = [len(batch.indices) for batch in task.train_batches]
    assert sizes[: 4 + kept] == [7, 7, 7, 7, *([2] if kept else [])]


def test_where_a_last_batch_cannot_be_kept():
    keep = settings(last_batch="keep", global_batch_size=8, batch_size_per_device=8)
    views = PixelTransform(image_size=(12, 20))
    with pytest.raises(UserError, match="balance of its codes"):
        TokenizerData(Pictures(30), None, views=views, loader=keep).check(
            world_size=1, accumulate=1
        )
    mixed = {"mixing": Mixup(num_classes=3), "loader": keep}
    classification(Pictures(30), **mixed).check(world_size=1, accumulate=1)  # 6 are left over
    with pytest.raises(UserError, match=r"batches of 7 to 7.*mixing needs an even number"):
        classification(Pictures(31), **mixed).check(world_size=1, accumulate=1)
    with pytest.raises(UserError, match=r"last_batch.*'all'.*drop or keep"):
        settings(last_batch="all")
