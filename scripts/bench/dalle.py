"""DALL-E's encoder, ours and the package's, with the same random weights."""

import functools
import importlib
import importlib.util
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beit.tokenizers.dalle import DalleEncoder, DalleTokenizer

INSTALLED = importlib.util.find_spec("dall_e") is not None
_folders: list[tempfile.TemporaryDirectory] = []  # until the process ends


def ours() -> DalleTokenizer:
    tokenizer = DalleTokenizer(str(_weights()), decoder_path=None)
    return tokenizer.eval().requires_grad_(False)


class Package(nn.Module):
    """The package's module; without the package our own network, plainly called."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.encoder = (
                importlib.import_module("dall_e").Encoder() if INSTALLED else DalleEncoder()
            )
        self.encoder.load_state_dict(load_file(_weights()), assign=True)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0.1, 0.9] -> token ids (B, h, w): argmax over the logits, in bf16."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.encoder(images).argmax(dim=1)


def note() -> str:
    """What is to be said where the package is missing."""
    return "" if INSTALLED else "the package DALL-E is not installed: our network stands in for it"


@functools.cache
def _weights() -> Path:
    _folders.append(tempfile.TemporaryDirectory(prefix="bench-"))
    path = Path(_folders[-1].name) / "encoder.safetensors"
    torch.manual_seed(0)
    save_file(DalleEncoder().state_dict(), path)
    return path
