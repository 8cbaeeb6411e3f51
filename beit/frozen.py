"""Evaluation of a frozen backbone: linear probe, k-NN and health, by words of the command line."""

import csv
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from beit import __version__, config
from beit.callbacks.figures import curves, save_figure
from beit.checkpoints.models import Checkpoint
from beit.console import quiet_lightning
from beit.data import fingerprint, opening
from beit.data.labelled import LabelledData
from beit.data.sources import few_labels
from beit.errors import UserError
from beit.evaluation.choosing import HELD_OUT, MEASURED, Report
from beit.evaluation.features import Compute
from beit.files import explained, replace_text
from beit.interop import ours
from beit.interop.convert import any_checkpoint
from beit.models.vit import VisionTransformer
from beit.networks import network_of
from beit.security import folders, targets

log = logging.getLogger(__name__)

CONFIG = "evaluate"
_MASKINGS = ("beit.data.masking.",)


def asked(words: list[str]) -> bool:
    """Whether the words ask for an evaluation of the frozen backbone."""
    return any(word.startswith("evaluation=") for word in words)


def evaluate(
    path: str | Path, words: list[str], *, output: str | Path | None, overwrite: bool
) -> dict[str, Any]:
    """What `beit evaluate checkpoint=PATH evaluation=... WORDS` finds: a summary, and its `rows`.

    In the folder `output` it is kept as JSON, CSV and a picture.

    Raises UserError, before any feature is worked out, for what cannot be done.
    """
    cfg = config.compose(words, config_name=CONFIG)
    folders.check_downloads(cfg, words)
    checkpoint = any_checkpoint(path, tell="remarks")
    network = network_of(checkpoint)
    backbone = _backbone(network, checkpoint)
    _fill(cfg, checkpoint, backbone)
    config.check_missing(cfg)
    files = _files(cfg, output, overwrite)
    evaluation = config.instantiate(cfg.evaluation)
    data = _data(cfg, evaluation.needs_labels)
    evaluation.check(backbone, data)
    data.check()
    compute = _compute(cfg)
    if files is not None:
        folder = files["json"].parent
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
    networks = {"checkpoint": network.to(compute.device)}
    if cfg.compare_random:
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            fresh = network_of(checkpoint, weights=False)
        networks["random"] = fresh.to(compute.device)
    reports = {
        name: _told(evaluation(one.eval(), data, compute), name) for name, one in networks.items()
    }
    found = _found(reports)
    if files is not None:
        record = {"checkpoint": str(path), **_record(cfg, data), **found}
        _write(files, reports, record)
    return found


def _backbone(network: nn.Module, checkpoint: Checkpoint) -> VisionTransformer:
    backbone = getattr(network, "backbone", None)
    if not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{checkpoint.path} is a checkpoint of task {checkpoint.config.get('task_name')}, "
            "without a vision transformer to evaluate: give one of pretraining or fine-tuning"
        )
    return backbone


def _fill(cfg: DictConfig, checkpoint: Checkpoint, backbone: VisionTransformer) -> None:
    """Put what the checkpoint says wherever the user says nothing."""
    plain = ours.preprocessing(checkpoint, backbone.image_size)
    known = {key: getattr(plain, key) for key in ("mean", "std", "crop_pct", "crop_mode")}
    known |= {"image_size": backbone.image_size, "interpolation": plain.interpolation}
    for key, value in known.items():
        if OmegaConf.is_missing(cfg.view, key):
            cfg.view[key] = list(value) if isinstance(value, tuple) else value
    if OmegaConf.is_missing(cfg.evaluation, "masking"):
        masking = checkpoint.config.get("masking")
        targets.check_only(masking, _MASKINGS, "masking")
        cfg.evaluation.masking = masking


def _data(cfg: DictConfig, needs_labels: bool) -> LabelledData:
    loader = config.instantiate(cfg.loader)
    opening.limit_pixels(loader.max_image_pixels)
    train = config.instantiate(cfg.data.train)
    val = config.instantiate(cfg.data.val) if cfg.data.get("val") else None
    images = {"transform": config.instantiate(cfg.view), "loader": loader}
    if not needs_labels:
        return LabelledData.unlabelled(train, val, **images)
    train = few_labels(train, per_class=cfg.labels_per_class, seed=cfg.seed)
    return LabelledData.of(train, val, num_classes=cfg.data.num_classes, **images)


