"""Weights in and out: any known layout to any other, nothing lost without being said."""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from beit.checkpoints.models import Checkpoint, read_checkpoint
from beit.errors import UserError
from beit.files import local_path, replacing
from beit.interop import huggingface, ours, timm, unilm
from beit.interop.checks import checked, without
from beit.interop.fields import Fields
from beit.interop.recognise import is_ours, open_foreign
from beit.interop.weights import NORMALIZATIONS, Settings, Weights

log = logging.getLogger(__name__)


def read(path: str | Path, settings: Settings | None = None) -> Weights:
    """The weights of a file or folder in any known layout, every tensor accounted for.

    Raises:
        UserError: not there, damaged, of no known layout, incomplete, or with tensors that nothing
            explains and that `settings.allow` does not name.
    """
    settings = settings or Settings()
    if settings.normalize not in (None, *NORMALIZATIONS):
        raise UserError(
            f"normalize={settings.normalize}: expected one of {', '.join(NORMALIZATIONS)}"
        )
    weights = ours.read(path) if is_ours(path) else _read_foreign(path, settings)
    if settings.norm_eps:
        arch = replace(weights.architecture, norm_eps=settings.norm_eps)
        weights = weights.changed(architecture=arch)
    if settings.taps is not None:
        if weights.decoder is None:
            raise UserError(f"taps={list(settings.taps)}: {path} is no segmentation model")
        weights = weights.changed(decoder=replace(weights.decoder, taps=settings.taps))
    if settings.classes is not None:
        weights = weights.changed(classes=settings.classes)
    return checked(weights, path, settings)


def _read_foreign(path: str | Path, settings: Settings) -> Weights:
    found = open_foreign(path)
    if found.layout == "huggingface":
        assert found.config is not None
        beside = found.path.parent / "preprocessor_config.json"
        processor = Fields.read(beside) if beside.is_file() else None
        folder = huggingface.Folder(found.config, processor)
        return huggingface.read(found.tensors, folder, path, settings)
    if found.layout == "timm":
        return timm.read(found.tensors, found.config, path, settings)
    if found.layout == "segmentation":
        return unilm.read_segmentation(found.tensors, found.content, path, settings)
    return unilm.read(found.tensors, found.content, path, settings)


def any_checkpoint(
    path: str | Path, *, tell: Literal["table", "remarks", "nothing"] = "table", config: bool = True
) -> Checkpoint:
    """A checkpoint of ours, or what another library's file would be as one.

    Args:
        tell: what to log of foreign tensors: what became of each, or what was assumed and left
            behind alone, for callers that have a table of their own.
        config: whether a run's config is needed; Hydra cannot compose one within a training run.

    Raises UserError for what `read` refuses.
    """
    if is_ours(path):
        return read_checkpoint(path)
    path = local_path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: the path must name a file that exists")
    weights = read(path)
    report = weights.report
    if tell != "nothing":
        log.info("%s\n%s", path, report if tell == "table" else "\n".join(report.remarks()))
    return ours.checkpoint(weights, path, config=config)


def write(weights: Weights, to: str, output: str | Path) -> None:
    """Write weights in a layout: a file for ours and unilm, a folder for timm and huggingface.

    Raises:
        UserError: the layout has no place for a part of the model, or the output is there already
            or cannot be written.
    """
    if to not in _WRITERS:
        raise UserError(f"to={to}: expected one of {', '.join(_WRITERS)}")
    output = local_path(output)
    suffix = {"ours": ".safetensors", "unilm": ".pth"}.get(to, "")
    if suffix and output.suffix != suffix:
        raise UserError(f"output={output}: a file of {to} has the suffix {suffix}")
    if not suffix and output.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"output={output}: {to} is a folder of files; give a name without suffix")
    if output.exists() or output.is_symlink():
        raise UserError(f"output={output} exists already: give another name or remove it")
    try:
        _WRITERS[to](weights, output)
    except OSError as error:
        raise UserError(
            f"output={output} cannot be written ({error.strerror}): choose another place"
        ) from error


def convert(source: str | Path, to: str, output: str | Path, settings: Settings) -> Weights:
    """Read, leave behind what is allowed to stay, write. Returns what was written, with its report.

    Raises UserError for what `read` and `write` refuse; nothing is left half written.
    """
    if to not in _WRITERS:
        raise UserError(f"to={to}: expected one of {', '.join(_WRITERS)}")
    weights = without(read(source, settings), settings.allow)
    write(weights, to, output)
    return weights


def _write_unilm(weights: Weights, output: Path) -> None:
    content = unilm.content(weights)
    with replacing(output) as file:
        torch.save(content, file)


def _write_timm(weights: Weights, output: Path) -> None:
    tensors, config = timm.content(weights)
    _write_folder(output, tensors, {"config.json": config})


def _write_huggingface(weights: Weights, output: Path) -> None:
    tensors, config, processor = huggingface.content(weights)
    files = {"config.json": config, "preprocessor_config.json": processor}
    _write_folder(output, tensors, files)


def _write_folder(output: Path, tensors: dict[str, Any], files: dict[str, Any]) -> None:
    """All files, or no folder."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as draft:
        whole = Path(draft) / output.name  # the draft itself is its owner's alone
        whole.mkdir()
        save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (whole / name).write_text(text, encoding="utf-8")
        whole.rename(output)


_WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    "ours": ours.write,
    "timm": _write_timm,
    "huggingface": _write_huggingface,
    "unilm": _write_unilm,
}
