import logging
import random
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from beit.callbacks.curves import Curves
from beit.callbacks.metrics_file import MetricsFile
from beit.callbacks.optimizer import OptimizerMonitor
from beit.callbacks.pictures import (
    ReconstructionPictures,
    TokenizerPictures,
    hide,
    rows_over,
    undisturbed,
)
from beit.callbacks.progress import Progress
from beit.callbacks.throughput import Throughput
from beit.data.batches import PixelBatch
from beit.errors import UserError


class Watched(ReconstructionPictures):
    """Keeps what was drawn."""

    def columns(self, trainer, pl_module):
        self.drawn = super().columns(trainer, pl_module)
        return self.drawn


def steps_drawn(folder):
    return sorted(int(re.search(r"step(\d+)", p.name)[1]) for p in folder.glob("*.png"))


def test_hide_paints_whole_patches_grey():
    images = torch.rand(2, 3, 24, 20) * 0.4
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[0, 1, 4] = mask[1, 0, 2] = True
    shown = hide(images, mask)
    expected = images.clone()
    expected[0, :, 8:16, 16:20] = 0.5
    expected[1, :, 0:8, 8:12] = 0.5
    assert torch.equal(shown, expected)


def test_columns_of_a_masked_image_model(tmp_path, kit, fit):
    pictures = Watched(str(tmp_path / "figures"), num_images=3)
    data = kit.Data()
    task, _ = fit(callbacks=[pictures], data=data)
    first, second = data.val_batches  # of 7: the sample is of 0, 4 2/3 and 9 1/3
    images, mask, token_ids = (
        torch.stack([a[0], a[4], b[2]]) for a, b in zip(first[:3], second[:3], strict=True)
    )
    decode = kit.PaletteTokenizer().decode
    drawn = pictures.drawn
    assert list(drawn) == ["original", "masked input", "tokenizer", "model"]
    assert torch.equal(drawn["original"], (images + 1) / 2)
    assert torch.equal(drawn["tokenizer"], decode(token_ids))
    with torch.no_grad():
        predicted = task.eval().predict_tokens(images, mask)
    for b in range(3):
        for i in range(3):
            for j in range(5):
                token = predicted[b, i, j] if mask[b, i, j] else token_ids[b, i, j]
                cell = drawn["model"][b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                assert torch.equal(cell, (token / 12).expand(3, 4, 4))
                shown = drawn["masked input"][b, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
                assert bool((shown == 0.5).all()) == bool(mask[b, i, j])


def test_the_png_holds_a_panel_for_each_cell(tmp_path, kit, fit):
    class Flat(Watched):
        def columns(self, trainer, pl_module):
            names = super().columns(trainer, pl_module)
            levels = torch.linspace(0.1, 0.9, len(names) * 2).view(len(names), 2, 1, 1, 1)
            red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
            return {name: level * red.expand(2, 3, 24, 40) for name, level in zip(names, levels)}

    fit(callbacks=[Flat(str(tmp_path), num_images=2)])
    pixels = np.asarray(Image.open(tmp_path / "reconstructions-step0000008.png").convert("RGB"))
    flat = pixels.reshape(-1, 3)
    for level in np.linspace(0.1, 0.9, 8):
        colour = np.array([round(level * 255), 0, 0])
        assert (np.abs(flat - colour).max(axis=1) <= 1).sum() > 5000


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, 0, [4, 8, 12]), (2, 0, [8, 12]), (0, 0, [12]), (0, 5, [5, 10, 12]), (3, 3, [3, 6, 9, 12])],
)
def test_when_it_draws(tmp_path, fit, epochs, steps, expected):
    pictures = Watched(
        str(tmp_path / "f"), num_images=1, every_n_epochs=epochs, every_n_steps=steps
    )
    fit(callbacks=[pictures], max_epochs=3)
    assert steps_drawn(tmp_path / "f") == expected


def test_without_validation_the_first_training_batch_is_drawn(tmp_path, kit, fit):
    data = kit.Data(validate=False)
    pictures = Watched(str(tmp_path), num_images=2)
    fit(callbacks=[pictures], data=data)
    assert torch.equal(pictures.drawn["original"], (data.batches[0].images[:2] + 1) / 2)