def _compute(cfg: DictConfig) -> Compute:
    """Of the trainer's settings those that count here, checked as a trainer checks them."""
    devices = cfg.trainer.devices
    one = [1] if OmegaConf.is_list(devices) and len(devices) == 1 else devices
    if one not in ([1], 1, "auto", -1) or cfg.trainer.num_nodes != 1:
        raise UserError(f"trainer.devices={devices}: a frozen backbone is evaluated on one device")
    quiet_lightning()
    trainer: L.Trainer = config.instantiate(
        cfg.trainer,
        devices=list(devices) if OmegaConf.is_list(devices) else 1,
        logger=False,
        enable_checkpointing=False,
    )
    return Compute(
        device=trainer.strategy.root_device,
        autocast=trainer.precision_plugin.forward_context,
        memory_gb=cfg.features.memory_gb,
        folder=cfg.features.folder or tempfile.gettempdir(),
    )


def _told(report: Report, network: str) -> Report:
    chosen = report.summary
    if MEASURED in chosen:
        log.info(
            "%s, %s: layer %d (%s) has %.1f %% ± %.1f of the %s; chosen by %.1f %% of %s",
            *(report.name, network, chosen["layer"], chosen["pooling"]),
            *(100 * chosen[MEASURED], 100 * chosen["standard_error"], chosen["measured_on"]),
            *(100 * chosen[HELD_OUT], chosen["chosen_on"]),
        )
    return report


def _found(reports: dict[str, Report]) -> dict[str, Any]:
    """Plain data: the checkpoint's summary; where others are compared a summary of each, too."""
    first = reports["checkpoint"]
    found: dict[str, Any] = {"evaluation": first.name, **first.summary}
    if len(reports) == 1:
        return found | {"rows": first.rows}
    rows = [{"network": name, **row} for name, report in reports.items() for row in report.rows]
    return found | {"random": reports["random"].summary, "rows": rows}


def _record(cfg: DictConfig, data: LabelledData) -> dict[str, Any]:
    """What the numbers depend on besides the checkpoint."""
    sources = {"train": data.train.source, "val": data.val.source}
    return {
        "version": __version__,
        "settings": OmegaConf.to_container(cfg.evaluation, resolve=True),
        "view": OmegaConf.to_container(cfg.view, resolve=True),
        "precision": cfg.trainer.precision,
        "seed": cfg.seed,
        "data": {name: fingerprint.of_source(source) for name, source in sources.items()},
    }


def _files(cfg: DictConfig, output: str | Path | None, overwrite: bool) -> dict[str, Path] | None:
    """Where to write to, by suffix. Raises UserError where something stands there."""
    if output is None:
        return None
    folder = Path(output).expanduser()
    name = str(cfg.evaluation._target_).rpartition(".")[0].rpartition(".")[2]
    files = {suffix: folder / f"{name}.{suffix}" for suffix in ("json", "csv", "png")}
    there = [path for path in files.values() if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"{there[0]} exists already: give another output=FOLDER, or say overwrite=true"
        )
    return files


def _write(files: dict[str, Path], reports: dict[str, Report], record: dict[str, Any]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(record["rows"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["rows"])
    with explained(files["csv"]):
        replace_text(files["csv"], text.getvalue())
        replace_text(files["json"], json.dumps(record, indent=2) + "\n")
        save_figure(curves(dict(_panels(reports)), x="layer", dashed=" (random)"), files["png"])
    log.info("written: %s", ", ".join(map(str, files.values())))


def _panels(reports: dict[str, Report]) -> Iterator[tuple[str, Any]]:
    """Panel -> line -> (layers, values), the lines of all networks in the same panels."""
    for title in reports["checkpoint"].series:
        lines: dict[str, Any] = {}
        for network, report in reports.items():
            suffix = "" if network == "checkpoint" else f" ({network})"
            lines |= {f"{name}{suffix}": line for name, line in report.series[title].items()}
        yield title, lines
