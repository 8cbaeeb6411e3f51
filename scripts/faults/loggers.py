"""Loggers that raise, cannot reach their server or have a full disk: the weights stay the same."""

import http.server
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import TensorBoardLogger

from beit import runner
from beit.callbacks.metrics_file import MetricsFile
from scripts.faults.forked import Outcome, run_forked
from scripts.faults.tiny import final, tiny_run

ROW = "loggers that raise, have no server or a full disk"
TRIALS = 40
SHARE = 4

TIMEOUT = 240.0
DISK_KIB = 64
ERRORS = (OSError(28, "No space left on device"), RuntimeError("so"), KeyError("x"), MemoryError())


# in the child, before the run in this folder; returns words of its command line
Prepare = Callable[[Path], list[str]]


class Case(NamedTuple):
    """A fault, and what must be said of it."""

    name: str
    prepare: Prepare
    said: str


def run(trials: int, folder: Path, seed: int) -> tuple[int, int, str]:
    """The final weights are those of a run without loggers, and the fault is told."""
    expected = _weights(folder / "without", [_nothing], seed)[0]
    assert expected, "the run without loggers did not end"
    passed, failed = 0, []
    with _small_disk(folder / "disk") as disk:
        cases = _cases(trials, disk)
        for number, case in enumerate(cases):
            weights, outcome = _weights(folder / str(number), [case.prepare], seed)
            if weights == expected and case.said in outcome.output:
                passed += 1
            else:
                failed.append(case.name)
            if disk:
                _empty(disk)
    kinds = ", ".join(sorted({case.name.split()[0] for case in cases}))
    detail = f"final weights equal ({kinds}); {len(cases) - passed} not"
    detail += f": {', '.join(failed)}" if failed else ""
    return passed, len(cases), detail + ("" if disk else "; no disk could be mounted to be filled")


def control(folder: Path, seed: int) -> bool:
    """Unguarded, a logger that raises ends the run."""
    case = _raising("log_metrics", 2, ERRORS[1])
    weights, outcome = _weights(folder, [_unguarded, case.prepare], seed)
    return weights == "" and outcome.returncode != 0


def _weights(folder: Path, prepare: list[Prepare], seed: int) -> tuple[str, Outcome]:
    """SHA-256 of the weights after a tiny run, and how its process ended."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = run_forked(_child, folder, prepare, seed, timeout=TIMEOUT)
    end = final(folder)
    return (str(end["final"]) if end and outcome.returncode == 0 else ""), outcome


def _child(folder: Path, prepare: list[Prepare], seed: int) -> None:
    from beit.console import log_to_console

    log_to_console()
    words = [word for function in prepare for word in function(folder)]
    tiny_run(folder, seed=seed, words=words)


def _cases(trials: int, disk: Path | None) -> list[Case]:
    """Full disks first, then what raises, at different moments; the slow ones of W&B last."""
    cases = [] if disk is None else [_full(disk, where) for where in ("csv", "tensorboard", "log")]
    servers = (
        []
        if trials < 20
        else [_unreachable(kind) for kind in ("dead", "silent", "hanging", "keyless")]
    )
    methods = ("log_metrics", "save", "finalize", "experiment")
    for number in range(max(1, trials - len(cases) - len(servers))):
        error = ERRORS[number % len(ERRORS)]
        cases.append(_raising(methods[number % len(methods)], number // len(methods), error))
    return cases + servers


def _nothing(folder: Path) -> list[str]:
    return ["logger=none"]


def _unguarded(folder: Path) -> list[str]:
    runner.GuardedLogger = lambda inner: inner  # type: ignore[assignment,misc]
    return []


def _raising(method: str, after: int, error: Exception) -> Case:
    """A logger that raises at the call after so many of this method."""

    def prepare(folder: Path) -> list[str]:
        calls = 0
        whole: Any = getattr(MetricsFile, method, None)

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after or method in ("finalize", "experiment"):
                raise error
            return whole(self, *args, **kwargs)

        setattr(MetricsFile, method, property(broken) if method == "experiment" else broken)
        return []

    return Case(f"raising in {method}", prepare, "logger MetricsFile failed")


def _full(disk: Path, where: str) -> Case:
    """One of the logs on a disk that fills up."""

    def prepare(folder: Path) -> list[str]:
        with (disk / "ballast").open("wb") as file:
            file.write(bytes((DISK_KIB - 8) * 1024))
        (folder / "run").mkdir(parents=True)
        if where == "log":
            (folder / "run" / "train.log").symlink_to(disk / "train.log")
            _talk()
            return ["logger=none"]
        (folder / "run" / "logs").symlink_to(disk)
        kind: Any = MetricsFile if where == "csv" else TensorBoardLogger
        log_metrics = kind.log_metrics

        def often(self: Any, metrics: dict[str, float], step: int | None = None) -> None:
            for _ in range(200):
                log_metrics(self, metrics, step)
            if where == "tensorboard":
                self.experiment.flush()

        kind.log_metrics = often
        return [f"logger={where}", f"logger.{where}.save_dir=${{paths.output_dir}}/logs"]

    said = "train.log cannot be written" if where == "log" else "failed (OSError"
    return Case(f"full disk under {where}", prepare, said)


def _talk() -> None:
    announce = runner._announce

    def much(*args: Any) -> None:
        announce(*args)
        for _ in range(1000):
            logging.getLogger("beit").info("%s", "much to tell " * 10)

    runner._announce = much


def _unreachable(kind: str) -> Case:
    """W&B without a server, with one that is silent, at once or where runs begin, without a key."""

    def prepare(folder: Path) -> list[str]:
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            del os.environ[name]
        os.environ |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_SILENT": "true"}
        port = 9
        if kind == "silent":
            server = socket.create_server(("127.0.0.1", 0))
            port = server.getsockname()[1]
            _open.append(server)
        if kind == "hanging":
            pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
            threading.Thread(target=pages.serve_forever, daemon=True).start()
            port = pages.server_port
        os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{port}"
        if kind != "keyless":
            os.environ["WANDB_API_KEY"] = "0" * 40
        return ["logger=wandb"]

    return Case(f"W&B {kind}", prepare, "upload it with: wandb sync")


_open: list[socket.socket] = []


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Shows pages, and does nothing with what is sent to it."""

    def do_POST(self) -> None:
        time.sleep(TIMEOUT)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _small_disk(folder: Path) -> Any:
    """A disk of 64 KiB, or None where mounting is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