@pytest.mark.parametrize("count", [1, 3, 4, 10, 50])
@pytest.mark.parametrize("batches", [1, 3, 7])
def test_the_sample_lies_evenly_over_a_validation(batches, count):
    size = 6
    found = [
        size * batch + row
        for batch in range(batches)
        for row in rows_over(batch, size, batches=batches, count=count)
    ]
    assert found == sorted({size * batches * i // count for i in range(count)})


def test_a_sanity_check_is_no_whole_validation(tmp_path, kit, fit):
    data = kit.Data()
    pictures = Watched(str(tmp_path), num_images=2)
    fit(callbacks=[pictures], data=data, num_sanity_val_steps=1)
    first, second = (batch.images[0] for batch in data.val_batches)
    assert torch.equal(pictures.drawn["original"], (torch.stack([first, second]) + 1) / 2)


def test_tensorboard_gets_the_picture(tmp_path, fit):
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    fit(callbacks=[Watched(str(tmp_path / "f"), num_images=2)], logger=logger)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("reconstructions")] == [3, 7]
    pixels = Image.open(tmp_path / "f" / "reconstructions-step0000008.png")
    assert (events.Images("reconstructions")[1].width) == pixels.width


@pytest.mark.parametrize("error", [UserError, NotImplementedError])
def test_a_tokenizer_that_only_encodes(tmp_path, kit, fit, caplog, error):
    class EncodeOnly(kit.PaletteTokenizer):
        def decode(self, token_ids):
            raise error("weights of the decoder were not given")

    data = kit.Data()
    data.tokenizer = EncodeOnly()
    pictures = Watched(str(tmp_path), num_images=2)
    with caplog.at_level(logging.WARNING, logger="beit"):
        fit(callbacks=[pictures], data=data)
    assert list(pictures.drawn) == ["original", "masked input"]
    assert [r.getMessage() for r in caplog.records if r.name == "beit.callbacks.pictures"] == [
        "no reconstructions in the pictures: weights of the decoder were not given"
    ]


def test_columns_of_a_tokenizer(tmp_path, kit, fit):
    class PixelData(kit.Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return PixelBatch((batch.images + 1) / 2, batch.indices, batch.indices)

    class PixelTask(kit.Task):
        def training_step(self, batch, batch_idx):
            return self.net.weight.square().sum()

    class Watching(TokenizerPictures):
        def columns(self, trainer, pl_module):
            self.drawn = super().columns(trainer, pl_module)
            return self.drawn

    data, pictures = PixelData(), Watching(str(tmp_path), num_images=2)
    fit(callbacks=[pictures], data=data, task=PixelTask())
    images = torch.stack([batch.images[0] for batch in data.val_batches])
    # the palette takes images in [-1, 1], as the batches have them
    expected = kit.PaletteTokenizer().decode(kit.PaletteTokenizer().encode(images))
    assert list(pictures.drawn) == ["original", "reconstruction"]
    assert torch.allclose(pictures.drawn["original"], (images + 1) / 2)
    assert torch.equal(pictures.drawn["reconstruction"], expected)


def test_undisturbed_restores_modes_and_generators():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    net[1].eval()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with undisturbed(net):
        assert not any(module.training for module in net.modules())
        torch.rand(3), random.random(), np.random.rand()
    assert [module.training for module in net.modules()] == [True, True, False, False]
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected


def test_callbacks_do_not_change_the_numbers(tmp_path, fit):
    bare, _ = fit(callbacks=[])
    watched, _ = fit(
        callbacks=[
            Throughput(),
            OptimizerMonitor(),
            Progress(),
            Watched(str(tmp_path), num_images=3, every_n_steps=1),
            Curves(str(tmp_path / "metrics.csv"), str(tmp_path)),
        ],
        logger=MetricsFile(str(tmp_path)),
    )
    assert torch.equal(bare.net.weight, watched.net.weight)
    assert torch.equal(bare.net.bias, watched.net.bias)


@pytest.mark.parametrize(
    "wrong", [{"num_images": 0}, {"every_n_epochs": -1}, {"every_n_steps": -1}]
)
def test_impossible_pictures_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        TokenizerPictures("figures", **{"num_images": 3, **wrong})
