"""Pyramid, UPerNet and FCN: transformers' with our weights, on the same four maps.

Known differences, kept out of the comparison: theirs has no dropout, and taps its pyramid two
blocks early with the documented `out_indices`, so both get the maps, not the images.
"""

import re

import pytest
import torch
from torch import nn
from transformers import BeitConfig
from transformers.models.beit.modeling_beit import BeitFCNHead, BeitFPNNeck, BeitUperHead

from beit.models.pyramid import FeaturePyramid
from beit.models.segmentation import FCNHead, UPerNetHead

# of two images, BatchNorm of a map pooled to one value would leave nothing but rounding
BATCH, WIDTH, CLASSES, CHANNELS = 5, 22, 13, 10
GRIDS = [(3, 5), (7, 4)]
PYRAMID_NAMES = {
    r"fpn1\.0": "fpn1.conv_transpose1",
    r"fpn1\.1": "fpn1.normalization",
    r"fpn1\.3": "fpn1.conv_transpose2",
    r"fpn2\.0": "fpn2",
}
HEAD_NAMES = {
    r"\.conv\.": ".convolution.",
    r"\.bn\.": ".normalization.",
    r"psp_modules\.(\d)\.1": r"psp_modules.blocks.\1.conv",
    r"^bottleneck": "psp_bottleneck",
    r"^conv_seg": "classifier",
}


def config(auxiliary_convs=1):
    return BeitConfig(
        hidden_size=WIDTH,
        num_attention_heads=2,
        auxiliary_channels=CHANNELS,
        auxiliary_num_convs=auxiliary_convs,
        num_labels=CLASSES,
    )


def randomise(*modules):
    """BatchNorm's statistics and scales too; the deviation of 0.01 of conv_seg would hide all."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in modules:
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    draw = torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(draw.abs() + 0.5 if name.endswith("var") else draw / 5)


def tokens(grid):
    generator = torch.Generator().manual_seed(0)
    shape = BATCH, 1 + grid[0] * grid[1], WIDTH
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(4)]


def maps(grid):
    generator = torch.Generator().manual_seed(0)
    sizes = [tuple(int(scale * side) for side in grid) for scale in (4, 2, 1, 0.5)]
    return [
        torch.randn(BATCH, WIDTH, *size, generator=generator, requires_grad=True) for size in sizes
    ]


def renamed(key, names):
    """The name of theirs for one of ours."""
    for ours, theirs in names.items():
        key = re.sub(ours, theirs, key)
    return key


def gradients(outputs, sources):
    generator = torch.Generator().manual_seed(7)
    total = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    return torch.autograd.grad(total, sources)


def compare(measured, what, ours, theirs, inputs, pairs, outputs):
    """Outputs, gradients of the inputs and of every parameter, and BatchNorm's new statistics.

    As shares of the largest value of each.
    """
    part = "Heads of segmentation, float32, of the largest value"
    first, second = outputs
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape
        measured(part, what, "transformers", (a - b).abs().max() / b.abs().max(), 1e-5)
    mine, others = zip(*pairs, strict=True)
    found = gradients(first, [*inputs, *mine])
    expected = gradients(second, [*inputs, *others])
    largest = max(b.abs().max() for b in expected)
    for a, b in zip(found, expected, strict=True):
        # a bias that BatchNorm takes away has none: what there is of it is rounding
        scale = b.abs().max() if b.abs().max() > 1e-5 * largest else largest
        measured(part, f"{what}, gradients", "transformers", (a - b).abs().max() / scale, 1e-5)
    for a, b in zip(_statistics(ours), _statistics(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def _statistics(module):
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    return sorted((layer.running_mean.sum() for layer in layers), key=float)


def built(ours, theirs, names, training):
    """Both with the same weights, and their parameters in pairs."""
    randomise(ours)
    ours.train(training)
    theirs.train(training)
    state = {renamed(key, names): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    parameters = dict(theirs.named_parameters())
    pairs = [(value, parameters[renamed(key, names)]) for key, value in ours.named_parameters()]
    assert len(pairs) == len(parameters)
    return ours, theirs, pairs


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pyramid(grid, training, measured):
    pyramid = FeaturePyramid(WIDTH, taps=[3, 5, 7, 11], patch_size=16)
    ours, theirs, pairs = built(pyramid, BeitFPNNeck(config()), PYRAMID_NAMES, training)
    inputs = tokens(grid)
    # as BeitForSemanticSegmentation makes maps of tokens
    shaped = [x[:, 1:].transpose(1, 2).reshape(BATCH, WIDTH, *grid) for x in inputs]
    compare(measured, "pyramid", ours, theirs, inputs, pairs, (ours(inputs, grid), theirs(shaped)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_upernet(grid, training, measured):
    head = UPerNetHead(WIDTH, CLASSES, channels=WIDTH, dropout=0.0)
    ours, theirs, pairs = built(head, BeitUperHead(config()), HEAD_NAMES, training)
    inputs = maps(grid)
    compare(measured, "UPerNet", ours, theirs, inputs, pairs, ([ours(inputs)], [theirs(inputs)]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("convs", [1, 2])
def test_fcn(grid, training, convs, measured):
    head = FCNHead(WIDTH, CLASSES, channels=CHANNELS, num_convs=convs, dropout=0.0)
    ours, theirs, pairs = built(head, BeitFCNHead(config(convs)), HEAD_NAMES, training)
    inputs = maps(grid)
    outputs = [ours(inputs)], [theirs(inputs)]
    # the head reads the third map alone
    compare(measured, "FCN", ours, theirs, inputs[2:3], pairs, outputs)
