"""Our own discrete VAE: convolutional encoder, Gumbel-softmax over a codebook, mirrored decoder.

BEiT (section 2.1) took its visual tokens from DALL-E's discrete VAE; its own re-trained one (table 8)
cost 0.16 points. No training script was released for either, so the sizes and schedules here are ours.
"""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from beit.errors import UserError


class DVAEOutput(NamedTuple):
    """One training pass."""

    reconstructions: Tensor  # (B, 3, H, W) float32, around [-1, 1] but not clamped
    logits: Tensor  # (B, h, w, V) float32


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
        image_size: H and W of the images it is trained on; being convolutional, it takes others too.
        stride: pixels a token covers, a power of two: 4 gives 8x8 tokens at 32 px, 8 gives 14x14 at 112.
        vocab_size: V.
        codebook_dim: width of a code.
        hidden_dim: channels on the token grid.
        num_res_blocks: residual blocks in the encoder, and as many in the decoder.
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        *,
        image_size: Sequence[int],
        stride: int,
        vocab_size: int,
        codebook_dim: int,
        hidden_dim: int,
        num_res_blocks: int,
    ) -> None:
        super().__init__()
        levels = stride.bit_length() - 1
        if stride < 2 or stride != 1 << levels:
            raise UserError(f"stride {stride}: expected a power of two from 2 on; try 4 or 8")
        if vocab_size < 2:
            raise UserError(f"vocab_size {vocab_size}: expected at least 2 codes")
        if hidden_dim % (1 << levels):
            raise UserError(
                f"hidden_dim {hidden_dim}: expected a multiple of {1 << levels}, because channels "
                f"halve at each of the {levels} steps of stride {stride}"
            )
        if len(image_size) != 2:
            raise UserError(f"image_size {list(image_size)}: expected [height, width]")
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.stride = stride
        self.vocab_size = vocab_size
        self.codebook_dim = codebook_dim
        self.hidden_dim = hidden_dim
        self.num_res_blocks = num_res_blocks
        self.grid(self.image_size)

        widths = [hidden_dim >> i for i in reversed(range(levels))]  # e.g. 32, 64, 128
        self.encoder = _encoder(widths, num_res_blocks)
        # a linear layer over channels-last features: softmax over a contiguous last axis is several
        # times faster than over the second axis of (B, V, h, w)
        self.to_logits = nn.Linear(hidden_dim, vocab_size)
        self.codebook = nn.Parameter(torch.randn(vocab_size, codebook_dim))
        self.decoder = _decoder(widths, codebook_dim, num_res_blocks)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extra_repr(self) -> str:
        return (
            f"image_size={self.image_size}, stride={self.stride}, vocab_size={self.vocab_size}, "
            f"codebook_dim={self.codebook_dim}, hidden_dim={self.hidden_dim}, "
            f"num_res_blocks={self.num_res_blocks}, value_range={self.value_range}"
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
        logits = self.to_logits(self.features(images)).float()
        codes = gumbel_softmax(logits, temperature=temperature, generator=generator)
        return DVAEOutput(self._decode_codes(codes @ self.codebook).float(), logits)

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
    for source, target in zip(downward[:-1], downward[1:], strict=True):
        layers += [nn.ConvTranspose2d(source, target, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(downward[-1], 3, 1))


def token_grid(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(H, W) -> (h, w). Raises UserError where the stride does not divide the image."""
    height, width = image_size
    if height < stride or width < stride or height % stride or width % stride:
        raise UserError(
            f"image size {height}x{width}: expected multiples of {stride}, the pixels a token "
            f"covers; resize to {max(height // stride, 1) * stride}x"
            f"{max(width // stride, 1) * stride}, or change the tokenizer's stride"
        )
    return height // stride, width // stride


def gumbel_softmax(
    logits: Tensor, *, temperature: float, generator: Generator | None = None
) -> Tensor:
    """(..., V) -> relaxed one-hot samples (..., V), by Gumbel noise and a softmax."""
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()  # minus Gumbel
    return ((logits - noise) / temperature).softmax(dim=-1)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Mean over positions of KL(softmax(logits) || uniform), in nats: (..., V) -> ()."""
    log_q = logits.log_softmax(dim=-1)
    return (log_q.exp() * log_q).sum(dim=-1).mean() + math.log(logits.shape[-1])


def mean_distribution(logits: Tensor) -> Tensor:
    """How much of the batch each code takes: (..., V) -> (V,), sums to one."""
    return logits.softmax(dim=-1).flatten(0, -2).mean(dim=0)


def distribution_kl_to_uniform(probabilities: Tensor) -> Tensor:
    """KL(p || uniform) in nats: (V,) -> (). Zero when all codes are used equally."""
    log_p = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return (probabilities * log_p).sum() + math.log(probabilities.numel())


def count_codes(token_ids: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs: any shape of ids -> (V,) int64."""
    return torch.bincount(token_ids.flatten(), minlength=vocab_size)


def used_share(counts: Tensor) -> Tensor:
    """Share of the codes that occur at all: (V,) -> () in 0..1."""
    return (counts > 0).float().mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code histogram: (V,) -> () from 1 (one code) to V (all equal)."""
    p = counts.double() / counts.sum().clamp_min(1)
    return torch.special.entr(p).sum().exp().float()


@torch.no_grad()
def split_codes(
    tokenizer: DiscreteVAE, dead: Tensor, parents: Tensor, *, noise: float, generator: Generator
) -> None:
    """Put each dead code beside a busy one: same encoder row and code vector plus a little noise.

    Parent and child share the parent's probability (log 2 off both biases for a pair), so the split
    alone changes nothing in expectation; the noise lets the two drift apart.

    Args:
        dead: (n,) ids of codes to revive.
        parents: (n,) ids to copy from, repeats allowed, none of them dead.
        noise: standard deviation, relative to that of the rows copied.
        generator: on the device of the parameters; the same on all ranks.
    """
    family = torch.bincount(parents, minlength=tokenizer.vocab_size) + 1
    bias = tokenizer.to_logits.bias
    bias -= family.to(bias.dtype).log()
    bias[dead] = bias[parents]
    for table in (tokenizer.to_logits.weight, tokenizer.codebook):
        rows = table[parents]
        scale = noise * rows.std()
        table[dead] = rows + scale * torch.empty_like(rows).normal_(generator=generator)


def load_dvae(path: str, *, vocab_size: int) -> DiscreteVAE:
    """Rebuild a trained dVAE from one of our training checkpoints, which says its own sizes.

    Args:
        path: a `.ckpt` written by dVAE training.
        vocab_size: what the rest of the recipe counts on; the checkpoint must agree.

    Raises:
        UserError: no such file, not such a checkpoint, or another vocabulary.
    """
    checkpoint = _read_checkpoint(Path(path))
    arguments = dict(checkpoint["beit"]["config"]["tokenizer"])
    arguments.pop("_target_", None)
    if arguments.get("vocab_size") != vocab_size:
        raise UserError(
            f"{path}: holds a tokenizer of {arguments.get('vocab_size')} codes, expected "
            f"{vocab_size}; set vocab_size to the former or point to another checkpoint"
        )
    tokenizer = DiscreteVAE(**arguments)
    prefix = "tokenizer."
    state = {
        key.removeprefix(prefix): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
    tokenizer.load_state_dict(state)
    return tokenizer.eval().requires_grad_(False)


def _read_checkpoint(path: Path) -> dict:
    mend = "give the .ckpt that `beit train` wrote for a dVAE"
    if not path.is_file():
        raise UserError(f"tokenizer checkpoint {path}: no such file; {mend}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"tokenizer checkpoint {path}: not readable as weights; {mend}") from error
    try:
        target = checkpoint["beit"]["config"]["tokenizer"]["_target_"]
        keys = checkpoint["state_dict"].keys()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"tokenizer checkpoint {path}: lacks our config or weights; {mend}") from error
    if not target.endswith(".DiscreteVAE") or not any(k.startswith("tokenizer.") for k in keys):
        raise UserError(f"tokenizer checkpoint {path}: holds {target}, not a dVAE; {mend}")
    return checkpoint
