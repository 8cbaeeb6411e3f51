"""Our own layout: a checkpoint file with the config inside, as a training run writes it.

So a converted file is used like any other: `beit predict`, `beit evaluate`, `init_from=`. Where no
tokenizer is known (masked image modelling) the config names DALL-E's without its files.
"""

import copy
import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from beit import __version__, config
from beit.checkpoints.file import write_file
from beit.checkpoints.header import SCHEMA, Entry
from beit.checkpoints.models import Checkpoint, read_checkpoint
from beit.data.pixels import INTERPOLATIONS
from beit.errors import UserError
from beit.interop.decoder import Labels
from beit.interop.decoder_config import decoder_changes, decoder_of, has_decoder, labels_of
from beit.interop.facts import preprocessing_of
from beit.interop.fields import Fields
from beit.interop.weights import (
    Architecture,
    Kind,
    Pooling,
    Preprocessing,
    ReadReport,
    Weights,
)
from beit.models.layers import NORM_EPS, RelativePosition

_BACKBONE = "beit.models.vit.VisionTransformer"
_HEADS: dict[str, Kind] = {
    "beit.models.heads.MIMHead": "mim",
    "beit.models.heads.ClassificationHead": "classification",
}
_ENCODER = "beit.models.encoder.Encoder"
_RELATIVE: tuple[RelativePosition, ...] = ("none", "shared", "per_block")


def read(path: str | Path) -> Weights:
    """The weights of a run's checkpoint. Raises UserError where there is no such network in it."""
    checkpoint = read_checkpoint(path)
    task = Fields(checkpoint.config, path).inner("task")
    node, head = task.inner("backbone"), task.inner("head")
    target = str(head.content.get("_target_"))
    kind: Kind | None = _HEADS.get(target)
    if has_decoder(task):
        kind = "segmentation"
    if task.content.get("_target_") == _ENCODER:
        kind = "backbone"
    if node.content.get("_target_") != _BACKBONE or kind is None:
        raise UserError(
            f"{path} is a checkpoint of task {checkpoint.config.get('task_name')}, which has no "
            "vision transformer with one of our heads: give one of task mim, classification or "
            "segmentation"
        )
    arch, stored = _architecture(node), checkpoint.state_dict
    parts = {
        prefix: {k[len(prefix) :]: v for k, v in stored.items() if k.startswith(prefix)}
        for prefix in ("backbone.", "head.")
    }
    if kind == "segmentation":  # whose names have the children's in front
        parts["head."] = {k: v for k, v in stored.items() if not k.startswith("backbone.")}
    pooling: Pooling = "none"
    if kind in ("classification", "backbone"):
        where = head if kind == "classification" else task
        found = where.word("pooling", ("mean", "cls", "none"), "mean")
        pooling = "mean" if found == "mean" else "cls" if found == "cls" else "none"
    return Weights(
        kind=kind,
        architecture=arch,
        backbone=parts["backbone."],
        head=parts["head."],
        pooling=pooling,
        preprocessing=preprocessing(checkpoint, arch.image_size),
        classes=checkpoint.classes if kind in ("classification", "segmentation") else None,
        report=ReadReport(layout=f"ours, task {checkpoint.config.get('task_name')}"),
        decoder=decoder_of(task) if kind == "segmentation" else None,
        labels=labels_of(checkpoint) if kind == "segmentation" else Labels(),
    )


def write(weights: Weights, path: Path) -> None:
    """A checkpoint file. Raises UserError where it cannot be written."""
    write_file(path, {"state_dict": _tensors(weights), "beit": _entry(weights)})


def checkpoint(weights: Weights, path: str | Path, *, config: bool) -> Checkpoint:
    """What `read_checkpoint` would give of the written file, without writing it.

    Without `config` its configs tell no more than the backbone.
    """
    tensors = _tensors(weights)
    if config:
        entry = _entry(weights)
    else:
        least = {"task": {"backbone": _backbone(weights)}}
        entry = {"config": least, "composed": least, "classes": weights.classes}
    places = {
        key: Entry(str(value.dtype), tuple(value.shape), 0, 0, "") for key, value in tensors.items()
    }
    return Checkpoint(
        path=str(path),
        config=entry["config"],
        composed=entry["composed"],
        classes=entry["classes"],
        entry=entry,
        stored=places,
        _names={key: key for key in tensors},
        _read=lambda names: {name: tensors[name] for name in names},
    )


def _tensors(weights: Weights) -> dict[str, Any]:
    found = {f"backbone.{key}": value for key, value in weights.backbone.items()}
    if weights.decoder is not None:
        return found | weights.head
    return found | {f"head.{key}": value for key, value in weights.head.items()}


def _entry(weights: Weights) -> dict[str, Any]:
    interpolated: Any
    if weights.kind == "backbone":
        plain = interpolated = _encoder_config(weights)
    else:
        cfg = _config(weights)
        plain, interpolated = config.plain(cfg), OmegaConf.to_container(cfg, resolve=False)
    entry = {
        "schema": SCHEMA,
        "version": __version__,
        "config": plain,
        "composed": interpolated,
        "classes": weights.classes,
        # the config has no place for the crop where nothing is classified
        "preprocessing": asdict(weights.preprocessing),
    }
    if weights.decoder is not None:
        # the config's are changed by whoever evaluates on other data
        entry["labels"] = asdict(weights.labels)
        entry["palette"] = entry["labels"].pop("palette")
    return entry


