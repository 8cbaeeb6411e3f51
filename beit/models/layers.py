"""The Transformer block: attention with relative bias, MLP, LayerScale, stochastic depth."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.models.drop_path import add_rows
from beit.models.position import BiasTable, Grid

NORM_EPS = 1e-6

RelativePosition = Literal["none", "shared", "per_block"]


class PatchEmbedding(nn.Module):
    """Images (B,C,H,W) -> patch tokens (B,N,D), row-major.

    The released key and shape are a convolution's; computed as the matrix product it is, which is
    the faster way (1.7 times on the CPU in bf16, forward and backward).
    """

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        size = self.proj.stride[0]
        batch, channels, height, width = images.shape
        patches = images.reshape(batch, channels, height // size, size, width // size, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C·P·P)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(BiasTable):
    """Multi-head self-attention with q and v bias; `table_grid` gives the block its own bias table.

    A bias of k would cancel in the softmax: there is none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        table_grid: Grid | None,
        drop_rate: float,
        attention_drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scale = self.head_dim**-0.5
        self.drop_rate = drop_rate
        self.attention_drop_rate = attention_drop_rate
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        if table_grid is not None:
            self.add_table(table_grid, num_heads)

    def forward(self, x: Tensor, bias: Tensor | None, grid: Grid | None = None) -> Tensor:
        """x (B,1+N,D) and the shared bias (heads,1+N,1+N) -> (B,1+N,D).

        `grid` (h,w) is that of x, where it is not the own table's.
        """
        batch, tokens, width = x.shape
        q, k, v, bias = self._inputs(x, bias, grid)
        drop_rate = self.attention_drop_rate if self.training else 0.0
        if x.device.type == "cpu" and (torch.is_grad_enabled() or q.dtype == torch.bfloat16):
            out = explicit_attention(q, k, v, bias, self.scale, drop_rate)
        else:
            mask = None if bias is None else bias[None]
            out = F.scaled_dot_product_attention(q, k, v, mask, drop_rate, scale=self.scale)
        out = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return F.dropout(out, self.drop_rate, self.training)

    def probabilities(self, x: Tensor, bias: Tensor | None, grid: Grid | None = None) -> Tensor:
        """Arguments of `forward` -> (B,heads,1+N,1+N): how much each query takes of each key."""
        q, k, _, bias = self._inputs(x, bias, grid)
        return attention_probabilities(q, k, bias, self.scale)

    def _inputs(
        self, x: Tensor, bias: Tensor | None, grid: Grid | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v (B,heads,1+N,head dim) and the bias (heads,1+N,1+N), the own table's if any."""
        batch, tokens, _ = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.relative_position_bias_table is not None:
            bias = self.table_bias(grid).to(q.dtype)
        return q, k, v, bias


def attention_probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(q kᵀ · scale + bias) for (B, heads, 1+N, head dim)."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores += bias  # the product's backward doesn't read its output
    return scores.softmax(dim=-1)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, drop_rate: float
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v for (B, heads, 1+N, head dim).

    On the CPU the fused kernel is the slower one in training, 2.9 times in bf16 at 197 tokens: a
    bias that needs a gradient sends it down a path of extra passes. Without gradients it is 1.8
    times slower in bf16 and twice as fast in float32. On GPUs it is the one to use.
    """
    return F.dropout(attention_probabilities(q, k, bias, scale), drop_rate) @ v


class MLP(nn.Module):
    """Linear, exact GELU, Linear; dropout after the second only, as in BERT."""

    def __init__(self, width: int, hidden: int, *, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.drop_rate, self.training)


class Block(nn.Module):
    """Pre-norm block: x + γ₁·attention(LN x), then x + γ₂·MLP(LN x), with stochastic depth.

    `layer_scale` 0 leaves γ out.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        table_grid: Grid | None,
        layer_scale: float,
        drop_rate: float,
        attention_drop_rate: float,
        drop_path_rate: float,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(
            width,
            num_heads,
            table_grid=table_grid,
            drop_rate=drop_rate,
            attention_drop_rate=attention_drop_rate,
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), drop_rate=drop_rate)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        kept: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """x (B,1+N,D) and the shared bias (heads,1+N,1+N) -> (B,1+N,D).

        `kept` (2,B) bool says which samples keep the two branches in training; without it they are
        drawn from torch's generator. `grid` (h,w) is that of x, where it is not the own table's.
        """
        first, second = (None, None) if kept is None else kept
        x = self._residual(
            x, lambda rows: self.attn(self.norm1(rows), bias, grid), self.gamma_1, first
        )
        return self._residual(x, lambda rows: self.mlp(self.norm2(rows)), self.gamma_2, second)

    def _residual(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        gamma: Tensor | None,
        kept: Tensor | None,
    ) -> Tensor:
        """x + drop_path(γ · branch(x)): each sample keeps its branch with probability 1 - rate."""
        if not self.training or self.drop_path_rate == 0:
            return x + (branch(x) if gamma is None else branch(x) * gamma)
        keep = 1 - self.drop_path_rate
        scale = 1 / keep if gamma is None else gamma / keep
        if kept is None:
            kept = torch.rand(x.shape[0], device=x.device) < keep
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            # a dropped branch is not computed at all; elsewhere reading `kept` would stall
            rows = kept.nonzero().squeeze(1)
            added = branch(x.index_select(0, rows)) * scale
            return add_rows(x, rows, added.to(x.dtype))
        return x + branch(x) * kept.to(x.dtype)[:, None, None] * scale
