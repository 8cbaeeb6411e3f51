"""What tensors under the released names are of: the official files have no config, timm's little.

Both layouts have these names; see `unilm` and `timm` for what is around them.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from beit.errors import UserError
from beit.interop.decoder import LAST
from beit.interop.weights import (
    NORMALIZATIONS,
    Architecture,
    Kind,
    Pooling,
    Preprocessing,
    Settings,
)
from beit.models.layers import NORM_EPS, RelativePosition
from beit.models.position import relative_table_rows
from beit.models.transfer import INDEX, SHARED_TABLE, TABLE

HEADS_OF_WIDTH = {768: 12, 1024: 16}  # base and large, BEiT appendix B
LARGE = 24  # blocks; its LayerScale starts at 1e-5, base's at 0.1


def describe(
    tensors: Mapping[str, Tensor], path: Any, settings: Settings, notes: list[str]
) -> Architecture:
    """The architecture, as far as the tensors and the user tell.

    Raises:
        UserError: what neither tells, or the two contradict each other.
    """
    first = {key: _tensor(tensors, key, path) for key in ("cls_token", "patch_embed.proj.weight")}
    patches, width = first["patch_embed.proj.weight"], first["cls_token"].shape[-1]
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        raise UserError(
            f"{path}: patches of {list(patches.shape[2:])} pixels; expected square ones"
        )
    depth = _depth(tensors, path)
    relative = _relative(tensors, path)
    heads = _num_heads(tensors, relative, width, path, settings, notes)
    size = _image_size(tensors, relative, patches.shape[2], path, settings)
    scaled = "blocks.0.gamma_1" in tensors
    return Architecture(
        image_size=size,
        patch_size=patches.shape[2],
        in_channels=patches.shape[1],
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_hidden=len(_tensor(tensors, "blocks.0.mlp.fc1.weight", path)),
        absolute_position="pos_embed" in tensors,
        relative_position=relative,
        layer_scale=(1e-5 if depth >= LARGE else 0.1) if scaled else 0.0,
        mask_token="mask_token" in tensors,
        final_norm="norm.weight" in tensors,
        norm_eps=settings.norm_eps or NORM_EPS,
    )


def kind_of(tensors: Mapping[str, Tensor], path: Any) -> tuple[Kind, Pooling]:
    """By the heads there are. Raises UserError for one that is no matrix."""
    last = f"head.{LAST}"
    for key, sides in (("lm_head.weight", 2), ("head.weight", 2), (last, 4)):
        if key in tensors and tensors[key].ndim != sides:
            shape = list(tensors[key].shape)
            raise UserError(f"{path}: {key} has shape {shape}; expected classes by width")
    if last in tensors:
        return "segmentation", "none"
    if "lm_head.weight" in tensors:
        return "mim", "none"
    pooling: Pooling = "none"
    if "fc_norm.weight" in tensors:
        pooling = "mean"
    elif "norm.weight" in tensors:
        pooling = "cls"
    return ("classification" if "head.weight" in tensors else "backbone"), pooling


def assumed_preprocessing(
    settings: Settings, image_size: tuple[int, int], notes: list[str], told: str | None = None
) -> Preprocessing:
    """Where the file has none: what the user says, else the released models' own."""
    name = settings.normalize or told
    if name is None:
        name = "half"
        notes.append(
            "the file has no mean and std: those of the ImageNet-22k release are taken (0.5); "
            "normalize=imagenet for weights of ImageNet-1k"
        )
    mean, std = NORMALIZATIONS[name]
    share = 0.875 if max(image_size) < 384 else 1.0  # as the released code evaluates
    return Preprocessing(mean=mean, std=std, crop_pct=share)