@functools.lru_cache(maxsize=4)
def _base(kind: Kind) -> DictConfig:
    """A training config of the task, with what every config must say."""
    data = "segmentation_folders" if kind == "segmentation" else "folder"
    words = [f"data={data}", "batch.global_size=32", "batch.per_device=32", "trainer.max_epochs=1"]
    if kind == "mim":
        words += ["task=mim", "tokenizer=dalle", "tokenizer.encoder_path=null"]
    else:
        words += [f"task={kind}"]
    return config.compose([*words, "model=base", "name=converted"])


def _config(weights: Weights) -> DictConfig:
    """The config that a run with this network would have had."""
    cfg = copy.deepcopy(_base(weights.kind))
    arch, plain = weights.architecture, weights.preprocessing
    changes: dict[str, Any] = {f"model.{k}": v for k, v in arch.arguments().items()}
    changes |= {"normalize.mean": list(plain.mean), "normalize.std": list(plain.std)}
    if weights.kind == "mim":
        changes["task.head.vocab_size"] = weights.num_outputs
        changes["tokenizer.vocab_size"] = weights.num_outputs
    elif weights.decoder is not None:
        changes |= decoder_changes(weights, weights.decoder)
    else:
        changes["data.num_classes"] = weights.num_outputs
        changes["task.head.pooling"] = weights.pooling
        changes["views.eval.crop_pct"] = plain.crop_pct
        changes["views.eval.interpolation"] = plain.interpolation
        if plain.crop_mode == "squash":
            changes["views.eval.crop_mode"] = "squash"
        if arch.norm_eps != NORM_EPS:
            changes["task.head.norm_eps"] = arch.norm_eps
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def _backbone(weights: Weights) -> dict[str, Any]:
    return {"_target_": _BACKBONE, **weights.architecture.arguments(), "init_cut": 0.02}


def _encoder_config(weights: Weights) -> dict[str, Any]:
    arch, plain = weights.architecture, weights.preprocessing
    task: dict[str, Any] = {
        "_target_": _ENCODER,
        "backbone": _backbone(weights),
        "pooling": weights.pooling,
    }
    if arch.norm_eps != NORM_EPS:
        task["norm_eps"] = arch.norm_eps
    return {
        "task_name": "backbone",
        "task": task,
        "normalize": {"mean": list(plain.mean), "std": list(plain.std)},
    }


def _architecture(node: Fields) -> Architecture:
    width = node.whole("width")
    relative = node.word("relative_position", _RELATIVE)
    return Architecture(
        image_size=node.size("image_size"),
        patch_size=node.whole("patch_size"),
        in_channels=node.whole("in_channels", 3),
        width=width,
        depth=node.whole("depth"),
        num_heads=node.whole("num_heads"),
        mlp_hidden=int(width * node.number("mlp_ratio", 4.0, high=1e4)),
        absolute_position=node.flag("absolute_position"),
        relative_position=next(kind for kind in _RELATIVE if kind == relative),
        layer_scale=node.number("layer_scale", high=1e6),
        mask_token=node.flag("mask_token"),
        final_norm=node.flag("final_norm"),
        norm_eps=node.number("norm_eps", NORM_EPS, low=1e-30),
        drop_rate=node.number("drop_rate", 0.0),
        attention_drop_rate=node.number("attention_drop_rate", 0.0),
        drop_path_rate=node.number("drop_path_rate", 0.0),
    )


def preprocessing(checkpoint: Checkpoint, image_size: tuple[int, int]) -> Preprocessing:
    """What a converted file says, else the evaluation transform, else the normalisation."""
    if "preprocessing" in checkpoint.entry:
        return preprocessing_of(Fields(checkpoint.entry, checkpoint.path).inner("preprocessing"))
    found = Fields(checkpoint.config, checkpoint.path)
    view = found.inner("views").inner("eval")
    norm = view if "mean" in view else found.inner("normalize")
    share = 0.875 if 32 < max(image_size) < 384 else 1.0  # the transform's own rule for "auto"
    if view.content.get("crop_pct") != "auto":
        share = view.number("crop_pct", share, low=0.01)
    squash = view.word("crop_mode", ("center", "squash"), "center") == "squash"
    if "short_side" in view:  # of segmentation, which cuts nothing off
        share, squash = 1.0, True
    if share == 1.0 and max(image_size) <= 32:  # there the transform is a plain resize
        squash = True
    plain = Preprocessing()
    return Preprocessing(
        mean=norm.numbers("mean", plain.mean),
        std=norm.numbers("std", plain.std),
        interpolation=view.word("interpolation", tuple(INTERPOLATIONS), plain.interpolation),
        crop_pct=share,
        crop_mode="squash" if squash else "center",
    )
