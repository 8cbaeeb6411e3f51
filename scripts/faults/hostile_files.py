"""Attacks of the fault sweep by files of weights: checkpoints of a stranger's, and pickles."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit import config
from beit.checkpoints.file import write_file
from scripts.faults.hostile_configs import MARKER, RUN, SECRET, Case, Payload, pickled

_VIT = {"_target_": "beit.models.vit.VisionTransformer"}
_OPEN = {"_target_": "io.open", "_args_": [MARKER, "w"]}
_DOWNLOAD = {"_target_": "beit.data.sources.TorchvisionSource", "name": "CIFAR10", "download": True}


def _checkpoint(**changes: Any) -> Callable[[], None]:
    """Write a checkpoint whose config is that of a run, with these groups exchanged."""

    def write() -> None:
        cfg = config.compose([*RUN[1:], "resume=null"])
        content = config.plain(cfg)
        content.update(changes)
        entry = {"config": content, "composed": content, "classes": None, "version": "0"}
        write_file("evil.safetensors", {"state_dict": {"x": torch.zeros(1)}, "beit": entry})

    return write


def _checkpoint_cases() -> Iterator[Case]:
    evaluate = ("evaluate", "checkpoint=evil.safetensors")
    predict = ("predict", "checkpoint=evil.safetensors", "images=evil.png")
    leak = {"_target_": "beit.models.heads.MIMHead", "width": "${oc.env:A_SECRET}"}
    deep: Any = 1
    for _ in range(55):  # what the reader takes is 64
        deep = [deep]
    for name, changes in {
        "a task": {"task": _OPEN},
        "a backbone": {"task": {"_target_": "beit.tasks.mim.MaskedImageModeling", "a": _OPEN}},
        "the data": {"datamodule": _OPEN},
        "a trainer": {"trainer": _OPEN},
        "a download": {"data": {"train": {**_DOWNLOAD, "root": f"../{MARKER}"}}},
        "a secret": {"task": leak},
        "an environment": {"name": "${oc.env:A_SECRET}"},
        "a bomb": {"task": {"k0": "xx", **_doubled("task")}},
        "a deep nest": {"task": deep},
        "no config": {"trainer": 5, "task": 5, "views": 5},
    }.items():
        secret = {"A_SECRET": SECRET}
        prepare = _checkpoint(**changes)
        yield Case(f"checkpoint: {name}", (), "", prepare, secret, evaluate, name == "the data")
        if name in ("a task", "a backbone", "a secret"):
            yield Case(f"predict: {name}", (), "", prepare, secret, predict)
    views = {"views": {"eval": _OPEN}}
    yield Case("predict: a transform", prepare=_checkpoint(**views), verb=predict, runs=True)
    views = {"views": {"eval": {**_DOWNLOAD, "root": f"../{MARKER}"}}}
    yield Case("predict: a download", prepare=_checkpoint(**views), verb=predict)
    network = {"task": {"_target_": "beit.tasks.mim.MaskedImageModeling", "a": _DOWNLOAD}}
    yield Case("predict: a network that downloads", prepare=_checkpoint(**network), verb=predict)


def _doubled(group: str) -> dict[str, str]:
    return {f"k{n}": f"${{{group}.k{n - 1}}}${{{group}.k{n - 1}}}" for n in range(1, 40)}


def _torch(name: str, **options: Any) -> Callable[[], None]:
    return lambda: torch.save({"state_dict": {"x": Payload()}}, name, **options)


def _numpy() -> None:
    np.save("evil.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    Path("evil.npy").rename("evil.pkl")


def _false_safetensors() -> None:
    Path("evil.safetensors").write_bytes(pickle.dumps(Payload()))


def _pickle_cases() -> Iterator[Case]:
    files: list[tuple[str, Callable[[], None]]] = [
        ("evil.pkl", pickled),
        ("evil.pt", _torch("evil.pt")),
        ("evil.pth", _torch("evil.pth", _use_new_zipfile_serialization=False)),
        ("evil.pkl", _numpy),
        ("evil.safetensors", _false_safetensors),
    ]
    force = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    pretrain = ("train", "experiment=pretrain/base_300ep", "trainer=cpu", "data=digits")
    for number, (name, prepare) in enumerate(files):
        for environment in ({}, force):
            given = {
                "init_from": (*RUN, f"init_from={name}"),
                "resume": (*RUN, f"resume={name}"),
                "evaluate": ("evaluate", f"checkpoint={name}"),
                "tokenizer": (*pretrain, f"tokenizer.encoder_path={name}", "name=run"),
            }
            forced = ", forced" if environment else ""
            for use, verb in given.items():
                title = f"pickle {number} as {use}{forced}"
                yield Case(title, prepare=prepare, environment=environment, verb=verb)
    for url in ("https://example.invalid/x.pkl", "file:///etc/passwd"):
        verb = (*pretrain, f"tokenizer.encoder_path={url}", "name=run")
        yield Case(f"a URL of weights {url}", verb=verb)


def file_cases() -> Iterator[Case]:
    """All of this file, in order."""
    yield from _checkpoint_cases()
    yield from _pickle_cases()
