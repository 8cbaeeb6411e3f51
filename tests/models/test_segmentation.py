"""Heads of segmentation: exact totals, literal rewrites, gradients everywhere, what is refused."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from beit.errors import UserError
from beit.models.convolution import ConvNormReLU, FusingConv, convolve_resized
from beit.models.pyramid import FeaturePyramid, PlainMaps
from beit.models.segmentation import FCNHead, LinearHead, SETRPUPHead, UPerNetHead
from beit.models.vit import VisionTransformer

BATCH, IMAGE, PATCH, GRID, WIDTH, CLASSES, CHANNELS = 3, (24, 40), 8, (3, 5), 22, 7, 10
CONFIGS = Path(__file__).parents[2] / "configs"


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def released(size):
    """As the released configs build it: a table in each block, no mask token, no final norm."""
    arguments = yaml.safe_load((CONFIGS / "model" / f"{size}.yaml").read_text())
    del arguments["_target_"]
    stage = {"image_size": 640, "relative_position": "per_block"}
    return VisionTransformer(**{**arguments, **stage, "mask_token": False, "final_norm": False})


# microsoft/unilm, beit/semantic_segmentation: 163 M and 441 M; to the unit by their shapes
@pytest.mark.parametrize(("size", "total"), [("base", 163_407_980), ("large", 441_271_084)])
def test_totals_of_the_released_models(size, total):
    taps = yaml.safe_load((CONFIGS / "pyramid" / f"{size}.yaml").read_text())["taps"]
    with torch.device("meta"):
        backbone = released(size)
        width = backbone.width
        pyramid = FeaturePyramid(width, taps=taps, patch_size=16)
        heads = UPerNetHead(width, 150, channels=width), FCNHead(width, 150)
    assert parameters(backbone, pyramid, *heads) == total
    assert [tap + 1 for tap in taps] == {"base": [4, 6, 8, 12], "large": [8, 12, 16, 24]}[size]


def maps(grid=GRID, width=WIDTH, batch=BATCH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [tuple(int(side * scale) for side in grid) for scale in (4, 2, 1, 0.5)]
    return [torch.randn(batch, width, *s, generator=generator, dtype=dtype) for s in sizes]


def plain_maps(batch=BATCH, width=WIDTH, grid=GRID):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, width, *grid, generator=generator) for _ in range(4)]


def enlarge(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(6, 10), (12, 20), (7, 13), (3, 10), (2, 3), (3, 5)])
@pytest.mark.parametrize("source", [(3, 5), (1, 1)])
def test_convolution_of_a_resized_map_is_that_of_torch(source, size):
    """Values and gradients, to larger, smaller, uneven and equal sizes, borders included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, *source, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = convolve_resized(x, weight, size)
    theirs = F.conv2d(enlarge(x, size), weight, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad(y, (x, weight), upstream) for y in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_in_bf16_it_is_as_near_to_the_exact_result_as_the_large_convolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 4, 6, generator=generator)
    weight = torch.randn(32, 48, 3, 3, generator=generator) / 20
    exact = F.conv2d(enlarge(x, (16, 24)), weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = convolve_resized(x.bfloat16(), weight, (16, 24))
        large = F.conv2d(enlarge(x.bfloat16(), (16, 24)), weight, padding=1)
    assert ours.dtype == large.dtype == torch.bfloat16
    assert (ours - exact).square().mean() < 2 * (large - exact).square().mean()


@pytest.mark.parametrize("training", [True, False])
def test_fusing_conv_is_the_convolution_of_the_concatenation(training):
    sizes = [(6, 10), (6, 10), (3, 5), (1, 2)]
    layer = FusingConv(4 * WIDTH, CHANNELS).train(training)
    parts = [x[:, :, :h, :w] for x, (h, w) in zip(plain_maps(grid=(6, 10)), sizes, strict=True)]
    literal = F.conv2d(
        torch.cat([enlarge(x, (6, 10)) for x in parts], 1), layer.conv.weight, padding=1
    )
    literal = F.relu(
        F.batch_norm(literal, torch.zeros(CHANNELS), torch.ones(CHANNELS), training=training)
    )
    torch.testing.assert_close(layer(parts), literal, rtol=0, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_upsamples", "scale", "map_index"), [(4, 2, 3), (1, 4, 1), (2, 3, 0)])
def test_setr_pup_is_the_literal_head(training, num_upsamples, scale, map_index):
    """As mmsegmentation writes it: LayerNorm, then (conv, BatchNorm, ReLU, enlarge), then 1x1."""
    head = SETRPUPHead(
        WIDTH,
        CLASSES,
        channels=CHANNELS,
        num_upsamples=num_upsamples,
        scale=scale,
        map_index=map_index,
    ).train(training)
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    nn.init.normal_(head.conv_seg.bias)
    state = {key: value.clone() for key, value in head.state_dict().items()}
    inputs = plain_maps()
    x = inputs[map_index].flatten(2).transpose(1, 2)
    x = F.layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], eps=1e-6)
    x = x.transpose(1, 2).reshape(BATCH, WIDTH, *GRID)
    for i in range(num_upsamples):
        key = f"up_convs.{i}.0"
        x = F.conv2d(x, state[f"{key}.conv.weight"], padding=1)
        running = state[f"{key}.bn.running_mean"], state[f"{key}.bn.running_var"]
        affine = state[f"{key}.bn.weight"], state[f"{key}.bn.bias"]
        x = F.batch_norm(x, *running, *affine, training=training).relu()
        x = enlarge(x, tuple(scale * side for side in x.shape[2:]))
    expected = F.conv2d(x, state["conv_seg.weight"], state["conv_seg.bias"])
    logits = head(inputs)
    assert logits.shape == (BATCH, CLASSES, *(scale**num_upsamples * side for side in GRID))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_linear_head_is_a_linear_layer_of_each_patch():
    head = LinearHead(WIDTH, CLASSES, map_index=1).eval()
    nn.init.normal_(head.bn.running_mean)
    inputs = plain_maps()
    pixel = (inputs[1][2, :, 1, 3] - head.bn.running_mean) / (1 + head.bn.eps) ** 0.5
    expected = head.conv_seg.weight[:, :, 0, 0] @ pixel + head.conv_seg.bias
    torch.testing.assert_close(head(inputs)[2, :, 1, 3], expected)


