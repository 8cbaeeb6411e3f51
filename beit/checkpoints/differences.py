"""What a resumed run may change without being another run.

A resumed run that differs in anything else is refused by name, unless the user allows it by name:
`allow_changes=[trainer.max_epochs,optim]`. The longest key that fits decides.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from beit.errors import UserError
from beit.nearest import did_you_mean

# True: no number that is trained depends on it
FREE = {
    "": False,
    "name": True,
    "paths": True,
    "resume": True,
    "init_from": True,
    "allow_changes": True,
    "job": True,
    "logger": True,
    # the others of a user's may change the weights, and so does `ema`
    "callbacks.checkpoints": True,
    "callbacks.classes": True,
    "callbacks.curves": True,
    "callbacks.online_probe": True,
    "callbacks.optimizer": True,
    "callbacks.pictures": True,
    "callbacks.progress": True,
    "callbacks.throughput": True,
    # what is read is compared itself, see `beit.data.fingerprint`; it may lie somewhere else
    "data": True,
    "labelled": True,
    "datamodule.train": True,
    "datamodule.val": True,
    "datamodule.eval_transform": True,
    "views.eval": True,
    "task.min_used_share": True,  # for a warning
    # its weights are compared
    "tokenizer.path": True,
    "tokenizer.encoder_path": True,
    "tokenizer.decoder_path": True,
    "token_cache": True,
    "datamodule.token_cache": True,
    # the global batch is what counts, however it is spread
    "batch.per_device": True,
    "loader.batch_size_per_device": True,
    "model.activation_checkpointing": True,
    "trainer.accelerator": True,
    "trainer.devices": True,
    "trainer.num_nodes": True,
    "trainer.strategy": True,
    "trainer.accumulate_grad_batches": True,
    "loader.num_workers": True,
    "loader.prefetch_factor": True,
    "loader.timeout_seconds": True,
    "loader.check_images": True,
    "loader.max_unreadable_images": True,
    "loader.max_image_pixels": True,
    "trainer.benchmark": True,
    "trainer.check_val_every_n_epoch": True,
    "trainer.default_root_dir": True,
    "trainer.detect_anomaly": True,
    "trainer.deterministic": True,
    "trainer.enable_checkpointing": True,
    "trainer.enable_model_summary": True,
    "trainer.enable_progress_bar": True,
    "trainer.inference_mode": True,
    "trainer.limit_val_batches": True,
    "trainer.log_every_n_steps": True,
    "trainer.max_time": True,
    "trainer.num_sanity_val_steps": True,
    "trainer.profiler": True,
    "trainer.val_check_interval": True,
}

Change = tuple[str, Any, Any]  # key, before, now


def config_changes(
    old: dict[str, Any], new: dict[str, Any], *, old_composed: Any, new_composed: Any
) -> list[Change]:
    """Keys at which two resolved configs differ, each where the user would change it.

    What follows another key (`datamodule.views: ${views}`) is not named a second time.
    """
    return [
        change
        for change in _differing(old, new)
        if not _follows(change[0], old_composed, new_composed)
    ]


def data_changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """What differs in the training data: `data`, or `tokenizer`, whose weights make the targets."""
    changes: list[Change] = []
    before, now = old.get("train") or {}, new.get("train") or {}
    if before.get("sha256") != now.get("sha256"):
        changes.append(("data", before.get("source"), now.get("source")))
    if old.get("tokenizer") != new.get("tokenizer"):
        changes.append(("tokenizer", _short(old.get("tokenizer")), _short(new.get("tokenizer"))))
    return changes


def refused(changes: Sequence[Change], allowed: Sequence[str]) -> list[Change]:
    """Those changes that make another run of it and were not allowed.

    A name allows what lies below it. `data` and `tokenizer` from `data_changes` are keys like any
    other here, but never free.
    """
    return [change for change in changes if not any(_below(change[0], name) for name in allowed)]


def is_free(key: str) -> bool:
    fitting = [name for name in FREE if name == "" or _below(key, name)]
    return FREE[max(fitting, key=len)]


def check_allowed(names: Sequence[str], config: dict[str, Any]) -> None:
    """Raises UserError for a name of `allow_changes` that is no key of the config."""
    keys = [".".join(parts) for parts in _keys(config)]
    for name in names:
        if name not in keys:
            raise UserError(f"allow_changes: {name} is no key: {did_you_mean(name, keys)}")


def told(changes: Sequence[Change]) -> str:
    """One line: what was, and what is."""
    return ", ".join(f"{key} was {before} and is {now}" for key, before, now in changes)


def _differing(old: Any, new: Any, prefix: str = "") -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differing(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix[:-1], old, new


def _follows(key: str, old: Any, new: Any) -> bool:
    """Whether a key takes its value from others in both, of which each is named for itself."""
    text = _interpolation(key, old)
    if text is None or text != _interpolation(key, new) or "oc.env" in text:
        return False
    references = re.findall(r"\$\{([\w.]+)\}", text)
    return bool(references) and not any(is_free(reference) for reference in references)


def _interpolation(key: str, composed: Any) -> str | None:
    """The interpolation that a key, or one above it, stands for."""
    for part in key.split("."):
        composed = composed.get(part) if isinstance(composed, dict) else None
        if isinstance(composed, str) and "${" in composed:
            return composed
    return None


def _keys(node: Any, parts: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if parts:
        yield parts
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from _keys(value, (*parts, str(key)))


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _short(digest: str | None) -> str:
    return f"the one of SHA-256 {digest[:8]}" if digest else "none"