def index_grid(index: Tensor) -> tuple[int, int] | None:
    """Patch grid (h, w) that an index buffer (1+N, 1+N) was made for; None if it is none.

    In a row of patches the index falls by one from key to key, and by w more at its end.
    """
    if index.ndim != 2 or index.shape[0] != index.shape[1] or len(index) < 2:
        return None
    falls = (index[1, 1:-1] - index[1, 2:]).tolist()
    width = next((i + 1 for i, fall in enumerate(falls) if fall != 1), len(falls) + 1)
    patches = len(index) - 1
    return (patches // width, width) if patches % width == 0 else None


def _tensor(tensors: Mapping[str, Tensor], key: str, path: Any) -> Tensor:
    if key not in tensors or tensors[key].ndim < 2:
        raise UserError(f"{path}: {key} is missing, or no tensor of a vision transformer")
    return tensors[key]


def _depth(tensors: Mapping[str, Tensor], path: Any) -> int:
    parts = [key.split(".") for key in tensors if key.startswith("blocks.")]
    numbers = {int(part[1]) for part in parts if part[1].isdecimal() and len(part[1]) < 6}
    if numbers != set(range(len(numbers))) or not numbers:
        raise UserError(f"{path}: its blocks are {sorted(numbers)[:6]}, not 0, 1, 2, ...")
    return len(numbers)


def _relative(tensors: Mapping[str, Tensor], path: Any) -> RelativePosition:
    shared, own = SHARED_TABLE in tensors, f"blocks.0.attn.{TABLE}" in tensors
    if shared and own:
        raise UserError(
            f"{path} has a shared bias table and one in each block; our model takes one of the two"
        )
    return "shared" if shared else "per_block" if own else "none"


def _table(tensors: Mapping[str, Tensor], relative: RelativePosition, path: Any) -> Tensor | None:
    keys = {"shared": SHARED_TABLE, "per_block": f"blocks.0.attn.{TABLE}"}
    return _tensor(tensors, keys[relative], path) if relative in keys else None


def _num_heads(
    tensors: Mapping[str, Tensor],
    relative: RelativePosition,
    width: int,
    path: Any,
    settings: Settings,
    notes: list[str],
) -> int:
    table = _table(tensors, relative, path)
    if table is not None:
        if settings.num_heads not in (None, table.shape[1]):
            raise UserError(
                f"{path}: num_heads={settings.num_heads} for bias tables of {table.shape[1]} heads"
            )
        return table.shape[1]
    if settings.num_heads:
        return settings.num_heads
    if width not in HEADS_OF_WIDTH:
        raise UserError(
            f"{path} does not tell the number of attention heads (it has no bias tables, and width "
            f"{width} is none of the released ones): say num_heads=NUMBER"
        )
    notes.append(f"{HEADS_OF_WIDTH[width]} attention heads, as the released model of this width")
    return HEADS_OF_WIDTH[width]


def _image_size(
    tensors: Mapping[str, Tensor],
    relative: RelativePosition,
    patch: int,
    path: Any,
    settings: Settings,
) -> tuple[int, int]:
    table, absolute = _table(tensors, relative, path), tensors.get("pos_embed")
    if table is not None:
        rows, what = len(table), "bias table"
        side = (math.isqrt(max(rows - 3, 1)) + 1) // 2
    elif absolute is not None and absolute.ndim == 3:
        rows, what = absolute.shape[1], "position embedding"
        side = math.isqrt(max(rows - 1, 1))
    elif settings.image_size:
        return settings.image_size
    else:
        raise UserError(
            f"{path} has no positions and does not tell its image size: say image_size=224"
        )
    buffers = (value for key, value in tensors.items() if key.endswith(INDEX))
    stored = next((index_grid(value) for value in buffers), None)
    said = settings.image_size and (
        settings.image_size[0] // patch,
        settings.image_size[1] // patch,
    )
    for grid in (said, stored, (side, side)):
        if grid is None:
            continue
        expected = relative_table_rows(grid) if table is not None else math.prod(grid) + 1
        if expected == rows:
            return grid[0] * patch, grid[1] * patch
        if grid is said:
            raise UserError(
                f"{path}: image_size={settings.image_size} makes {grid[0]}x{grid[1]} patches of "
                f"{patch} pixels, for which the {what} would have {expected} rows; it has {rows}"
            )
    raise UserError(
        f"{path}: its {what} has {rows} rows, which no square grid explains: say "
        "image_size=HEIGHTxWIDTH"
    )
