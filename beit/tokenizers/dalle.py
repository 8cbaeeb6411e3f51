"""The tokenizer BEiT was pretrained with: DALL-E's discrete VAE (Ramesh et al., arXiv 2102.12092).

Rebuilt from its published architecture, with its parameter names; the weights come from files that
the user gives. 8,192 codes, one for 8x8 pixels.
"""

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit.errors import UserError
from beit.sizes import token_grid
from beit.tokenizers.pickles import read_tensors

log = logging.getLogger(__name__)

VOCAB_SIZE = 8192
STRIDE = 8  # three poolings
NUM_GROUPS = 4
BLOCKS_PER_GROUP = 2
ENCODER_KERNELS = (3, 3, 3, 1)
DECODER_KERNELS = (1, 3, 3, 3)
ENCODER_WIDTH = 256  # n_hid; the groups have 1, 2, 4 and 8 times as many channels
DECODER_WIDTH = 256  # the groups have 8, 4, 2 and 1 times as many
DECODER_INPUT = 128  # n_init
EPS = 0.1  # of the logit-Laplace distribution: pixels lie in [EPS, 1 - EPS]


class Conv2d(nn.Module):
    """Same-padded convolution with the original's parameter names `w` and `b`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, fp32: bool, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.w, std=1 / math.sqrt(in_channels * kernel**2))
        self.fp32 = fp32  # the encoder's last and the decoder's first are float32 in the original
        self.gain = gain  # of the output

    def forward(self, x: Tensor) -> Tensor:
        padding = self.w.shape[-1] // 2
        if not self.fp32:
            w, b = (self.w, self.b) if self.gain == 1 else (self.w * self.gain, self.b * self.gain)
            return F.conv2d(x, w, b, padding=padding)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=padding)


class Block(nn.Module):
    """Bottleneck residual block without norms, its path scaled down by the depth squared."""

    def __init__(self, in_channels: int, out_channels: int, kernels: Sequence[int]) -> None:
        super().__init__()
        hidden = out_channels // 4
        channels = [in_channels, hidden, hidden, hidden, out_channels]
        self.id_path: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.id_path = Conv2d(in_channels, out_channels, 1, fp32=False)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        # a power of two: taken into the last weights it gives the same numbers, and one pass less
        gain = 1 / (NUM_GROUPS * BLOCKS_PER_GROUP) ** 2
        for i, kernel in enumerate(kernels, start=1):
            last = i == len(kernels)
            path[f"relu_{i}"] = nn.ReLU(inplace=i > 1)  # the first one's input is the id path's too
            path[f"conv_{i}"] = Conv2d(
                channels[i - 1], channels[i], kernel, fp32=False, gain=gain if last else 1.0
            )
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_path(x).add_(self.id_path(x))


def _group(
    in_channels: int, out_channels: int, kernels: Sequence[int], resize: nn.Module
) -> nn.Sequential:
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(BLOCKS_PER_GROUP):
        source = in_channels if i == 0 else out_channels
        blocks[f"block_{i + 1}"] = Block(source, out_channels, kernels)
    blocks["resize"] = resize  # without parameters, so that its name shows in no key
    return nn.Sequential(blocks)


def _output(in_channels: int, out_channels: int, *, fp32: bool) -> nn.Sequential:
    conv = Conv2d(in_channels, out_channels, 1, fp32=fp32)
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv))


class DalleEncoder(nn.Module):
    """(B, 3, H, W) in [0.1, 0.9] -> logits (B, 8192, H/8, W/8). 53,786,240 parameters."""

    def __init__(self) -> None:
        super().__init__()
        width = ENCODER_WIDTH
        groups: OrderedDict[str, nn.Module] = OrderedDict()
        groups["input"] = Conv2d(3, width, 7, fp32=False)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for i in range(NUM_GROUPS):
            last = i == NUM_GROUPS - 1
            resize = nn.Identity() if last else nn.MaxPool2d(2)
            groups[f"group_{i + 1}"] = _group(widths[i], widths[i + 1], ENCODER_KERNELS, resize)
        groups["output"] = _output(widths[-1], VOCAB_SIZE, fp32=True)
        self.blocks = nn.Sequential(groups)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)

    def before_output(self, images: Tensor) -> Tensor:
        """What the last layer sees: (B, 2048, H/8, W/8), not negative."""
        x = images
        for layer in [*self.blocks.children()][:-1]:
            x = layer(x)
        return F.relu(x)

    @property
    def last(self) -> Conv2d:
        """The layer of the logits."""
        last = self.get_submodule("blocks.output.conv")
        assert isinstance(last, Conv2d)
        return last


class LikeliestCode:
    """argmax over the codes of a linear layer in float32, for inputs in bfloat16; on the CPU.

    The encoder's last layer is an eighth of its work, and three eighths of its time where float32
    is slow. A product in bfloat16 tells which codes can be the largest: those that come as near to
    its own largest one as rounding allows. Only theirs is worked out in float32.

    Args:
        weight, bias: (V, C) and (V,) in float32; they may not change afterwards.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.coarse = weight.bfloat16()
        self.lost = float((weight - self.coarse.float()).norm(dim=1).amax())
        self.largest_bias = float(bias.abs().amax())

    def __call__(self, rows: Tensor) -> Tensor:
        """bfloat16 (N, C) -> int64 (N,)."""
        with torch.autocast(rows.device.type, enabled=False):
            rough = F.linear(rows, self.coarse, self.bias.bfloat16())
        exact = rows.float()
        top = rough.amax(dim=1, keepdim=True).float()
        # by how much two of them may be off: the weights' rounding (Cauchy and Schwarz), and that
        # of bias, sum and result
        slack = 2 * self.lost * exact.norm(dim=1, keepdim=True)
        slack += 3 * 2**-8 * (top.abs() + self.largest_bias)
        row, code = (rough >= (top - slack).bfloat16()).nonzero(as_tuple=True)
        logits = (exact[row] * self.weight[code]).sum(dim=1) + self.bias[code]
        best = torch.full((len(rows),), -torch.inf).scatter_reduce(0, row, logits, "amax")
        first = logits == best[row]  # of equals the first, as argmax has it
        ids = torch.full((len(rows),), len(self.weight))
        return ids.scatter_reduce(0, row[first], code[first], "amin")


