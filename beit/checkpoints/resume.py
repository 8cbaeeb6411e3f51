"""Which checkpoint a run goes on from, and whether it is this run's."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from beit.checkpoints import differences
from beit.checkpoints.file import CheckpointFile, verify
from beit.checkpoints.folder import BEST, step_and_run
from beit.checkpoints.header import SUFFIX
from beit.checkpoints.models import Checkpoint, as_checkpoint
from beit.checkpoints.record import new_run_id
from beit.errors import UserError
from beit.files import explained, local_path, replace_text
from beit.run_folder import is_first_process

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # usually, the folder of them in the run's
RUN_ID = "run_id"  # in the run's folder: which checkpoints are its own
_RESTARTS = {"TORCHELASTIC_RESTART_COUNT": "torchrun", "SLURM_RESTART_COUNT": "SLURM"}


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: a verified checkpoint, or step 0."""

    run_id: str
    path: Path | None = None
    checkpoint: Checkpoint | None = None


def implied(resume: str | None, checkpoints: Path) -> str | None:
    """`resume`, or auto where torchrun or SLURM has started this job again.

    Also where the first start went on from a file: it has got further since, if it wrote any.
    """
    for variable, launcher in _RESTARTS.items():
        count = os.environ.get(variable, "0")
        wrote = any(checkpoints.glob(f"*{SUFFIX}"))
        if (resume is None or wrote) and count.isdecimal() and int(count) > 0:
            log.warning("restarted by %s (%s=%s): as with resume=auto", launcher, variable, count)
            return "auto"
    return resume


def find(folder: Path, resume: str | None, checkpoints: Path) -> Beginning:
    """Where the run in `folder`, which keeps `checkpoints`, begins. Verifies; writes nothing.

    `auto` takes the newest checkpoint of this run that verifies, and tells of each that it passes
    over. Where there is none yet it says so and begins at step 0, so that one command line serves
    the first start and every restart.

    Raises UserError where there are checkpoints and none is good, or the one named is not.
    """
    if resume is None:
        return Beginning(new_run_id())
    if resume == "auto":
        file = _newest(checkpoints, read_run_id(folder))
        if file is None:
            told = "resume=auto: no checkpoint in %s yet, this run starts at step 0"
            log.warning(told, checkpoints)
            return Beginning(read_run_id(folder) or new_run_id())
    else:
        path = local_path(resume)
        if not path.is_file():
            raise UserError(
                f"resume={resume}: no such checkpoint; resume=auto takes the newest of "
                f"{checkpoints}"
            )
        file = verify(path)
    checkpoint = as_checkpoint(file)
    log.info("resuming from %s", file.path)
    return Beginning(checkpoint.entry.get("run_id") or new_run_id(), file.path, checkpoint)


def check(
    beginning: Beginning,
    task: nn.Module,
    *,
    config: dict[str, Any],
    composed: dict[str, Any],
    data: dict[str, Any],
    allowed: Sequence[str],
) -> None:
    """Raises UserError where going on would make another run of it; logs what else differs.

    Args:
        config, composed, data: of this start, as `RunRecord` takes them.
        allowed: keys that may differ all the same.
    """
    differences.check_allowed(allowed, config)
    if beginning.checkpoint is None:
        return
    checkpoint, path = beginning.checkpoint, beginning.path
    theirs, ours = checkpoint.config.get("task_name"), config["task_name"]
    if theirs != ours:
        raise UserError(
            f"resume={path}: that is a run of task {theirs}, this one is of task {ours}; to start "
            "from its weights say init_from"
        )
    _check_shapes(task, checkpoint)
    changes = differences.config_changes(
        checkpoint.config, config, old_composed=checkpoint.composed, new_composed=composed
    )
    telling = [change for change in changes if not differences.is_free(change[0])]
    telling += differences.data_changes(checkpoint.entry.get("data") or {}, data)
    wrong = differences.refused(telling, allowed)
    if wrong:
        keys = ",".join(dict.fromkeys(key for key, *_ in wrong))
        raise UserError(
            f"resume={path}: {differences.told(wrong)}; that would be another run: go back to what "
            f"was, allow it by name (allow_changes=[{keys}]), or start anew with init_from"
        )
    for change in changes:
        log.info("other than before: %s", differences.told([change]))


def _check_shapes(task: nn.Module, checkpoint: Checkpoint) -> None:
    shapes = checkpoint.shapes
    for key, value in task.state_dict().items():
        if shapes.pop(key, None) != tuple(value.shape):
            raise UserError(
                f"resume={checkpoint.path}: {key} has another shape there than "
                f"{tuple(value.shape)}; a run goes on with the network it began with"
            )
    if shapes:
        raise UserError(
            f"resume={checkpoint.path}: the network has no {', '.join(list(shapes)[:4])}"
        )


def read_run_id(folder: Path) -> str:
    """The id of the run in a folder, "" where there is none."""
    try:
        return (folder / RUN_ID).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def write_run_id(folder: Path, run_id: str) -> None:
    """Mark a folder as this run's."""
    with explained(folder / RUN_ID):
        replace_text(folder / RUN_ID, f"{run_id}\n")


def _newest(folder: Path, run_id: str) -> CheckpointFile | None:
    """The newest checkpoint of this run in `folder` that verifies; None where there is no file.

    Raises UserError where there are files and none of them is good.
    """
    headers, passed = _headers(folder)
    runs = {run for _, run, _ in headers}
    if not run_id and len(runs) > 1:
        raise UserError(
            f"resume=auto: {folder} has checkpoints of {len(runs)} runs: name the one to go on "
            "from (resume=PATH)"
        )
    chosen = None
    for _, run, path in sorted(headers, reverse=True):
        if run_id and run != run_id:
            passed.append((path, f"is of another run ({run or 'without an id'})"))
            continue
        try:
            chosen = verify(path)
        except UserError as error:
            passed.append((path, _reason(path, error)))
            continue
        break
    if is_first_process():
        for path, reason in passed:
            log.warning("resume=auto passes over %s: it %s", path, reason)
    if chosen is None and passed:
        raise UserError(
            f"resume=auto: none of the {len(passed)} checkpoints in {folder} can be used "
            f"({passed[-1][0].name} {passed[-1][1]}); name another (resume=PATH), or give "
            "a new run another name (name=...)"
        )
    if chosen and passed and chosen.path.name == BEST and is_first_process():
        log.warning("resume=auto: all that is left is the best checkpoint, an earlier state")
    return chosen


def _headers(folder: Path) -> tuple[list[tuple[int, str, Path]], list[tuple[Path, str]]]:
    """((step, run id, path) of the files that can be read, path and reason of the others)."""
    found: dict[tuple[int, int], tuple[int, str, Path]] = {}
    unread = []
    # the numbered names come last, and win over a second name of the same file
    for path in sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob("*.ckpt")]):
        if path.is_symlink() and path.exists() and path.resolve().parent == folder.resolve():
            continue  # `last`: its file has its own name
        try:
            file = CheckpointFile.open(path)
            facts = os.fstat(file.descriptor)
            found[facts.st_dev, facts.st_ino] = *step_and_run(file.tree()), path
        except UserError as error:
            unread.append((path, _reason(path, error)))
    return list(found.values()), unread


def _reason(path: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{path} ")
