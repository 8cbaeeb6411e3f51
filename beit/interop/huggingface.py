"""The layout of Hugging Face transformers: a folder with config.json and model.safetensors.

See `huggingface_names` for the names of the tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from beit.errors import UserError
from beit.interop.checks import check_one_norm
from beit.interop.decoder import IGNORED, Decoder, Labels, described
from beit.interop.fields import LARGEST, Fields
from beit.interop.huggingface_names import renamed, their_names, version
from beit.interop.processor import preprocessing, processor
from beit.interop.released import kind_of
from beit.interop.segmentation import POOL_SCALES, check_huggingface
from beit.interop.weights import (
    Architecture,
    Kind,
    Pooling,
    ReadReport,
    Settings,
    Weights,
)
from beit.models.layers import RelativePosition

CLASSES = {
    "mim": "BeitForMaskedImageModeling",
    "classification": "BeitForImageClassification",
    "segmentation": "BeitForSemanticSegmentation",
    "backbone": "BeitModel",
}
HEADS = {
    "BeitForMaskedImageModeling": "lm_head.",
    "BeitForImageClassification": "classifier.",
    "BeitForSemanticSegmentation": "decode_head.",
}


def read(tensors: dict[str, Tensor], folder: "Folder", path: Any, settings: Settings) -> Weights:
    """Tensors with the names of version 4 or 5, and the JSON files beside them."""
    config = folder.config
    report = ReadReport(layout=f"Hugging Face ({version(tensors)})")
    ours = renamed(tensors, path)
    kind, _ = kind_of(ours, path)
    _check_head(config, tensors)
    arch = _architecture(config, ours, settings)
    pooling = _pooling(kind, ours, config)
    prepared = preprocessing(folder.processor, arch.image_size, settings, report.notes)
    weights = Weights.of(ours, kind, arch, pooling, prepared, report)
    if kind == "segmentation":
        weights = weights.changed(
            decoder=_decoder(config, weights, settings), labels=_labels(config, folder.processor)
        )
    if kind in ("classification", "segmentation"):
        weights = weights.changed(classes=_classes(config, weights.num_outputs))
    return weights


def _check_head(config: Fields, tensors: Mapping[str, Tensor]) -> None:
    """Without it a file cut off between two parts would be taken for a backbone."""
    said = config.names("architectures") or []
    for name, head in HEADS.items():
        if name in said and not any(key.startswith(head) for key in tensors):
            raise UserError(
                f"{config.where} is of {name}, and the weights beside it have no {head}*: get them "
                "again, or say BeitModel under architectures to take the backbone alone"
            )


def _decoder(config: Fields, weights: Weights, settings: Settings) -> Decoder:
    """Their head, which only a few settings change; the four blocks as the release counts them."""
    if list(config.wholes("pool_scales", POOL_SCALES)) != list(POOL_SCALES):
        raise config.wrong("pool_scales", f"{list(POOL_SCALES)}, as in the release")
    if config.flag("auxiliary_concat_input", False):
        raise config.wrong("auxiliary_concat_input", "false, as in the release")
    taps = settings.taps
    if taps is None:
        key = "out_indices" if "out_indices" in config else "segmentation_indices"
        taps = config.wholes(key)
        trained_there = ",".join(str(max(tap - 2, 0)) for tap in taps)
        weights.report.notes.append(
            f"{key} is taken as the release means it, blocks counted from 0; transformers computes "
            f"with the blocks two before: if it was trained there, say taps={trained_there}"
        )
    found = described(weights.head, taps)
    if config.flag("use_auxiliary_head", True) != bool(found.auxiliary):
        raise config.wrong("use_auxiliary_head", "what the weights beside it have")
    weight = config.number("auxiliary_loss_weight", 0.4, high=1e3)
    return replace(found, auxiliary_weight=weight)


def _labels(config: Fields, processor: Fields | None) -> Labels:
    found = processor or Fields({}, config.where)
    older = found.flag("reduce_labels", False)  # the name before transformers 4.28
    return Labels(
        reduce_zero=found.flag("do_reduce_labels", older),
        ignore_index=config.whole("semantic_loss_ignore_index", IGNORED, at_least=-LARGEST),
    )


class Folder:
    """The JSON files of a folder; `processor` is None without preprocessor_config.json."""

    def __init__(self, config: Fields, processor: Fields | None) -> None:
        self.config = config
        self.processor = processor


def _architecture(config: Fields, ours: Mapping[str, Tensor], settings: Settings) -> Architecture:
    config.word("hidden_act", ("gelu",), "gelu")
    shared = config.flag("use_shared_relative_position_bias", False)
    own = config.flag("use_relative_position_bias", False)
    if shared and own:
        raise UserError(
            f"{config.where}: a shared bias table and one in each block; our model takes one of two"
        )
    relative: RelativePosition = "shared" if shared else "per_block" if own else "none"
    arch = Architecture(
        image_size=config.size("image_size", 224),
        patch_size=config.size("patch_size", 16)[0],
        in_channels=config.whole("num_channels", 3),
        width=config.whole("hidden_size", 768),
        depth=config.whole("num_hidden_layers", 12),
        num_heads=config.whole("num_attention_heads", 12),
        mlp_hidden=config.whole("intermediate_size", 3072),
        absolute_position=config.flag("use_absolute_position_embeddings", False),
        relative_position=relative,
        layer_scale=config.number("layer_scale_init_value", 0.1, high=1e6),
        mask_token="mask_token" in ours,
        final_norm="norm.weight" in ours,
        norm_eps=settings.norm_eps or config.number("layer_norm_eps", 1e-12, low=1e-30),
        drop_rate=config.number("hidden_dropout_prob", 0.0),
        attention_drop_rate=config.number("attention_probs_dropout_prob", 0.0),
        drop_path_rate=config.number("drop_path_rate", 0.1),
    )
    _check_square(arch, f"{config.where}: image_size")
    return arch


def _check_square(arch: Architecture, what: str) -> None:
    if not arch.is_square:
        raise UserError(
            f"{what} {list(arch.image_size)} is not square: transformers reads bias tables and "
            "positions of other grids in another order than they were trained in"
        )


def _pooling(kind: Kind, ours: Mapping[str, Tensor], config: Fields) -> Pooling:
    if kind in ("mim", "segmentation"):
        return "none"
    if config.flag("use_mean_pooling", True):
        return "mean" if "fc_norm.weight" in ours else "none"
    return "cls"


def _classes(config: Fields, rows: int) -> list[str] | None:
    names = config.names("id2label")
    count = len(names) if names is not None else 2  # the default of their config
    if count != rows:
        raise UserError(
            f"{config.where}: id2label has {count} classes, and the classifier beside it {rows}; "
            "the config and the weights are of two models"
        )
    return None if names == _no_names(rows) or names is None else names


def _no_names(count: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(count)]


def content(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors under version 4's names, config.json, preprocessor_config.json).

    Raises UserError for what their model has no place for, or would compute otherwise.
    """
    arch = weights.architecture
    _check_square(arch, "huggingface cannot hold this model: image_size")
    if weights.decoder is not None:
        check_huggingface(weights.decoder, arch.width)
    elif weights.kind == "mim":
        if not arch.final_norm or not arch.mask_token:
            raise UserError(
                "huggingface cannot hold this model: BeitForMaskedImageModeling has a final norm "
                "and a mask token"
            )
    elif weights.pooling != "none":
        check_one_norm(weights, "huggingface")
    elif arch.final_norm:
        raise UserError("huggingface cannot hold a final norm that nothing pools from")
    return _their_tensors(weights), _config(weights), processor(weights)


