"""The BEiTs of timm and transformers with our weights, and mended where they are known to be wrong.

Mended in transformers 5.23:
- the bias table of a grid that isn't square is read as (w, h) instead of (h, w);
- the bias table goes through a bilinear interpolation in each forward, at its own size too;
- absolute positions of a grid that isn't square are reshaped to a square one;
- `layer_norm_eps` defaults to 1e-12, BEiT has 1e-6 (set in the config).
"""

import contextlib

import torch
from timm.models.beit import Beit
from transformers import BeitConfig, BeitModel
from transformers.models.beit.modeling_beit import BeitEmbeddings, BeitRelativePositionBias

from beit.models.vit import VisionTransformer

PATCH, WIDTH, HEADS, DEPTH = 8, 22, 2, 3
CLASSES, VOCAB = 13, 17
TABLE = "relative_position_bias_table"
POSITIONS = {
    "absolute": {"absolute_position": True, "relative_position": "none"},
    "shared bias": {"absolute_position": False, "relative_position": "shared"},
    "per-block bias": {"absolute_position": False, "relative_position": "per_block"},
    "absolute and shared": {"absolute_position": True, "relative_position": "shared"},
}


def make_ours(image_size, positions, *, layer_scale, mask_token, final_norm):
    return VisionTransformer(
        image_size,
        PATCH,
        width=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        drop_path_rate=0.0,
        layer_scale=layer_scale,
        mask_token=mask_token,
        final_norm=final_norm,
        init_cut=0.02,
        **POSITIONS[positions],
    )


def randomise(*modules, seed=11):
    """Every tensor random and large enough to matter, the zero-initialised ones above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def make_timm(image_size, positions, *, layer_scale, pooling):
    options = POSITIONS[positions]
    return Beit(
        img_size=image_size,
        patch_size=PATCH,
        num_classes=CLASSES,
        global_pool={"mean": "avg", "CLS": "token"}[pooling],
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=layer_scale or None,
        use_abs_pos_emb=options["absolute_position"],
        use_rel_pos_bias=options["relative_position"] == "per_block",
        use_shared_rel_pos_bias=options["relative_position"] == "shared",
    )


def copy_to_timm(backbone, head, theirs):
    """Strictly: the names are the released ones on both sides. timm has no mask token."""
    state = {**backbone.state_dict(), **head.state_dict()}
    state.pop("mask_token", None)
    theirs.load_state_dict(state, strict=True)


@contextlib.contextmanager
def hidden_patches(theirs, mask, mask_token):
    """Teach timm's model the mask: the mask token takes the place of the hidden embeddings."""
    if mask is None:
        yield
        return
    hidden = mask.flatten(1)[..., None]
    handle = theirs.patch_embed.register_forward_hook(
        lambda module, inputs, patches: torch.where(hidden, mask_token.to(patches), patches)
    )
    yield
    handle.remove()


def transformers_config(image_size, positions, *, layer_scale, pooling):
    options = POSITIONS[positions]
    return BeitConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
        image_size=list(image_size),
        patch_size=PATCH,
        vocab_size=VOCAB,
        use_mask_token=True,
        use_absolute_position_embeddings=options["absolute_position"],
        use_relative_position_bias=options["relative_position"] == "per_block",
        use_shared_relative_position_bias=options["relative_position"] == "shared",
        layer_scale_init_value=layer_scale,
        drop_path_rate=0.0,
        use_mean_pooling=pooling == "mean",
    )


class TransformersClassifier(torch.nn.Module):
    """Their classification model, which by itself does not let the mask through."""

    def __init__(self, config):
        super().__init__()
        self.beit = BeitModel(config)
        self.classifier = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, images, mask):
        hidden = None if mask is None else mask.flatten(1)
        return self.classifier(self.beit(images, bool_masked_pos=hidden).pooler_output)


def mend_transformers(monkeypatch, grid):
    """Their own lookup without the interpolation before it, for a grid that isn't square."""

    def bias(self, window_size, interpolate_pos_encoding=False, dim_size=None):
        assert tuple(window_size) == self.window_size == grid
        index = self.generate_relative_position_index(self.window_size)
        return self.relative_position_bias_table[index].permute(2, 0, 1)[None]

    def positions(self, embeddings, height, width):
        return self.position_embeddings

    monkeypatch.setattr(BeitRelativePositionBias, "forward", bias)
    monkeypatch.setattr(BeitEmbeddings, "interpolate_pos_encoding", positions)


def transformers_names(key):
    """Names in transformers 5 of one of our tensors; the fused qkv becomes three."""
    first, _, rest = key.partition(".")
    tops = {
        "cls_token": "beit.embeddings.cls_token",
        "mask_token": "beit.embeddings.mask_token",
        "pos_embed": "beit.embeddings.position_embeddings",
        "patch_embed": f"beit.embeddings.patch_embeddings.{rest.replace('proj', 'projection')}",
        "rel_pos_bias": f"beit.shared_position_bias.{rest}",
        "norm": f"beit.layernorm.{rest}",
        "fc_norm": f"beit.pooler.layernorm.{rest}",
        "head": f"classifier.{rest}",
        "lm_head": f"lm_head.{rest}",
    }
    if first in tops:
        return [tops[first]]
    number, _, name = rest.partition(".")
    names = {
        "gamma_1": ["lambda_1"],
        "gamma_2": ["lambda_2"],
        "attn.q_bias": ["attention.q_proj.bias"],
        "attn.v_bias": ["attention.v_proj.bias"],
        "attn.qkv.weight": [f"attention.{x}_proj.weight" for x in "qkv"],
        f"attn.{TABLE}": [f"relative_position_bias.{TABLE}"],
    }
    for part in ("weight", "bias"):
        names[f"norm1.{part}"] = [f"layernorm_before.{part}"]
        names[f"norm2.{part}"] = [f"layernorm_after.{part}"]
        names[f"attn.proj.{part}"] = [f"attention.o_proj.{part}"]
        names[f"mlp.fc1.{part}"] = [f"mlp.fc1.{part}"]
        names[f"mlp.fc2.{part}"] = [f"mlp.fc2.{part}"]
    return [f"beit.layers.{number}.{name}" for name in names[name]]


def masked_modeling_names(key):
    """The same for their masked-modelling class, where the final norm stands beside the head."""
    return [name.replace("beit.layernorm", "layernorm") for name in transformers_names(key)]


def copy_to_transformers(backbone, head, theirs, names=transformers_names):
    state = {}
    for key, value in {**backbone.state_dict(), **head.state_dict()}.items():
        state.update(zip(names(key), value.chunk(len(names(key))), strict=True))
    theirs.load_state_dict(state, strict=True)