def network(pyramid, head, auxiliary, **changes):
    backbone = VisionTransformer(
        IMAGE,
        PATCH,
        width=WIDTH,
        depth=4,
        num_heads=2,
        absolute_position=True,
        relative_position="per_block",
        layer_scale=0.1,
        drop_path_rate=0.0,
        mask_token=False,
        final_norm=False,
        init_cut=2.0,
        **changes,
    )
    return nn.ModuleDict(
        {
            "backbone": backbone,
            "pyramid": pyramid(WIDTH, taps=[0, 1, 2, 3], patch_size=PATCH),
            "head": head,
            "auxiliary": nn.ModuleList(auxiliary),
        }
    )


NETWORKS = {
    "upernet": lambda: network(
        FeaturePyramid, UPerNetHead(WIDTH, CLASSES, channels=CHANNELS), [FCNHead(WIDTH, CLASSES)]
    ),
    "setr_pup": lambda: network(
        PlainMaps,
        SETRPUPHead(WIDTH, CLASSES, channels=CHANNELS),
        [SETRPUPHead(WIDTH, CLASSES, num_upsamples=1, scale=4, map_index=i) for i in range(3)],
    ),
    "linear": lambda: network(PlainMaps, LinearHead(WIDTH, CLASSES), []),
}
# a constant in every pixel is taken away by the next BatchNorm: their gradients are zero
WITHOUT_GRADIENT = {
    "upernet": {"pyramid.fpn1.0.bias", "pyramid.fpn1.3.bias", "pyramid.fpn2.0.bias"},
    "setr_pup": set(),
    "linear": {"backbone.blocks.3.mlp.fc2.bias"},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_reach_every_parameter(kind):
    torch.manual_seed(0)
    model = NETWORKS[kind]().double().train()
    images = torch.randn(BATCH, 3, *IMAGE, dtype=torch.float64)
    labels = torch.randint(CLASSES, (BATCH, *IMAGE))
    backbone, pyramid = model["backbone"], model["pyramid"]
    levels = pyramid(backbone.forward_blocks(images, taps=pyramid.taps), backbone.grid)
    loss = torch.zeros((), dtype=torch.float64)
    for head in [model["head"], *model["auxiliary"]]:
        loss = loss + F.cross_entropy(enlarge(head(levels), IMAGE), labels)
    loss.backward()
    largest = {name: p.grad.abs().max().item() for name, p in model.named_parameters()}
    assert {name for name, value in largest.items() if value < 1e-12} == WITHOUT_GRADIENT[kind]


def test_heads_start_as_openmmlabs():
    """He's normal by fan-out where BatchNorm follows, deviation 0.01 and no bias in conv_seg."""
    torch.manual_seed(0)
    layer = ConvNormReLU(64, 96, kernel_size=3).conv
    assert layer.weight.std().item() == pytest.approx((2 / (96 * 9)) ** 0.5, rel=0.02)
    for head in (UPerNetHead(64, 150, channels=96), FCNHead(64, 150), LinearHead(64, 150)):
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not head.conv_seg.bias.any()


def test_whole_channels_are_dropped_before_the_logits():
    head = FCNHead(WIDTH, CLASSES, channels=CHANNELS, dropout=0.5).train()
    seen = []
    head.conv_seg.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head(maps())
    dropped = (seen[0] == 0).flatten(2).all(dim=2)
    assert 0.2 < dropped.float().mean() < 0.8


def test_upernet_refuses_to_train_on_one_image():
    head = UPerNetHead(WIDTH, CLASSES, channels=CHANNELS)
    with pytest.raises(UserError, match=r"one image at a time.*batch.per_device=2"):
        head.train()(maps(batch=1))
    assert head.eval()(maps(batch=1)).shape == (1, CLASSES, 12, 20)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(UPerNetHead(WIDTH, CLASSES, channels=8))
    assert synchronised.eval()(maps(batch=1)).shape == (1, CLASSES, 12, 20)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FCNHead(WIDTH, CLASSES, map_index=4), "map_index 4 must be one of the maps"),
        (lambda: LinearHead(WIDTH, 1), "num_classes 1 must be at least 2"),
        (lambda: FCNHead(WIDTH, CLASSES, dropout=1.0), r"dropout 1.0 must lie in \[0, 1\)"),
        (lambda: SETRPUPHead(WIDTH, CLASSES, num_upsamples=0), "num_upsamples 0 and scale 2 must"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
