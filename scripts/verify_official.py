"""Check downloaded weights of the official BEiT release against what is known of them.

    python scripts/verify_official.py beit_base_patch16_224_pt22k_ft22kto1k.pth --image cats.jpg

Known are the numbers of parameters, and for fine-tuned weights the first three logits and the class
on COCO's val2017/000000039769.jpg, resized without cropping, as they stand in Hugging Face's
convert_beit_unilm_to_pytorch.py (tolerance 1e-3). That converter's model normalised with an epsilon
of 1e-12, the release's with 1e-6; both are tried, and the one that agrees is named.
The file's name tells which weights it should hold: keep the released one.
Exit code 0: all checks passed. 1: one did not. 2: a file could not be read.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from beit.data.views import EvalTransform
from beit.errors import UserError
from beit.interop import convert
from beit.interop.checks import networks
from beit.interop.weights import HALF, Weights

TOLERANCE = 1e-3

# (width, pixels, what, outputs) -> parameters; what ends in "absolute" for the plain ViT
PARAMETERS = {
    (768, 224, "mim", 8192): 91_965_776,
    (768, 224, "mim absolute", 8192): 92_089_856,
    (1024, 224, "mim", 8192): 311_534_016,
    (768, 224, "classification", 1000): 86_530_984,
    (768, 384, "classification", 1000): 86_744_104,
    (768, 512, "classification", 1000): 86_997_544,
    (1024, 224, "classification", 1000): 304_430_568,
    (1024, 384, "classification", 1000): 304_998_888,
    (1024, 512, "classification", 1000): 305_674_728,
    (768, 224, "classification", 21841): 102_557_713,
    (1024, 224, "classification", 21841): 325_792_593,
    (768, 512, "segmentation", 150): 163_080_812,
    (768, 640, "segmentation", 150): 163_407_980,
    (1024, 512, "segmentation", 150): 440_398_636,
    (1024, 640, "segmentation", 150): 441_271_084,
}

# name of the released file -> first three logits, index of the largest
PUBLISHED = {
    "beit_base_patch16_224_pt22k_ft22k": ((2.2288, 2.4671, 0.7395), 2397),
    "beit_large_patch16_224_pt22k_ft22k": ((1.6881, -0.2787, 0.5901), 2396),
    "beit_base_patch16_224_pt22k_ft1k": ((0.1241, 0.0798, -0.6569), 285),
    "beit_base_patch16_224_pt22k_ft22kto1k": ((-1.2385, -1.0987, -1.0108), 281),
    "beit_base_patch16_384_pt22k_ft22kto1k": ((-1.5303, -0.9484, -0.3147), 761),
    "beit_large_patch16_224_pt22k_ft1k": ((0.4610, -0.0928, 0.2086), 761),
    "beit_large_patch16_224_pt22k_ft22kto1k": ((-0.4804, 0.6257, -0.1837), 761),
    "beit_large_patch16_384_pt22k_ft22kto1k": ((-0.5122, 0.5117, -0.2113), 761),
    "beit_large_patch16_512_pt22k_ft22kto1k": ((-0.3062, 0.7261, 0.4852), 761),
}

Check = tuple[str, bool | None, str]  # what, passed (None: not checked), detail


def main(arguments: list[str]) -> int:
    """Print one line a check. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--image", type=Path, help="COCO val2017/000000039769.jpg")
    options = parser.parse_args(arguments)
    code = 0
    for path in options.checkpoints:
        try:
            for what, passed, detail in verify(path, options.image):
                word = {True: "ok", False: "WRONG", None: "not checked"}[passed]
                print(f"{path.name}: {what}: {word}, {detail}", flush=True)
                code = max(code, int(passed is False))
        except UserError as error:
            print(f"{path.name}: refused: {error}")
            code = 2
    return code


def verify(path: Path, image: Path | None) -> Iterator[Check]:
    """The checks of one file. Raises UserError where it cannot be read."""
    weights = convert.read(path)
    layout = weights.report.layout
    yield "layout", layout.startswith("unilm"), f"{layout}, {weights.kind}"
    yield _parameters(weights)
    backbone, head = networks(weights)
    backbone.load_state_dict(weights.backbone, strict=True)
    head.load_state_dict(weights.head, strict=True)
    yield "loading", True, f"{len(weights.released())} tensors, none missing or left over"
    yield _logits(weights, path, image)


def _parameters(weights: Weights) -> Check:
    arch = weights.architecture
    what = weights.kind + (" absolute" if arch.absolute_position else "")
    known = PARAMETERS.get((arch.width, arch.image_size[0], what, weights.num_outputs))
    count = count_parameters(weights)
    if known is None:
        return "parameters", None, f"{count:,}; no released model has these sizes"
    return "parameters", count == known, f"{count:,}, known are {known:,}"


def count_parameters(weights: Weights) -> int:
    """Without the statistics of BatchNorm, which are learned otherwise."""
    with torch.device("meta"):
        return sum(value.numel() for part in networks(weights) for value in part.parameters())


def _logits(weights: Weights, path: Path, image: Path | None) -> Check:
    if path.stem not in PUBLISHED:
        return "logits", None, f"none are published for a file named {path.stem}"
    if image is None:
        return "logits", None, "give --image with COCO's val2017/000000039769.jpg"
    expected, best = PUBLISHED[path.stem]
    told = []
    for eps in (1e-6, 1e-12):
        logits = compute_logits(weights, image, eps)
        found = logits[:3]
        worst = (found - torch.tensor(expected)).abs().max().item()
        told.append(
            f"epsilon {eps:g}: {_text(found)}, class {int(logits.argmax())}, off by {worst:.1e}"
        )
        if worst <= TOLERANCE and int(logits.argmax()) == best:
            return "logits", True, told[-1]
    return (
        "logits",
        False,
        f"published {_text(torch.tensor(expected))}, class {best}; {'; '.join(told)}",
    )


@torch.no_grad()
def compute_logits(weights: Weights, image: Path, eps: float) -> torch.Tensor:
    """Logits (K,) of one image, resized to the model's size with both sides by themselves."""
    arch = replace(weights.architecture, norm_eps=eps)
    backbone, head = (part.eval() for part in networks(weights.changed(architecture=arch)))
    backbone.load_state_dict(weights.backbone)
    head.load_state_dict(weights.head)
    transform = EvalTransform(
        image_size=arch.image_size,
        mean=HALF,
        std=HALF,
        crop_pct=1.0,
        crop_mode="squash",
        interpolation="bilinear",
    )
    with Image.open(image) as opened:
        pixels = transform(opened.convert("RGB"))
    return head(backbone(pixels[None]))[0]


def _text(values: torch.Tensor) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values.tolist()) + "]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
