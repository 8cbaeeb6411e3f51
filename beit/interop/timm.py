"""timm's layout: the released names without index buffers, and a config.json beside them.

A folder as `timm.models.save_for_hf` writes it: `timm.create_model("local-dir:FOLDER",
pretrained=True)` opens it, `create_model(..., checkpoint_path=FOLDER/model.safetensors)` the file.
timm's Beit has no mask token and no head of visual tokens.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from beit.errors import UserError
from beit.interop.checks import check_one_norm, check_released_eps
from beit.interop.facts import preprocessing_of
from beit.interop.fields import Fields
from beit.interop.released import assumed_preprocessing, describe, kind_of
from beit.interop.weights import ReadReport, Settings, Weights

# timm's functions for BEiT, by (width, depth, heads, patch): what they build can be changed by
# arguments, so another size is named after the nearest
_NAMES = {
    (768, 12, 12, 16, 224): "beit_base_patch16_224",
    (768, 12, 12, 16, 384): "beit_base_patch16_384",
    (1024, 24, 16, 16, 224): "beit_large_patch16_224",
    (1024, 24, 16, 16, 384): "beit_large_patch16_384",
    (1024, 24, 16, 16, 512): "beit_large_patch16_512",
}
_OTHER = "beit_base_patch16_224"
_POOLS = {"mean": "avg", "cls": "token", "none": ""}


def read(
    tensors: dict[str, Tensor], config: Fields | None, path: Any, settings: Settings
) -> Weights:
    """Tensors of timm's Beit and the config.json beside them, if there is one."""
    report = ReadReport(layout="timm")
    arguments = config.inner("model_args") if config else Fields({}, path)
    if "embed_dim" in arguments and "num_heads" in arguments:
        settings = replace(settings, num_heads=settings.num_heads or arguments.whole("num_heads"))
    if "img_size" in arguments:
        settings = replace(settings, image_size=settings.image_size or arguments.size("img_size"))
    arch = describe(tensors, path, settings, report.notes)
    if arch.layer_scale and "init_values" in arguments:
        arch = replace(arch, layer_scale=arguments.number("init_values", high=1e6))
    kind, pooling = kind_of(tensors, path)
    if config and settings.normalize is None:
        preprocessing = preprocessing_of(config.inner("pretrained_cfg"))
    else:
        preprocessing = assumed_preprocessing(settings, arch.image_size, report.notes)
    classes = None
    if config:
        _check_count(config, len(tensors.get("head.weight", ())))
    if config and kind == "classification":
        classes = config.names("label_names") or config.inner("pretrained_cfg").names("label_names")
    return Weights.of(tensors, kind, arch, pooling, preprocessing, report, classes)


def content(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config.json). Raises UserError for what timm's Beit has no place for."""
    if weights.kind == "mim":
        raise UserError(
            "timm's Beit has neither a mask_token nor a head of visual tokens (lm_head): to write "
            "the backbone alone say allow=mask_token,lm_head"
        )
    if weights.kind == "segmentation":
        raise UserError(
            "timm has no segmentation model, and its Beit no place for the backbone alone, which "
            "has neither norm nor fc_norm"
        )
    if weights.architecture.mask_token:
        raise UserError("timm's Beit has no mask_token: to leave it behind say allow=mask_token")
    check_one_norm(weights, "timm")
    check_released_eps(weights, "timm")
    tensors = {key: value.contiguous() for key, value in weights.released().items()}
    return tensors, _config(weights)


def _config(weights: Weights) -> dict[str, Any]:
    arch, plain = weights.architecture, weights.preprocessing
    key = (arch.width, arch.depth, arch.num_heads, arch.patch_size, arch.image_size[0])
    config: dict[str, Any] = {
        "architecture": _NAMES.get(key, _OTHER) if arch.is_square else _OTHER,
        "num_classes": weights.num_outputs,
        "num_features": arch.width,
        "global_pool": _POOLS[weights.pooling],
        "model_args": model_arguments(weights),
        "pretrained_cfg": {
            "num_classes": weights.num_outputs,
            "input_size": [arch.in_channels, *arch.image_size],
            "fixed_input_size": True,
            "pool_size": None,
            "mean": list(plain.mean),
            "std": list(plain.std),
            "interpolation": plain.interpolation,
            "crop_pct": plain.crop_pct,
            "crop_mode": plain.crop_mode,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if weights.classes is not None:
        config["label_names"] = weights.classes
    return config


def model_arguments(weights: Weights) -> dict[str, Any]:
    """What `timm.create_model` takes to build this very network, whichever Beit it is named after.

    `init_values` 0 leaves LayerScale out; None would be dropped and the named model's taken.
    """
    arch = weights.architecture
    arguments = arch.arguments()
    return {
        "img_size": list(arch.image_size),
        "patch_size": arch.patch_size,
        "in_chans": arch.in_channels,
        "embed_dim": arch.width,
        "depth": arch.depth,
        "num_heads": arch.num_heads,
        "mlp_ratio": arguments["mlp_ratio"],
        "init_values": arch.layer_scale,
        "use_abs_pos_emb": arch.absolute_position,
        "use_rel_pos_bias": arch.relative_position == "per_block",
        "use_shared_rel_pos_bias": arch.relative_position == "shared",
        "global_pool": _POOLS[weights.pooling],
    }


def _check_count(config: Fields, rows: int) -> None:
    inner = config.inner("pretrained_cfg")
    said = config.whole("num_classes", inner.whole("num_classes", rows, at_least=0), at_least=0)
    if said != rows:
        raise UserError(
            f"{config.where}: num_classes is {said}, and the head beside it has {rows} classes; "
            "the config and the weights are of two models"
        )
