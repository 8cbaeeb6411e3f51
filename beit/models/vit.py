"""The Vision Transformer of BEiT, for pretraining, classification and segmentation alike."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit.errors import UserError
from beit.models.drop_path import kept_branches, thresholds
from beit.models.layers import NORM_EPS, Block, PatchEmbedding, RelativePosition
from beit.models.position import (
    Grid,
    RelativePositionBias,
    ResizedPositions,
    resize_position_embedding,
)
from beit.sizes import height_width, patch_grid


class VisionTransformer(nn.Module):
    """ViT with a mask token, relative position bias and LayerScale; keys of the released weights.

    Args:
        image_size: pixels, one side or (H, W); each a multiple of `patch_size`.
        patch_size: pixels on a side of the square patch.
        width, depth, num_heads: D, number of blocks, attention heads; heads divide D.
        absolute_position: learned position embedding added to the tokens.
        relative_position: "shared" one bias table for all blocks (pretraining), "per_block" a
            table in each (fine-tuning), "none".
        layer_scale: first value of γ (0.1 base, 1e-5 large); 0 leaves LayerScale out.
        drop_path_rate: of the last block; rises linearly from 0 in the first.
        mask_token: whether `forward` takes a mask.
        final_norm: LayerNorm after the last block; without it the classification head normalises.
        norm_eps: of every LayerNorm; 1e-6 in the released weights, transformers' default is 1e-12.
        activation_checkpointing: keep only the blocks' inputs for the backward pass and work the
            rest out again: much less memory, a third more work, the same gradients.
        any_size: take images of any multiple of `patch_size`: bias tables (geometrically) and
            positions (bicubically) are resized on the way, gradients pass through.
        init_std, init_cut: weights are normal with this deviation, redrawn beyond ±init_cut.
            Pretraining cuts at ±0.02, one deviation, which leaves 0.0108; fine-tuning at ±2.

    Attributes: `grid` (h, w), `image_size` (H, W), `patch_size`, `width`, `depth`, `num_heads`.
    `sample_keys` (B,) int64, if set, is what stochastic depth draws from in training: one key for
    each sample of the next batch (see `drop_path`). None: torch's generator.

    Raises:
        UserError: sizes that don't divide, rates outside [0, 1), an unknown `relative_position`.
    """

    drop_limits: Tensor

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        *,
        in_channels: int = 3,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        absolute_position: bool,
        relative_position: RelativePosition,
        layer_scale: float,
        drop_rate: float = 0.0,
        attention_drop_rate: float = 0.0,
        drop_path_rate: float,
        mask_token: bool,
        final_norm: bool,
        norm_eps: float = NORM_EPS,
        init_std: float = 0.02,
        init_cut: float,
        activation_checkpointing: bool = False,
        any_size: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = height_width(image_size)
        self.patch_size = patch_size
        self.grid = patch_grid(self.image_size, patch_size)
        self.width, self.depth, self.num_heads = width, depth, num_heads
        self.drop_rate = drop_rate
        self.activation_checkpointing = activation_checkpointing
        self.any_size = any_size
        _check_sizes(width, depth, num_heads)
        _check_rates(drop_rate, attention_drop_rate, drop_path_rate)
        for name, value in {
            "mlp_ratio": mlp_ratio,
            "init_std": init_std,
            "init_cut": init_cut,
            "norm_eps": norm_eps,
        }.items():
            if value <= 0:
                raise UserError(f"{name} {value} must be positive")
        _check_relative_position(relative_position)

        num_tokens = 1 + math.prod(self.grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_token else None
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, num_tokens, width)) if absolute_position else None
        )
        self._resized_positions = ResizedPositions(resize_position_embedding)
        self.patch_embed = PatchEmbedding(patch_size, in_channels, width)
        self.rel_pos_bias = (
            RelativePositionBias(self.grid, num_heads) if relative_position == "shared" else None
        )
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.sample_keys: Tensor | None = None
        self.register_buffer("drop_limits", thresholds(rates), persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                mlp_ratio=mlp_ratio,
                table_grid=self.grid if relative_position == "per_block" else None,
                layer_scale=layer_scale,
                drop_rate=drop_rate,
                attention_drop_rate=attention_drop_rate,
                drop_path_rate=rate,
                norm_eps=norm_eps,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps) if final_norm else nn.Identity()
        self._initialise(init_std, init_cut)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B,3,H,W), normalised, and mask (B,h,w) bool -> tokens (B,1+N,D), CLS first.

        True in the mask hides the patch: its embedding is replaced by the mask token.

        Raises:
            UserError: an image or mask of another size, or a mask for a model without mask token.
        """
        x = self._embed(images, mask)
        grid = self._other_grid(images)
        bias = self._shared_bias(x, grid)
        kept = self._kept_branches(len(x))
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, bias, None if kept is None else kept[i], grid)
        return self.norm(x)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of `forward`, and of each block for `forward_blocks`."""
        super().compile(*args, **kwargs)
        for block in self.blocks:
            block.compile(*args, **kwargs)

    def forward_blocks(
        self, images: Tensor, mask: Tensor | None = None, *, taps: Sequence[int]
    ) -> list[Tensor]:
        """Outputs (B,1+N,D) of the blocks in `taps`, counted from 0, without the final norm.

        Returned in the order of `taps`; blocks after the last of them are not run.

        Raises:
            UserError: a tap outside 0 ... depth-1, or what `forward` raises.
        """
        if not taps or not all(0 <= tap < self.depth for tap in taps):
            raise UserError(
                f"taps {list(taps)} must name blocks 0 to {self.depth - 1}, at least one"
            )
        x = self._embed(images, mask)
        grid = self._other_grid(images)
        bias = self._shared_bias(x, grid)
        outputs: dict[int, Tensor] = {}
        kept = self._kept_branches(len(x))
        for i, block in enumerate(self.blocks[: max(taps) + 1]):
            x = self._run(block, x, bias, None if kept is None else kept[i], grid)
            if i in taps:
                outputs[i] = x
        return [outputs[tap] for tap in taps]

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        bias: Tensor | None,
        kept: Tensor | None,
        grid: Grid | None,
    ) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, bias, kept, grid, use_reentrant=False)
        return block(x, bias, kept, grid)

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input(images, mask)
        patches = self.patch_embed(images)
        if mask is not None and self.mask_token is not None:
            patches = torch.where(mask.flatten(1)[..., None], self.mask_token, patches)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        if self.pos_embed is not None:
            x = x + self._positions(self._other_grid(images))
        return nn.functional.dropout(x, self.drop_rate, self.training)

    @torch.compiler.disable  # its 64-bit arithmetic is beyond inductor's C++
    def _kept_branches(self, batch: int) -> Tensor | None:
        """(depth,2,B) bool from the samples' keys; None where torch's generator is to draw."""
        if not self.training or self.sample_keys is None:
            return None
        assert len(self.sample_keys) == batch, "the keys are of another batch"
        return kept_branches(self.sample_keys, self.drop_limits)

    def _positions(self, grid: Grid | None) -> Tensor:
        assert self.pos_embed is not None
        if grid is None:
            return self.pos_embed
        return self._resized_positions(self.pos_embed, self.grid, grid)

    def _grid_of(self, images: Tensor) -> Grid:
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    def _other_grid(self, images: Tensor) -> Grid | None:
        """The grid (h,w) of the images where it is not the model's own."""
        grid = self._grid_of(images)
        return None if grid == self.grid else grid

    def _shared_bias(self, x: Tensor, grid: Grid | None) -> Tensor | None:
        """The shared bias (heads,1+N,1+N), gathered and cast once for all blocks."""
        if self.rel_pos_bias is None:
            return None
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        return self.rel_pos_bias(grid).to(torch.get_autocast_dtype(device) if autocast else x.dtype)

    def _check_input(self, images: Tensor, mask: Tensor | None) -> None:
        if self.any_size:
            self._check_multiple(images)
        elif images.ndim != 4 or tuple(images.shape[2:]) != self.image_size:
            raise UserError(
                f"images of shape {tuple(images.shape)}: this model takes (B, C, H, W) with H, W ="
                f" {self.image_size}; resize the images or build the model with their size"
            )
        if mask is None:
            return
        if self.mask_token is None:
            raise UserError(
                "a mask was given to a model without mask token; build it with mask_token=True"
            )
        expected = (len(images), *self._grid_of(images))
        if tuple(mask.shape) != expected or mask.dtype != torch.bool:
            raise UserError(
                f"mask of shape {tuple(mask.shape)} and type {mask.dtype}: expected bool of shape"
                f" {expected} (B, h, w)"
            )

    def _check_multiple(self, images: Tensor) -> None:
        sides, patch = tuple(images.shape[2:]), self.patch_size
        if images.ndim != 4 or min(sides) < patch or any(side % patch for side in sides):
            raise UserError(
                f"images of shape {tuple(images.shape)}: this model takes (B, C, H, W) with H and W"
                f" multiples of the patch size {patch}; pad or resize the images"
            )

    @torch.no_grad()
    def _initialise(self, std: float, cut: float) -> None:
        for parameter in (self.cls_token, self.mask_token, self.pos_embed):
            if parameter is not None:
                truncated_normal_(parameter, std, cut)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                truncated_normal_(module.weight, std, cut)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # the depth rescale comes last: it divides what the initialisation drew
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2 * number))
            block.mlp.fc2.weight.div_(math.sqrt(2 * number))


def truncated_normal_(tensor: Tensor, std: float, cut: float) -> None:
    """Fills with normal(0, std) truncated to ±cut, an absolute value and not a multiple of std."""
    nn.init.trunc_normal_(tensor, std=std, a=-cut, b=cut)


def _check_sizes(width: int, depth: int, num_heads: int) -> None:
    if min(width, depth, num_heads) < 1 or width % num_heads:
        raise UserError(
            f"width {width}, depth {depth}, num_heads {num_heads}: all must be positive and the"
            " heads must divide the width"
        )


def _check_rates(drop_rate: float, attention_drop_rate: float, drop_path_rate: float) -> None:
    rates = {
        "drop_rate": drop_rate,
        "attention_drop_rate": attention_drop_rate,
        "drop_path_rate": drop_path_rate,
    }
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"{name} {rate} must lie in [0, 1)")


def _check_relative_position(kind: str) -> None:
    if kind not in ("none", "shared", "per_block"):
        raise UserError(f"relative_position {kind!r} must be 'none', 'shared' or 'per_block'")
