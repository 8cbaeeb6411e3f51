"""Our own discrete VAE: convolutional encoder, Gumbel-softmax over a codebook, mirrored decoder.

BEiT (section 2.1) took its visual tokens from DALL-E's discrete VAE; its own re-trained one (table
8) cost 0.16 points. No training script was released for either: the sizes and schedules are ours.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from beit.checkpoints.models import load_part, read_checkpoint
from beit.errors import UserError
from beit.sizes import height_width, token_grid
from beit.tokenizers.codebook import gumbel_softmax

INITIAL_LOGIT_STD = 3.0  # well above the 1.28 of the Gumbel noise


class DVAEOutput(NamedTuple):
    """One training pass."""

    reconstructions: Tensor  # (B, 3, H, W) float32, around [-1, 1] but not clamped
    logits: Tensor  # (B, h, w, V) float32
    features: Tensor  # (B, h, w, D) that the logits are linear in


class ResidualBlock(nn.Module):
    """3x3, 3x3, 1x1 convolutions with a skip, as in the reference's own dVAE class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x)


class DiscreteVAE(nn.Module):
    """Trainable image tokenizer. `encode` takes [-1, 1], `decode` returns [0, 1].

    Channels double as the grid halves and reach `hidden_dim` on the token grid, where the residual
    blocks stand: most of the work is done on few positions.

    Args:
        image_size: [H, W] it is trained on, or a number for both; it takes other sizes too.
        stride: pixels a token covers, a power of two; 4: 8x8 tokens at 32 px, 8: 14x14 at 112 px.
        vocab_size: V.
        codebook_dim: width of a code.
        hidden_dim: channels on the token grid.
        num_res_blocks: residual blocks in the encoder, and as many in the decoder.
        normalize_features: batch-normalise what the logits are linear in, and start from logits of
            standard deviation `INITIAL_LOGIT_STD`. Nearly all codes then take part from the first
            step; without it positions differ too little and a few codes win (docs/tokenizer.md).
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        stride: int,
        vocab_size: int,
        codebook_dim: int,
        hidden_dim: int,
        num_res_blocks: int,
        normalize_features: bool = False,
    ) -> None:
        super().__init__()
        levels = stride.bit_length() - 1
        if stride < 2 or stride != 1 << levels:
            raise UserError(f"stride {stride}: expected a power of two from 2 on; try 4 or 8")
        if min(codebook_dim, hidden_dim) < 1 or num_res_blocks < 0:
            raise UserError(
                f"codebook_dim {codebook_dim}, hidden_dim {hidden_dim}, num_res_blocks "
                f"{num_res_blocks}: the widths must be at least 1, the blocks not negative"
            )
        if vocab_size < 2:
            raise UserError(f"vocab_size {vocab_size}: expected at least 2 codes")
        if hidden_dim % (1 << levels):
            raise UserError(
                f"hidden_dim {hidden_dim}: expected a multiple of {1 << levels}, because channels "
                f"halve at each of the {levels} steps of stride {stride}"
            )
        self.image_size = height_width(image_size)
        self.stride = stride
        self.vocab_size = vocab_size
        self.codebook_dim = codebook_dim
        self.hidden_dim = hidden_dim
        self.num_res_blocks = num_res_blocks
        self.normalize_features = normalize_features
        self.grid(self.image_size)

        widths = [hidden_dim >> i for i in reversed(range(levels))]  # e.g. 32, 64, 128
        self.encoder = _encoder(widths, num_res_blocks)
        # a linear layer over channels-last features: softmax over a contiguous last axis is several
        # times faster than over the second axis of (B, V, h, w)
        self.to_logits = nn.Linear(hidden_dim, vocab_size)
        if normalize_features:
            self.encoder.append(nn.BatchNorm2d(hidden_dim, affine=False))
            nn.init.normal_(self.to_logits.weight, std=INITIAL_LOGIT_STD / math.sqrt(hidden_dim))
            nn.init.zeros_(self.to_logits.bias)
        self.codebook = nn.Parameter(torch.randn(vocab_size, codebook_dim))
        self.decoder = _decoder(widths, codebook_dim, num_res_blocks)
        self.to(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return (
            f"image_size={self.image_size}, stride={self.stride}, vocab_size={self.vocab_size}, "
            f"codebook_dim={self.codebook_dim}, hidden_dim={self.hidden_dim}, "
            f"num_res_blocks={self.num_res_blocks}, "
            f"normalize_features={self.normalize_features}, value_range={self.value_range}"
        )

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) -> (h, w). Raises UserError where the stride does not divide the image."""
        return token_grid(image_size, self.stride)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, h, w, hidden_dim), what the logits are linear in."""
        self.grid((images.shape[-2], images.shape[-1]))
        images = images.contiguous(memory_format=torch.channels_last)
        return self.encoder(images).permute(0, 2, 3, 1)

    def forward(
        self, images: Tensor, *, temperature: float, generator: Generator | None = None
    ) -> DVAEOutput:
        """Gumbel-softmax pass: (B, 3, H, W) in [-1, 1] -> reconstructions and logits.

        `generator` lives on the device of the images; without one the noise is torch's global.
        """
        features = self.features(images)
        logits = self.to_logits(features).float()
        codes = gumbel_softmax(logits, temperature=temperature, generator=generator)
        reconstructions = self._decode_codes(codes @ self.codebook).float()
        return DVAEOutput(reconstructions, logits, features)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, h, w) int64 in [0, V): the likeliest code."""
        features = self.features(images).float()
        # bfloat16 logits tie often, and argmax would then favour low ids
        with torch.autocast(features.device.type, enabled=False):
            return self.to_logits(features).argmax(dim=-1)

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """(B, h, w) int64 in [0, V) -> (B, 3, H, W) float32 in [0, 1]."""
        pixels = self._decode_codes(self.codebook[token_ids]).float()
        return ((pixels + 1) / 2).clamp(0, 1)

    def _decode_codes(self, codes: Tensor) -> Tensor:
        return self.decoder(codes.permute(0, 3, 1, 2))  # (B, h, w, C) -> (B, 3, H, W)


