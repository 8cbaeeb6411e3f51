"""Small weights of every kind, each layout's own loader, and the matrix in docs/conversion.md."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit.interop import convert
from beit.interop.checks import networks
from beit.interop.decoder import Decoder, Head, Labels
from beit.interop.weights import Architecture, Preprocessing, Weights

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # neither is a package

from scripts.sections import read_section, write_section  # noqa: E402

DOCUMENT, COMMAND = ROOT / "docs" / "conversion.md", "make conversion"
WIDTH, HEADS, DEPTH, PATCH, VOCAB, CLASSES, BATCH = 22, 2, 3, 8, 13, 5, 3
POSITIONS = {
    "shared": {"absolute_position": False, "relative_position": "shared"},
    "per_block": {"absolute_position": False, "relative_position": "per_block"},
    "absolute": {"absolute_position": True, "relative_position": "none"},
    "both": {"absolute_position": True, "relative_position": "per_block"},
}
KINDS = {
    "mim": ("mim", "none"),
    "classification, mean": ("classification", "mean"),
    "classification, CLS": ("classification", "cls"),
    "segmentation": ("segmentation", "none"),
    "backbone, mean": ("backbone", "mean"),
    "backbone, CLS": ("backbone", "cls"),
}
OUTPUTS = {"ours": "w.safetensors", "unilm": "w.pth", "timm": "timm", "huggingface": "hf"}
DECODER = Decoder(
    head=Head.of("UPerNetHead", channels=WIDTH),
    auxiliary=(Head.of("FCNHead", channels=7),),
    taps=(2, 3, 4, 5),
    pyramid=True,
    auxiliary_weight=0.3,
)
SURFACES = ["road", "sky", "größter Baum", "a/b", "wall"]
NAMES = ["cat", "dog", "größte Eule", "a/b", "cat"]  # ImageNet has a name twice, too


def make(kind="classification, mean", positions="per_block", layer_scale=0.1, size=24, **changes):
    """Random weights, the zero-initialised ones too."""
    what, pooling = KINDS[kind]
    segments = what == "segmentation"
    decoder = changes.pop("decoder", DECODER) if segments else None
    arch = Architecture(
        **{
            "image_size": (size, size) if isinstance(size, int) else size,
            "patch_size": PATCH,
            "width": WIDTH,
            "depth": 2 * DEPTH if segments else DEPTH,
            "num_heads": HEADS,
            "mlp_hidden": 4 * WIDTH,
            "layer_scale": layer_scale,
            "mask_token": what == "mim",
            "final_norm": pooling != "mean" and not segments,
            "drop_path_rate": 0.1,
            **POSITIONS[positions],
            **changes,
        }
    )
    share = 1.0 if segments else 0.75
    plain = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bilinear", share, "squash")
    head = {"mim": ("lm_head", VOCAB), "classification": ("head", CLASSES)}.get(what)
    sized = {f"{head[0]}.weight": torch.empty(head[1], WIDTH)} if head else {}
    if segments:
        sized = {"head.conv_seg.weight": torch.empty(CLASSES, WIDTH, 1, 1)}
    weights = Weights(what, arch, {}, sized, pooling, plain, decoder=decoder)
    torch.manual_seed(5)
    backbone, top = networks(weights)
    for module in (backbone, top):
        for parameter in module.parameters():
            # convolutions sum over more: their logits would be tens
            torch.nn.init.normal_(parameter, std=0.2 if segments and module is top else 0.3)
        as_trained(module)
    classes = NAMES if what == "classification" else SURFACES if segments else None
    return weights.changed(
        backbone=dict(backbone.state_dict()),
        head=dict(top.state_dict()),
        classes=classes,
        labels=Labels(reduce_zero=segments, ignore_index=254 if segments else 255),
    )


@torch.no_grad()
def as_trained(module):
    """Statistics of BatchNorm unlike those it begins with."""
    for name, buffer in module.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            buffer.normal_()


def inputs(weights):
    """Images and a mask."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(BATCH, 3, *weights.architecture.image_size, generator=generator)
    mask = torch.rand(BATCH, *weights.architecture.grid, generator=generator) < 0.4
    return images, mask


@torch.no_grad()
def reference(weights):
    """Logits (M,V) or (B,K), or pooled features (B,D), of our own modules.

    Of segmentation the logits of all heads, flat and one after the other.
    """
    backbone, head = (module.eval() for module in networks(weights))
    backbone.load_state_dict(weights.backbone, strict=True)
    head.load_state_dict(weights.head, strict=True)
    images, mask = inputs(weights)
    if weights.kind == "mim":
        return head(backbone(images, mask), mask)
    if weights.kind == "classification":
        return head(backbone(images))
    if weights.kind == "segmentation":
        taps, grid = weights.decoder.taps, weights.architecture.grid
        maps = head["pyramid"](backbone.forward_blocks(images, taps=taps), grid)
        return torch.cat([top(maps).flatten() for top in (head["head"], *head["auxiliary"])])
    tokens = backbone(images)
    if weights.pooling == "cls":
        return tokens[:, 0]
    return head["fc_norm"](tokens[:, 1:].mean(dim=1))


def save(weights, layout, folder):
    """Written in a layout; the path."""
    path = Path(folder) / OUTPUTS[layout]
    convert.write(weights, layout, path)
    return path


def assert_same(found, expected):
    """Bit for bit, and all that is beside the tensors."""
    assert found.kind == expected.kind
    assert found.pooling == expected.pooling
    assert found.classes == expected.classes
    assert found.decoder == expected.decoder
    assert found.labels == expected.labels
    for name in ("backbone", "head"):
        got, wanted = getattr(found, name), getattr(expected, name)
        assert set(got) == set(wanted)
        for key in wanted:
            assert got[key].dtype == wanted[key].dtype, key
            assert torch.equal(got[key], wanted[key]), key


class Matrix:
    """The largest difference of a cell, or the reason of a refusal."""

    def __init__(self):
        self.cells = {}

    def add(self, kind, source, to, value):
        key = kind, source, to
        old = self.cells.get(key)
        self.cells[key] = max(old, value) if isinstance(old, float) else value

    @property
    def is_complete(self):
        return len(self.cells) == len(KINDS) * len(OUTPUTS) ** 2

    def written(self):
        """The text that stands in the document."""
        return read_section(DOCUMENT, "conversion", COMMAND)

    def text(self):
        layouts = list(OUTPUTS)
        lines = []
        for kind in KINDS:
            lines += [f"\n**{kind}**\n", "| from \\ to | " + " | ".join(layouts) + " |"]
            lines.append("|---" * (len(layouts) + 1) + "|")
            for source in layouts:
                row = [self._cell(kind, source, to) for to in layouts]
                lines.append(f"| {source} | " + " | ".join(row) + " |")
        return "\n".join(lines) + "\n"

    def _cell(self, kind, source, to):
        value = self.cells.get((kind, source, to), "-")
        return f"{value:.0e}" if isinstance(value, float) and value else str(value or "0")


@pytest.fixture(scope="session")
def matrix(pytestconfig):
    """Collects; with --write-docs and all cells filled it is written into the document."""
    collected = Matrix()
    yield collected
    if pytestconfig.getoption("--write-docs") and collected.is_complete:
        write_section(DOCUMENT, "conversion", COMMAND, collected.text())


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="session")
def kit():
    """The functions above, for test files to use."""
    from types import SimpleNamespace

    return SimpleNamespace(
        make=make,
        inputs=inputs,
        reference=reference,
        save=save,
        assert_same=assert_same,
        difference=difference,
        as_trained=as_trained,
    )