class DalleDecoder(nn.Module):
    """One-hot codes (B, 8192, h, w) -> (B, 6, 8h, 8w). 43,829,766 parameters.

    The first three channels are the logits of the pixels' means, the others log-scales.
    """

    def __init__(self) -> None:
        super().__init__()
        width = DECODER_WIDTH
        groups: OrderedDict[str, nn.Module] = OrderedDict()
        groups["input"] = Conv2d(VOCAB_SIZE, DECODER_INPUT, 1, fp32=True)
        widths = [DECODER_INPUT, 8 * width, 4 * width, 2 * width, width]
        for i in range(NUM_GROUPS):
            last = i == NUM_GROUPS - 1
            resize = nn.Identity() if last else nn.Upsample(scale_factor=2, mode="nearest")
            groups[f"group_{i + 1}"] = _group(widths[i], widths[i + 1], DECODER_KERNELS, resize)
        groups["output"] = _output(width, 6, fp32=False)
        self.blocks = nn.Sequential(groups)

    def forward(self, codes: Tensor) -> Tensor:
        return self.blocks(codes)

    def forward_ids(self, token_ids: Tensor) -> Tensor:
        """The same for ids (B, h, w): a row of the first convolution for each, no one-hot."""
        layers = iter(self.blocks.children())
        first = next(layers)
        assert isinstance(first, Conv2d)
        table = first.w[:, :, 0, 0].t()  # (V, C)
        x = (F.embedding(token_ids, table) + first.b).permute(0, 3, 1, 2)
        for layer in layers:
            x = layer(x)
        return x


class DalleTokenizer(nn.Module):
    """DALL-E's discrete VAE. `encode` takes [0.1, 0.9], `decode` returns [0, 1].

    Args:
        encoder_path: weights: tensors only (`.pt`, `.safetensors`), or the original `encoder.pkl`.
        decoder_path: likewise; None for a tokenizer that only encodes, enough for pretraining.
        vocab_size, stride: 8192 and 8, nothing else; for the rest of a config to refer to.

    Raises:
        UserError: no such file, a file that holds more than such weights, other shapes.
    """

    value_range = (EPS, 1 - EPS)

    def __init__(
        self,
        encoder_path: str,
        *,
        decoder_path: str | None,
        vocab_size: int = VOCAB_SIZE,
        stride: int = STRIDE,
    ) -> None:
        super().__init__()
        if (vocab_size, stride) != (VOCAB_SIZE, STRIDE):
            raise UserError(
                f"vocab_size {vocab_size}, stride {stride}: DALL-E's tokenizer has {VOCAB_SIZE} "
                f"and {STRIDE}, and no others; leave them out"
            )
        self.vocab_size = vocab_size
        self.stride = stride
        self.encoder = DalleEncoder()
        _load(self.encoder, encoder_path)
        self._likeliest: LikeliestCode | None = None  # made when it is first asked
        self.decoder: DalleDecoder | None = None
        if decoder_path is not None:
            self.decoder = DalleDecoder()
            _load(self.decoder, decoder_path)

    def __repr__(self) -> str:
        low, high = self.value_range
        return (
            f"DalleTokenizer(vocab_size={self.vocab_size}, stride={self.stride}, "
            f"value_range={low:.4g}..{high:.4g}, decoder={self.decoder is not None})"
        )

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) -> (h, w). Raises UserError where the stride does not divide the image."""
        return token_grid(image_size, self.stride)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0.1, 0.9] -> (B, h, w) int64 in [0, 8192): the likeliest code."""
        self.grid((images.shape[-2], images.shape[-1]))
        images = images.contiguous(memory_format=torch.channels_last)  # what convolutions like
        x = self.encoder.before_output(images)
        output = self.encoder.last
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return output(x).argmax(dim=1)
        if self._likeliest is None:
            self._likeliest = LikeliestCode(output.w.flatten(1), output.b)
        ids = self._likeliest(x.permute(0, 2, 3, 1).flatten(0, 2))
        return ids.view(len(x), *x.shape[2:])

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """(B, h, w) int64 in [0, 8192) -> (B, 3, H, W) float32 in [0, 1]."""
        if self.decoder is None:
            raise UserError(
                "this DALL-E tokenizer has no decoder weights, it can only encode; set "
                "tokenizer.decoder_path to decoder.pkl or a file of its tensors"
            )
        means = self.decoder.forward_ids(token_ids)[:, :3].float().sigmoid()
        return ((means - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def _load(module: nn.Module, path: str) -> None:
    file = Path(path).expanduser()
    name = type(module).__name__
    tensors = read_tensors(file, what=f"{name} weights")
    expected = module.state_dict()
    if faults := list(_differences(tensors, expected)):
        raise UserError(
            f"{file} does not hold the weights of {name}: {'; '.join(faults[:3])}; give the "
            "original .pkl or a file of its tensors"
        )
    module.load_state_dict(tensors)
    log.info("%s: %s, sha256 %s", name, file, _sha256(file))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _differences(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[str]:
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            yield f"{key} is missing"
        elif key not in expected:
            yield f"{key} is not expected"
        elif tensors[key].shape != expected[key].shape:
            yield f"{key} is {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}"
