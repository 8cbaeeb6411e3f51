"""Names of Hugging Face's BEiT and ours, both ways.

Names of version 4 (`beit.encoder.layer.0.attention.attention.query`), which is what lies on the Hub
and what version 5 still reads and writes, and those of version 5's own modules
(`beit.layers.0.attention.q_proj`). q, k and v are apart, k has no bias.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from beit.errors import UserError
from beit.interop.segmentation import from_huggingface, is_behind, to_huggingface
from beit.interop.weights import shown
from beit.models.transfer import TABLE

# (theirs, ours) of version 4 first, which is written; version 5's own after it
_TOP = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.relative_position_bias.", "rel_pos_bias."),
    ("shared_position_bias.", "rel_pos_bias."),
    ("pooler.layernorm.", "fc_norm."),
    ("layernorm.", "norm."),
)
_BLOCK = (
    ("lambda_1", "gamma_1"),
    ("lambda_2", "gamma_2"),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.attention.relative_position_bias.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("relative_position_bias.", "attn."),
    ("attention.o_proj.", "attn.proj."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
)
_ATTENTION = re.compile(r"attention\.(?:attention\.(query|key|value)|([qkv])_proj)\.(weight|bias)")
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d{1,5})\.(.+)")


def version(keys: Iterable[str]) -> str:
    """Whose names they are."""
    return "v4 names" if any("encoder.layer." in key for key in keys) else "v5 names"


def renamed(tensors: Mapping[str, Tensor], path: Any) -> dict[str, Tensor]:
    """Under our names, q, k and v put together; what has no name of ours keeps its own.

    Raises UserError where two tensors would be one, or a part of q, k, v is missing.
    """
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        block = _LAYER.fullmatch(key.removeprefix("beit."))
        found = _ATTENTION.fullmatch(block[2]) if block else None
        if block and found and (found[2] or found[1][0], found[3]) != ("k", "bias"):
            kind = found[2] or found[1][0]
            parts.setdefault(f"blocks.{block[1]}.attn.{found[3]}", {})[kind] = value
            continue
        name = _our_name(key)
        if name in ours:
            raise UserError(
                f"{path}: {shown([key])} is a second {name}: a model of masked image modelling "
                "with use_mean_pooling=false normalises twice, which our model does not"
            )
        ours[name] = value
    for prefix, three in parts.items():
        if prefix.endswith(".weight"):
            if set(three) != {"q", "k", "v"} or len({t.shape for t in three.values()}) != 1:
                raise UserError(f"{path}: {prefix} lacks a part of q, k and v, or they differ")
            name = f"{prefix.removesuffix('weight')}qkv.weight"
            ours[name] = torch.cat([three["q"], three["k"], three["v"]])
        else:
            stem = prefix.removesuffix("bias")
            ours.update({f"{stem}{kind}_bias": value for kind, value in three.items()})
    return ours


def _our_name(key: str) -> str:
    if behind := from_huggingface(key):
        return behind
    for theirs, ours in (("lm_head.", "lm_head."), ("classifier.", "head.")):
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    inner = key.removeprefix("beit.")
    if block := _LAYER.fullmatch(inner):
        for theirs, ours in _BLOCK:
            if block[2].startswith(theirs):
                return f"blocks.{block[1]}.{ours}{block[2][len(theirs) :]}"
        return key
    for theirs, ours in _TOP:
        if inner.startswith(theirs):
            return ours + inner[len(theirs) :]
    return key


def their_names(key: str, value: Tensor, *, mim: bool) -> list[tuple[str, Tensor]]:
    """Version 4's names for one tensor of ours; "!" marks a name outside the base model."""
    if is_behind(key):
        return [(f"!{to_huggingface(key)}", value)]
    if key.startswith("lm_head."):
        return [(key, value)]
    if key.startswith("head."):
        return [(f"classifier.{key[5:]}", value)]
    if mim and key.startswith("norm."):
        return [(f"!layernorm.{key[5:]}", value)]
    head, _, rest = key.partition(".")
    if head != "blocks":
        theirs, ours = next(pair for pair in _TOP if key.startswith(pair[1]))
        return [(theirs + key[len(ours) :], value)]
    number, _, name = rest.partition(".")
    layer = f"encoder.layer.{number}."
    inner = f"{layer}attention.attention."
    if name == "attn.qkv.weight":
        thirds = value.chunk(3)
        return [(f"{inner}{n}.weight", t) for n, t in zip(("query", "key", "value"), thirds)]
    if name in ("attn.q_bias", "attn.v_bias"):
        return [(f"{inner}{'query' if name == 'attn.q_bias' else 'value'}.bias", value)]
    if name == f"attn.{TABLE}":
        return [(f"{inner}relative_position_bias.{TABLE}", value)]
    theirs, ours = next(pair for pair in _BLOCK if name.startswith(pair[1]) and pair[1] != "attn.")
    return [(layer + theirs + name[len(ours) :], value)]
