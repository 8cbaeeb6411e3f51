"""W&B that cannot be reached: how long the start waits, and what is said."""

import http.server
import logging
import os
import socket
import sys
import threading
import time
import types
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("wandb")

from lightning.pytorch.loggers import WandbLogger

from beit.loggers import wandb as ours
from beit.loggers.wandb import ID_FILE, BoundedWandbLogger


@contextmanager
def answering(code):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            if code is None:
                time.sleep(1)
                return
            assert self.path == "/graphql"
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("code", [200, 404, 500])
def test_any_answer_counts(code):
    with answering(code) as url:
        assert ours._unreachable(url, 5.0) == ""


def test_a_server_that_shows_its_pages_and_hangs_where_runs_begin():
    with answering(None) as url:
        said = ours._unreachable(url, 0.1)
    assert "did not answer within 0.1 s" in said or "timed out" in said


def test_nobody_there():
    assert "cannot be reached" in ours._unreachable("http://127.0.0.1:9", 5.0)
    assert "cannot be reached" in ours._unreachable("http://nowhere.invalid", 5.0)
    assert "cannot be reached" in ours._unreachable("no address", 5.0)


def test_one_who_accepts_and_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        said = ours._unreachable(f"http://127.0.0.1:{server.getsockname()[1]}", 0.2)
    assert time.monotonic() - began < 2.0
    assert "did not answer within 0.2 s" in said or "timed out" in said


def test_a_name_that_takes_for_ever_to_look_up(monkeypatch):
    def slow(*_, **__):
        time.sleep(1)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    began = time.monotonic()
    assert "did not answer within 0.1 s" in ours._unreachable("http://slow.example", 0.1)
    assert time.monotonic() - began < 2.0


class Run:
    """What wandb.init gives back."""

    def __init__(self, folder):
        self.dir = f"{folder}/wandb/offline-run-1/files"
        self.id = "abc"

    def define_metric(self, *_, **__):
        pass


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts a run with W&B replaced; returns (what init was called with, the logger)."""

    def run(*, url="http://127.0.0.1:9", key="k" * 40, refuses=False, **arguments):
        calls = []

        class Refusal(Exception):
            pass

        def init(**options):
            calls.append(options)
            if refuses and options.get("mode") != "offline":
                raise Refusal("timed out\nafter a while")
            return Run(tmp_path)

        fake = types.ModuleType("wandb")
        fake.init, fake.run, fake.Settings = init, None, lambda **options: options
        fake.errors = types.SimpleNamespace(Error=Refusal)
        settings = types.SimpleNamespace(base_url=url, api_key=key, mode="online")
        fake.setup = lambda: types.SimpleNamespace(settings=settings)
        modules = {"wandb.sdk.lib": {"RunDisabled": int}, "wandb.wandb_run": {"Run": Run}}
        monkeypatch.setitem(sys.modules, "wandb", fake)
        for name, content in modules.items():
            module = types.ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "")  # put back in the end
        monkeypatch.delenv("WANDB_ERROR_REPORTING")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        logger = BoundedWandbLogger(str(tmp_path), project="beit", **arguments)
        assert isinstance(logger, WandbLogger)
        assert logger.experiment.id == "abc"
        # else W&B's report of itself would hold up the end of the process for 10 s
        assert os.environ["WANDB_ERROR_REPORTING"] == "false"
        return calls, logger

    return run


def test_without_a_server_it_is_offline_and_says_how_to_go_on(begin, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "beit"):
        calls, _ = begin()
    assert [call["mode"] for call in calls] == ["offline"]
    (line,) = caplog.messages
    assert line.startswith("W&B: http://127.0.0.1:9 cannot be reached (")
    assert line.endswith(f"upload it with: wandb sync {tmp_path}/wandb/offline-run-1")


def test_without_a_key_it_does_not_ask_for_one(begin, caplog):
    with caplog.at_level(logging.WARNING, "beit"), answering(200) as url:
        calls, _ = begin(url=url, key="")
    assert [call["mode"] for call in calls] == ["offline"]
    assert "no key for http://127.0.0.1" in caplog.messages[0]


def test_a_key_in_netrc_is_one(begin, tmp_path, caplog):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    with answering(200) as url:
        calls, _ = begin(url=url, key="")
    assert "mode" not in calls[0]


def test_with_a_server_it_is_online_within_limits(begin, caplog):
    with answering(404) as url:
        calls, _ = begin(url=url, finish_seconds=7.0)
    assert "mode" not in calls[0]
    settings = calls[0]["settings"]
    assert 1.0 <= settings["init_timeout"] <= 4.0  # what is left of answer_seconds
    assert settings["finish_timeout"] == 7.0
    assert calls[0]["resume"] == "allow"
    assert not caplog.messages


def test_a_server_that_does_not_begin_the_run(begin, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "beit"), answering(200) as url:
        calls, _ = begin(url=url, refuses=True)
    assert [call.get("mode") for call in calls] == [None, "offline"]
    assert calls[0]["id"] != calls[1]["id"] == (tmp_path / ID_FILE).read_text().strip()
    assert caplog.messages[0].startswith("W&B: timed out after a while; the run is logged offline")


def test_a_resumed_run_keeps_its_id_and_the_seeds_know_nothing_of_it(begin):
    np.random.seed(3)
    first, _ = begin(offline=True)
    again, _ = begin(offline=True)
    assert first[0]["id"] == again[0]["id"]
    assert first[0]["mode"] == "offline"
    assert np.random.random() == np.random.RandomState(3).random_sample()
