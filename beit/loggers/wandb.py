"""Weights & Biases where it can be reached in time, and its offline files where it can't."""

import logging
import netrc
import os
import secrets
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from beit.data.limits import not_negative
from beit.files import replace_text
from beit.security import telemetry

log = logging.getLogger(__name__)

ID_FILE = "wandb-id.txt"
_OFFLINE = ("offline", "dryrun", "disabled")


class BoundedWandbLogger(WandbLogger):
    """Lightning's W&B logger, which waits for the server for some seconds only.

    If there is no key, or the server has not begun the run within `answer_seconds`, the run is
    logged offline below `save_dir`, and a line says how to upload it. What is not uploaded
    `finish_seconds` after the end of the run stays there too. The run's id stands in
    `wandb-id.txt` of that folder: a resumed run goes on under it. W&B cannot take steps back: those
    that are repeated stand there twice.

    Args:
        save_dir: folder of the run.
        offline: do not look for the server.
        arguments: of Lightning's logger and of `wandb.init`.
    """

    def __init__(
        self,
        save_dir: str,
        *,
        offline: bool = False,
        answer_seconds: float = 4.0,
        finish_seconds: float = 5.0,
        **arguments: Any,
    ) -> None:
        self.answer_seconds = not_negative("answer_seconds", answer_seconds)
        self.finish_seconds = not_negative("finish_seconds", finish_seconds)
        super().__init__(save_dir=save_dir, **arguments)
        if offline:
            self._wandb_init["mode"] = "offline"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun at the first call."""
        if self._experiment is None:
            self._begin(Path(str(self._save_dir)))
        return self._experiment

    def _begin(self, folder: Path) -> None:
        telemetry.switch_off()  # at exit W&B would wait for 10 s to report to a silent server
        import wandb

        self._wandb_init["id"] = self._wandb_init["id"] or _kept_id(folder)
        known = wandb.setup().settings
        until = time.monotonic() + self.answer_seconds
        mode = self._wandb_init.get("mode") or os.environ.get("WANDB_MODE") or known.mode
        trouble = ""
        if mode not in _OFFLINE:
            trouble = self._trouble(str(known.base_url), bool(known.api_key))
        if trouble:
            self._wandb_init["mode"] = "offline"
        settings = wandb.Settings(
            init_timeout=max(1.0, until - time.monotonic()),
            finish_timeout=self.finish_seconds or 0.001,
        )
        self._wandb_init.setdefault("settings", settings)
        try:
            self._experiment = super().experiment
        except wandb.errors.Error as error:
            trouble = " ".join(str(error).split())
            self._wandb_init["mode"] = "offline"
            self._wandb_init["id"] = _new_id(folder)  # W&B holds on to that of the attempt
            self._experiment = super().experiment
        if trouble:
            path = Path(self._experiment.dir).parent
            log.warning(
                "W&B: %s; the run is logged offline, upload it with: wandb sync %s", trouble, path
            )

    def _trouble(self, url: str, has_key: bool) -> str:
        """What keeps it from logging online; empty if nothing seems to."""
        host = urllib.parse.urlsplit(url).hostname or ""
        if not (has_key or os.environ.get("WANDB_API_KEY") or _in_netrc(host)):
            return f"no key for {url} (wandb login, or WANDB_API_KEY)"
        return _unreachable(url, self.answer_seconds)


def _kept_id(folder: Path) -> str:
    """The id of the run that this folder belongs to, made up at the first start."""
    path = folder / ID_FILE
    if path.is_file() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    return _new_id(folder)


def _new_id(folder: Path) -> str:
    made = secrets.token_hex(5)  # not from the generators that the seed governs
    replace_text(folder / ID_FILE, f"{made}\n")
    return made


def _in_netrc(host: str) -> bool:
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _unreachable(url: str, seconds: float) -> str:
    """Why no answer came within so many seconds, looking up the name included; empty if one did."""
    said = [f"{url} did not answer within {seconds:g} s"]
    asking = threading.Thread(target=_ask, args=(url, seconds, said), daemon=True)
    asking.start()  # looking up a name cannot be given a time limit
    asking.join(seconds)
    return said[-1]


def _ask(url: str, seconds: float, said: list[str]) -> None:
    """Where W&B begins a run: a server may show its pages and still hang there."""
    query = b'{"query": "{serverInfo {frontendHost}}"}'
    try:
        asked = urllib.request.Request(  # a POST
            f"{url.rstrip('/')}/graphql", data=query, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=seconds):
            said.append("")
    except urllib.error.HTTPError:
        said.append("")  # an answer
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if "certificate" in str(reason).lower():
            said.append("")  # of an authority that W&B may know
        else:
            said.append(f"{url} cannot be reached ({reason})")
