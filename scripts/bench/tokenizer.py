"""DALL-E's encoder: its package under autocast, and ours."""

import torch
from torch import Tensor

from beit.tokenizers.dalle import DalleEncoder
from scripts.bench import dalle
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import Step, alternate, timed

ROW = "Tokenizer of DALL-E's size, bf16, random weights"
# of the input, for an output of each part
_PIXELS_EACH = {"input": 1, "group_1": 1, "group_2": 4, "group_3": 16, "group_4": 64, "output": 64}


def run(settings: Settings) -> list[Table]:
    shape = settings.shape()
    images = 0.1 + 0.8 * torch.rand(shape.batch_size, 3, *[shape.token_image_size] * 2)
    seconds = alternate(timed(build(images)), rounds=settings.rounds)
    flop = _flop(images)
    entries = [Entry(name, values, len(images), flop) for name, values in seconds.items()]
    title = f"{shape.token_image_size} px, batch {len(images)}"
    notes = [note for note in [dalle.note()] if note]
    return [Table(title, entries, work="images", precision="bf16", notes=notes)]


def build(images: Tensor) -> dict[str, Step]:
    """Each gives token ids (B, h, w)."""
    ours, package = dalle.ours(), dalle.Package()

    def encode() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours.encode(images)

    return {"ours": encode, "the package's, under autocast": lambda: package(images)}


def _flop(images: Tensor) -> float:
    """Of the encoder's convolutions: 52.2 GFLOP an image of 112 px."""
    with torch.device("meta"):
        weights = DalleEncoder().named_parameters()
    pixels = len(images) * images.shape[-2] * images.shape[-1]
    return sum(
        2 * weight.numel() * pixels / _PIXELS_EACH[name.split(".")[1]]
        for name, weight in weights
        if weight.ndim == 4
    )