def _their_tensors(weights: Weights) -> dict[str, Tensor]:
    prefix = "" if weights.kind == "backbone" else "beit."
    theirs: dict[str, Tensor] = {}
    for key, value in weights.released().items():
        for name, part in their_names(key, value, mim=weights.kind == "mim"):
            inside = not name.startswith(("lm_head.", "classifier.", "!"))
            theirs[prefix + name if inside else name.removeprefix("!")] = part.contiguous()
    return theirs


def _config(weights: Weights) -> dict[str, Any]:
    arch = weights.architecture
    config: dict[str, Any] = {
        "architectures": [CLASSES[weights.kind]],
        "model_type": "beit",
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.num_heads,
        "intermediate_size": arch.mlp_hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": arch.drop_rate,
        "attention_probs_dropout_prob": arch.attention_drop_rate,
        "drop_path_rate": arch.drop_path_rate,
        "initializer_range": 0.02,
        "layer_norm_eps": arch.norm_eps,
        "image_size": arch.image_size[0],
        "patch_size": arch.patch_size,
        "num_channels": arch.in_channels,
        "use_mask_token": arch.mask_token,
        "use_absolute_position_embeddings": arch.absolute_position,
        "use_relative_position_bias": arch.relative_position == "per_block",
        "use_shared_relative_position_bias": arch.relative_position == "shared",
        "layer_scale_init_value": arch.layer_scale,
        "use_mean_pooling": weights.pooling != "cls",
    }
    if weights.decoder is not None:
        config |= _decoder_config(weights.decoder, weights)
    if weights.kind == "mim":
        config["vocab_size"] = weights.num_outputs
    if weights.kind in ("classification", "segmentation"):
        names = weights.classes or _no_names(weights.num_outputs)
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _decoder_config(decoder: Decoder, weights: Weights) -> dict[str, Any]:
    config: dict[str, Any] = {
        "out_indices": list(decoder.taps),
        "pool_scales": list(POOL_SCALES),
        # with it their bare model has no norm at its end, and the pooler is left out
        "use_mean_pooling": not weights.architecture.final_norm,
        "use_auxiliary_head": bool(decoder.auxiliary),
        "auxiliary_loss_weight": decoder.auxiliary_weight,
        "semantic_loss_ignore_index": weights.labels.ignore_index,
    }
    for head in decoder.auxiliary:
        config["auxiliary_channels"] = head.arguments["channels"]
        config["auxiliary_num_convs"] = head.arguments["num_convs"]
    return config
