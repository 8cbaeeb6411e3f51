"""Features of every layer against blocks called one by one, image by image."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from beit.data.labelled import LabelledData
from beit.errors import UserError
from beit.evaluation.features import Compute, checked_layers, extract, full_precision

CPU = Compute(torch.device("cpu"))


@torch.no_grad()
def literally(model, image):
    """(cls, mean) of each block's output for one image (3, H, W)."""
    model.eval()
    x = model.patch_embed(image[None])
    x = torch.cat([model.cls_token, x], dim=1) + model.pos_embed
    found = []
    for block in model.blocks:
        x = block(x, None)
        patches = [x[0, 1 + i] for i in range(15)]
        found.append((x[0, 0], sum(patches) / 15))
    return found


def test_every_layer_is_the_blocks_output(backbone, images):
    model, some = backbone(), images(17)
    found = extract(model, some, CPU, layers="all")
    assert found.layers == (1, 2, 3, 4)
    assert found.labels.tolist() == [i % 3 for i in range(17)]
    transformed = [some.transform(some.source.load(i)[0]) for i in range(17)]
    for i, image in enumerate(transformed):
        for layer, (cls, mean) in enumerate(literally(model, image), start=1):
            torch.testing.assert_close(found.of(layer, "cls")[i], cls, rtol=0, atol=2e-5)
            torch.testing.assert_close(found.of(layer, "mean")[i], mean, rtol=0, atol=2e-5)
            both = torch.cat([cls, mean])
            torch.testing.assert_close(found.of(layer, "both")[i], both, rtol=0, atol=2e-5)


def test_some_layers_are_those_of_all(backbone, images):
    model, some = backbone(), images(8)
    every, chosen = (extract(model, some, CPU, layers=layers) for layers in ("all", [4, 2]))
    assert chosen.layers == every.only([4, 2]).layers == (2, 4)
    for layer in (2, 4):
        assert torch.equal(chosen.of(layer, "both"), every.of(layer, "both"))
        assert torch.equal(every.only([4, 2]).of(layer, "cls"), every.of(layer, "cls"))


def test_a_file_holds_the_same_and_is_gone(backbone, images, tmp_path: Path, caplog):
    model, some = backbone(), images(8)
    in_file = Compute(torch.device("cpu"), memory_gb=0.0, folder=str(tmp_path / "new"))
    with caplog.at_level("INFO", logger="beit"):
        found = extract(model, some, in_file, layers="all")
    assert "4 layers x 44 numbers, 0.0 MB in a file in" in caplog.text
    assert list((tmp_path / "new").iterdir()) == []
    assert torch.equal(found.stored, extract(model, some, CPU, layers="all").stored)


def test_it_leaves_modes_and_generators_alone(backbone, images):
    model = backbone().train()
    model.blocks[1].eval()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    found = extract(model, images(8), CPU, layers=[1])
    assert not found.stored.requires_grad
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected
    assert [block.training for block in model.blocks] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_is_entered_for_the_network_alone(backbone, images):
    seen = []
    model = backbone()
    model.blocks[0].mlp.register_forward_hook(lambda *of: seen.append(of[2].dtype))
    cast = Compute(torch.device("cpu"), lambda: torch.autocast("cpu", torch.bfloat16))
    found = extract(model, images(8), cast, layers=[1])
    assert set(seen) == {torch.bfloat16}
    assert found.stored.dtype == torch.float32


def test_what_is_refused(backbone, images):
    with pytest.raises(UserError, match=r"layers \[5\]: this network has layers 1 to 4"):
        extract(backbone(), images(8), CPU, layers=[5])
    for layers in ([0], [], [2, 9]):
        with pytest.raises(UserError, match="layers 1 to 4"):
            checked_layers(layers, 4)
    with pytest.raises(UserError, match="unreadable training image picture 5: truncated"):
        extract(backbone(), images(8, broken=5), CPU, layers="all")
    model = backbone()
    with torch.no_grad():
        model.blocks[3].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        extract(model, images(8), CPU, layers="all")


def test_products_are_exact_within():
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_labelled_data_refuse(noise, labelled):
    with pytest.raises(UserError, match="2 labelled training images are fewer than the 3 classes"):
        labelled(noise(2), noise(9))
    with pytest.raises(UserError, match="the training images have no labels"):
        labelled(noise(9, labelled=False), noise(9))
    with pytest.raises(UserError, match="no validation images"):
        labelled(noise(9), None)
    with pytest.raises(UserError, match="label 2 of picture 2 is outside 0 to 1"):
        labelled(noise(9), noise(9), num_classes=2)
    with pytest.raises(UserError, match="1 of 9 validation images tried are unreadable"):
        labelled(noise(9), noise(9, broken=4)).check()


def test_a_part_is_drawn_once_and_even(images):
    whole = images(31)
    part = whole.part(9, seed=4)
    assert np.bincount(part.labels).tolist() == [3, 3, 3]
    again = whole.part(9, seed=4)
    assert part.source.indices.tolist() == again.source.indices.tolist()
    assert whole.part(31, seed=4) is whole


def test_label_maps_are_no_labels(images, noise):
    """What looks at no label takes images from anywhere, pairs with label maps among them."""

    class Pairs(noise):
        def load(self, index):
            return super().load(index)[0], np.zeros((20 + index, 30), dtype=np.int16)

    few = images(3)
    data = LabelledData.unlabelled(
        Pairs(3, labelled=False), None, transform=few.transform, loader=few.loader
    )
    (batch,) = data.val.batches()
    assert batch.targets.tolist() == [-1, -1, -1]
