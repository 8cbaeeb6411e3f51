"""Our encoder and classification head against timm's and transformers' with the same weights."""

import itertools

import pytest
import torch
from other_beits import (
    CLASSES,
    DEPTH,
    POSITIONS,
    WIDTH,
    TransformersClassifier,
    copy_to_timm,
    copy_to_transformers,
    hidden_patches,
    make_ours,
    make_timm,
    mend_transformers,
    randomise,
    transformers_config,
    transformers_names,
)

from beit.models.heads import ClassificationHead

BATCH, GRIDS = 3, {"square": (24, 24), "non-square": (24, 40)}


def furthest(found, expected):
    return (found - expected).abs().max().item()


def furthest_of_largest(found, expected):
    return furthest(found, expected) / expected.abs().max().item()


def distance(found, expected):
    """Length of the difference by the expected length: bf16 blurs single values too much."""
    return ((found - expected).norm() / expected.norm()).item()


ALLOWED = {
    "float32": (furthest, furthest_of_largest, 1e-5, 1e-4),
    # in bf16 the two sides round in different places, and the blocks add it up
    "bf16": (furthest_of_largest, distance, 0.05, 0.5),
}


def autocast(number):
    return torch.autocast("cpu", torch.bfloat16, enabled=number == "bf16")


def make_classifier(image_size, positions, pooling, layer_scale):
    backbone = make_ours(
        image_size,
        positions,
        layer_scale=layer_scale,
        mask_token=True,
        final_norm=pooling == "CLS",
    )
    head = ClassificationHead(WIDTH, CLASSES, pooling=pooling.lower(), init_scale=1.0)
    randomise(backbone, head)
    return backbone, head


def draw(image_size, mask_grid):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(BATCH, 3, *image_size, generator=generator)
    mask = torch.rand(BATCH, *mask_grid, generator=generator) < 0.4
    weights = torch.randn(BATCH, CLASSES, generator=generator) / BATCH
    return images, mask, weights


def with_timm(ours, image_size, positions, pooling, layer_scale):
    """Their model with our weights: its function of (images, mask) and its tensors by our names."""
    backbone, head = ours
    theirs = make_timm(image_size, positions, pooling=pooling, layer_scale=layer_scale)
    copy_to_timm(backbone, head, theirs)
    mask_token = torch.nn.Parameter(backbone.mask_token.detach().clone())

    def call(images, mask):
        with hidden_patches(theirs, mask, mask_token):
            return theirs(images)

    tensors = {"mask_token": mask_token, **dict(theirs.named_parameters())}
    return call, {name: [tensor] for name, tensor in tensors.items()}


def with_transformers(ours, image_size, positions, pooling, layer_scale):
    config = transformers_config(image_size, positions, pooling=pooling, layer_scale=layer_scale)
    theirs = TransformersClassifier(config)
    copy_to_transformers(*ours, theirs)
    tensors = dict(theirs.named_parameters())
    names = [name for module in ours for name, _ in module.named_parameters()]
    ours_to_theirs = {name: [tensors[n] for n in transformers_names(name)] for name in names}
    return lambda images, mask: theirs(images, mask), ours_to_theirs


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pooling", ["mean", "CLS"])
@pytest.mark.parametrize("layer_scale", [0.1, 0.0], ids=["LayerScale", "no LayerScale"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_logits_and_gradients(
    library, positions, layer_scale, pooling, grid, measured, monkeypatch
):
    image_size = GRIDS[grid]
    ours = make_classifier(image_size, positions, pooling, layer_scale)
    make_theirs = {"timm": with_timm, "transformers": with_transformers}[library]
    theirs, their_tensors = make_theirs(ours, image_size, positions, pooling, layer_scale)
    if library == "transformers" and grid == "non-square":
        mend_transformers(monkeypatch, ours[0].grid)
    images, mask, weights = draw(image_size, ours[0].grid)
    for hidden, number in itertools.product((None, mask), ALLOWED):
        scale = "LayerScale" if layer_scale else "none"
        masked = "unmasked" if hidden is None else "masked"
        what = f"{positions} · {scale} · {pooling} · {masked}"
        compare_logits, compare_gradients, of_logits, of_gradients = ALLOWED[number]
        with autocast(number):
            found, expected = ours[1](ours[0](images, hidden)), theirs(images, hidden)
            with torch.no_grad():
                fused = ours[1](ours[0](images, hidden))  # without gradients another way is taken
        for logits in (found, fused):
            difference = compare_logits(logits.detach().float(), expected.detach().float())
            measured("Encoder", what, f"{library}, {number}", difference, of_logits)
        (found.float() * weights).sum().backward()
        (expected.float() * weights).sum().backward()
        for name, gradient, expected_gradient in paired(ours, their_tensors):
            if name == "mask_token" and hidden is None:
                assert gradient is None
                continue
            difference = compare_gradients(gradient, expected_gradient)
            measured("Encoder", what, f"{library}, {number}, gradients", difference, of_gradients)


def paired(ours, their_tensors):
    """Name and gradient of each parameter, ours and theirs, both taken away for the next round."""
    for module in ours:
        for name, parameter in module.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            theirs = [tensor.grad for tensor in their_tensors[name]]
            for tensor in their_tensors[name]:
                tensor.grad = None
            yield name, gradient, None if theirs[0] is None else torch.cat(theirs)


@pytest.mark.parametrize("grid", GRIDS)
def test_tapped_blocks(grid, measured):
    image_size = GRIDS[grid]
    backbone, head = make_classifier(image_size, "shared bias", "CLS", 0.1)
    theirs = make_timm(image_size, "shared bias", pooling="CLS", layer_scale=0.1)
    copy_to_timm(backbone, head, theirs)
    images, _, _ = draw(image_size, backbone.grid)
    for taps in ([0], [1, 2], list(range(DEPTH))):
        found = backbone.forward_blocks(images, taps=taps)
        expected = theirs.forward_intermediates(
            images, taps, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        for ours, (patches, cls) in zip(found, expected, strict=True):
            difference = furthest(ours, torch.cat([cls, patches], dim=1))
            measured("Heads and taps", "outputs of single blocks", "timm", difference, 1e-5)