def _encoder(widths: list[int], num_res_blocks: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source, target in zip([3, *widths[:-1]], widths, strict=True):
        layers += [nn.Conv2d(source, target, 4, stride=2, padding=1), nn.ReLU()]
    layers += [ResidualBlock(widths[-1]) for _ in range(num_res_blocks)]
    return nn.Sequential(*layers)


def _decoder(widths: list[int], codebook_dim: int, num_res_blocks: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(codebook_dim, widths[-1], 1)]
    layers += [ResidualBlock(widths[-1]) for _ in range(num_res_blocks)]
    downward = [*reversed(widths), max(widths[0] // 2, 3)]
    for source, target in itertools.pairwise(downward):
        layers += [nn.ConvTranspose2d(source, target, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(downward[-1], 3, 1))


def load_dvae(path: str, *, vocab_size: int, stride: int) -> DiscreteVAE:
    """Rebuild a trained dVAE from one of our training checkpoints, which says its own sizes.

    Args:
        path: a checkpoint of dVAE training.
        vocab_size, stride: what the rest of the recipe counts on; the checkpoint must agree.

    Raises:
        UserError: no such file, not such a checkpoint, another vocabulary or stride.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint.config.get("tokenizer")
    arguments = dict(config) if isinstance(config, dict) else {}
    target = arguments.pop("_target_", "no tokenizer")
    if target != f"{DiscreteVAE.__module__}.{DiscreteVAE.__qualname__}":
        raise UserError(
            f"{path} is not of dVAE training: its config names {target}; give the checkpoint that "
            "`beit train task=tokenizer` wrote"
        )
    for name, wanted in (("vocab_size", vocab_size), ("stride", stride)):
        if arguments.get(name) != wanted:
            raise UserError(
                f"{path}: {name} is {arguments.get(name)}, expected {wanted}; set {name} to the "
                "former or give another checkpoint"
            )
    tokenizer = DiscreteVAE(**arguments)
    load_part(tokenizer, checkpoint, "tokenizer")
    return tokenizer.eval().requires_grad_(False)
