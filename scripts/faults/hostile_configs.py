"""Attacks of the fault sweep by what is composed: recipes, words, Hydra's own keys, YAML."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARKER = "MARKER"
SECRET = "hostile-s3cret-value"
RUN = [
    *("train", "task=classification", "model=micro", "data=digits", "logger=csv"),
    *("loader.num_workers=0", "loader.check_images=1", "batch.global_size=32"),
    *("batch.per_device=32", "trainer.max_epochs=1", "trainer.limit_train_batches=1"),
    "optim.warmup_epochs=0",
]


class Payload:
    """Unpickled, it makes the marker."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


@dataclass(frozen=True)
class Case:
    """One attack. `experiment` is the text of a recipe that the command names."""

    name: str
    words: tuple[str, ...] = ()
    experiment: str = ""
    prepare: Callable[[], None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)
    verb: tuple[str, ...] = tuple(RUN)
    runs: bool = False  # without the checks its payload does run


def _callback(target: str, arguments: str = "", **named: Any) -> str:
    """A recipe with a callback that calls `target`."""
    lines = ["callbacks:", "  evil:", f"    _target_: {target}"]
    lines += [f"    _args_: [{arguments}]"] if arguments else []
    lines += [f"    {key}: {value}" for key, value in named.items()]
    return "\n".join(lines)


def pickled() -> None:
    Path("evil.pkl").write_bytes(pickle.dumps(Payload()))


def _evil_module() -> None:
    text = f"open({MARKER!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("evil_module.py", "hubconf.py"):
        Path(name).write_text(text, encoding="utf-8")
    package = Path("evil_package")
    package.mkdir()
    (package / "__init__.py").write_text(text, encoding="utf-8")


# target, arguments, keywords, and whether Hydra alone would let the payload run
_TARGETS: list[tuple[str, str, dict[str, Any], bool]] = [
    ("os.system", f"touch {MARKER}", {}, False),
    ("subprocess.run", f"[touch, {MARKER}]", {}, False),
    ("builtins.eval", f"\"open('{MARKER}', 'w')\"", {}, False),
    ("builtins.open", f"{MARKER}, w", {}, True),
    ("io.open", f"{MARKER}, w", {}, True),
    ("codecs.open", f"{MARKER}, w", {}, True),
    ("pathlib.Path.touch", "{_target_: pathlib.Path, _args_: [" + MARKER + "]}", {}, True),
    ("torch.load", "evil.pkl", {"weights_only": "false"}, True),
    ("numpy.load", "evil.pkl", {"allow_pickle": "true"}, True),
    ("joblib.load", "evil.pkl", {}, True),
    ("torch.hub.load", "'.', nothing", {"source": "local"}, True),
    ("distutils.spawn.spawn", f"[touch, {MARKER}]", {}, False),
    ("evil_module.Evil", "", {}, True),
    ("evil_package.Evil", "", {}, True),
    ("lightning.fabric.utilities.cloud_io._load", "evil.pkl", {"weights_only": "false"}, True),
    ("lightning.pytorch.LightningModule.load_from_checkpoint", "evil.pkl", {}, False),
    ("shutil.copy", f"evil.pkl, {MARKER}", {}, True),
    ("torch.save", f"1, {MARKER}", {}, True),
    ("numpy.savetxt", f"{MARKER}, [1]", {}, True),
    ("logging.FileHandler", MARKER, {}, True),
    ("sqlite3.connect", MARKER, {}, True),
    ("zipfile.ZipFile", f"{MARKER}, w", {}, True),
    ("torch.distributed.run.main", "[evil_module.py]", {}, False),
    ("os.mkdir", MARKER, {}, True),
    ("beit.cli.os.system", f"touch {MARKER}", {}, False),
    ("beit.run_folder.subprocess.run", f"[touch, {MARKER}]", {}, False),
    ("beit.tokenizers.pickles.pickle.load", "evil.pkl", {}, False),
    ("beit.tokenizers.pickles.torch.load", "evil.pkl", {"weights_only": "false"}, True),
    ("beit.run_folder.make", "{_target_: pathlib.Path, _args_: [" + MARKER + "]}", {}, True),
    ("beit.cli.main", "", {}, False),
    ("hydra.utils.instantiate", "{_target_: io.open, _args_: [" + MARKER + ", w]}", {}, False),
    ("importlib.import_module", "evil_module", {}, False),
    ("runpy.run_path", "evil_module.py", {}, False),
    ("torch.jit.load", "evil.pkl", {}, False),
    ("torchvision.datasets.utils.extract_archive", "evil.zip", {}, True),
    ("lightning.pytorch.callbacks.LambdaCallback", "", {}, False),
    ("lightning.pytorch.profilers.SimpleProfiler", "", {"dirpath": "..", "filename": "x"}, False),
    ("functools.partial", "{_target_: io.open, _args_: [" + MARKER + ", w]}", {}, True),
    ("torch.nn.Sequential", "{_target_: io.open, _args_: [" + MARKER + ", w]}", {}, True),
    ("torch.nn.Sequential", "[[{_target_: io.open, _args_: [" + MARKER + ", w]}]]", {}, True),
    ("io.open", f"{MARKER}, w", {"_partial_": "true"}, False),
    ("${name}", "", {}, False),
]


def _zip() -> None:
    with zipfile.ZipFile("evil.zip", "w") as archive:
        archive.writestr(MARKER, "x")


def _files() -> None:
    pickled()
    _evil_module()
    _zip()


def _target_cases() -> Iterator[Case]:
    for number, (target, arguments, named, runs) in enumerate(_TARGETS):
        text = _callback(target, arguments, **named)
        yield Case(f"_target_ {number}: {target}", experiment=text, prepare=_files, runs=runs)
    open_marker = f"{{_target_: io.open, _args_: [{MARKER}, w]}}"
    for group in ("model", "datamodule", "job", "optim", "loader"):
        text = f"{group}: {{_target_: io.open, file: {MARKER}, mode: w}}"
        yield Case(f"_target_ of {group}", experiment=text)
    for name, value in {
        "escaped interpolation": f"\\\\${{oc.create:{open_marker}}}",
        "oc.create": f"${{oc.create:{open_marker}}}",
        "oc.decode": f"'${{oc.decode:\"{open_marker}\"}}'",
        "made-up key": "${a${name}b}",
        "unknown resolver": "${exec:x}",
        "underscored argument": "{_target_: torch.nn.Identity, _x_: 1}",
        "argument of a number": "{_target_: torch.nn.Identity, 1: 1}",
    }.items():
        text = f"callbacks: {{evil: {{_target_: torch.nn.Sequential, _args_: [{value}]}}}}"
        yield Case(f"callback's argument: {name}", experiment=text)
    words = ("+callbacks.evil={_target_:io.open,_args_:[" + MARKER + ",w]}",)
    yield Case("word: a callback", words, runs=True)
    yield Case("word: model._target_", ("model._target_=os.system",))
    text = f"logger: {{evil: {{_target_: torch.save, obj: 1, f: {MARKER}}}}}"
    yield Case("_target_ of a logger", experiment=text, runs=True)
    wandb = "{_target_: lightning.pytorch.loggers.WandbLogger, save_dir: '${paths.output_dir}', "
    text = f"logger: {{evil: {wandb}settings: {{base_url: http://127.0.0.1:9}}}}}}"
    yield Case("a server of W&B's", experiment=text)


_HANDLER = f"{{class: logging.FileHandler, filename: {MARKER}}}"
_LOGGING = f"{{version: 1, root: {{handlers: [x]}}, handlers: {{x: {_HANDLER}}}}}"
_HYDRA = {
    "callbacks": f"{{evil: {{_target_: io.open, _args_: [{MARKER}, w]}}}}",
    "launcher": "{_target_: evil_module.Evil}",
    "sweeper": "{_target_: evil_module.Evil}",
    "run": f"{{dir: {MARKER}}}",
    "output_subdir": MARKER,
    "job": "{env_set: {BEIT_TRUST: evil_module.}}",
    "job: env_copy": "{env_copy: [A_SECRET]}",
    "job: chdir": "{chdir: true}",
    "job_logging": _LOGGING,
    "hydra_logging": _LOGGING,
    "searchpath": "[pkg://evil_package]",
    "overrides": "{task: ['paths.output_dir=" + MARKER + "']}",
    "sweep": f"{{dir: ../{MARKER}}}",
    "sweep: subdir": f"{{subdir: ../../../{MARKER}}}",
    "sweeper: params": "{params: {trust: evil_module., seed: '0'}}",
    "sweeper: folders": "{params: {paths.output_dir: '../" + MARKER + "'}}",
}


def _hydra_cases() -> Iterator[Case]:
    for key, value in _HYDRA.items():
        name = key.partition(":")[0]
        sweep = ("-m",) if name in ("launcher", "sweeper", "sweep", "hydra_logging") else ()
        runs = key in ("callbacks", "run", "output_subdir", "job_logging", "sweep")
        text = f"hydra: {{{name}: {value}}}"
        secret = {"A_SECRET": SECRET} if "env_copy" in key else {}
        yield Case(f"hydra.{key}", sweep, text, _files, environment=secret, runs=runs)
    for word in (
        "hydra.searchpath=[pkg://evil_package]",
        f"hydra.run.dir={MARKER}",
        f"+hydra.callbacks.evil={{_target_:io.open,_args_:[{MARKER},w]}}",
        "hydra.launcher._target_=evil_module.Evil",
        "hydra/job_logging=default",
        f"+hydra.job.env_set.X={MARKER}",
        "trust=os;system",
    ):
        yield Case(f"word: {word}", (word,), prepare=_files)
    for flag in ("--experimental-rerun=evil.pkl", "--config-path=.", "--shell-completion"):
        yield Case(f"flag {flag}", (flag,), prepare=pickled)
    yield Case("a flag as a value", ("--config-dir", "--experimental-rerun=evil.pkl"))


def _link() -> None:
    Path("runs").mkdir()
    Path("elsewhere").mkdir()
    Path("runs/run").symlink_to(Path("elsewhere").resolve())


_OUT = "${paths.output_dir}/../../" + MARKER
_CALLBACKS = "lightning.pytorch.callbacks"


def _folder_cases() -> Iterator[Case]:
    texts = {
        "paths.output_dir": f"paths: {{output_dir: ../{MARKER}}}",
        "paths.runs_dir": f"paths: {{runs_dir: ../{MARKER}}}",
        "trainer.default_root_dir": f"trainer: {{default_root_dir: ../{MARKER}}}",
        "checkpoints": _callback(f"{_CALLBACKS}.ModelCheckpoint", dirpath=_OUT),
        "a relative folder": _callback(f"{_CALLBACKS}.ModelCheckpoint", dirpath=MARKER),
        "a URL": _callback(f"{_CALLBACKS}.ModelCheckpoint", dirpath=f"file://{MARKER}"),
        "a file name": _callback(f"{_CALLBACKS}.ModelCheckpoint", filename=f"../../../{MARKER}"),
        "pictures": _callback("beit.callbacks.curves.Curves", metrics_file="x", folder=_OUT),
        "by position": _callback("beit.callbacks.curves.Curves", f"x, {MARKER}"),
        "csv": f"logger: {{csv: {{save_dir: '{_OUT}'}}}}",
        "TensorBoard": "logger: {evil: {_target_: lightning.pytorch.loggers.TensorBoardLogger, "
        f"save_dir: '${{paths.output_dir}}', name: ../../{MARKER}}}}}",
        "a download": "data: {train: {_target_: beit.data.sources.TorchvisionSource, name: CIFAR10,"
        f" root: ../{MARKER}, download: true}}}}",
        "told late": "name: ${hydra:job.num}/../../../x",
    }
    for name, text in texts.items():
        yield Case(f"folder: {name}", experiment=text)
    yield Case("folder: name", ("name=../../" + MARKER,))
    yield Case("folder: a link", ("name=run",), prepare=_link)


def _bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def _yaml_cases() -> Iterator[Case]:
    doubled = "\n".join(f"  k{n}: ${{task.k{n - 1}}}${{task.k{n - 1}}}" for n in range(1, 40))
    nested = "\n".join(
        f"  k{n}: {{a: '${{task.k{n - 1}}}', b: '${{task.k{n - 1}}}'}}" for n in range(1, 40)
    )
    texts = {
        "alias bomb": _bomb(),
        "merge bomb": "a0: &a0 {x: 1}\n"
        + "\n".join(f"a{n}: &a{n} {{k: *a{n - 1}, l: *a{n - 1}}}" for n in range(1, 40)),
        "recursive alias": "task: &a [*a]",
        "deep nest": "task: " + "[" * 2000 + "]" * 2000,
        "large file": "task: " + "x" * 300_000,
        "interpolation bomb": f"task:\n  k0: x\n{doubled}",
        "node bomb": f"task:\n  k0: {{x: 1}}\n{nested}",
        "endless interpolation": "task: {head: '${task}'}",
        "a tag": "task: !!python/object/apply:os.system ['touch " + MARKER + "']",
        "a path's tag": "task: !!python/object/apply:pathlib.Path [x]",
        "a large number": "task: " + "9" * 5000,
        "keys that are lists": "task: {? [1, 2] : 3}",
        "no YAML": "task: [unclosed",
        "a text": "just a text",
        "no list of defaults": "defaults: 5",
    }
    for name, text in texts.items():
        yield Case(f"YAML: {name}", experiment=text)
    yield Case("word: deep nest", ("+data.classes=" + "[" * 2000 + "]" * 2000,))
    yield Case("word: large", ("name=" + "x" * 100_000,))
    yield Case("YAML: no text", experiment="x", prepare=_no_text)


def _no_text() -> None:
    Path("experiment/mine.yaml").write_bytes(b"\xff\xfe\x00\x80")


def _secret_cases() -> Iterator[Case]:
    environment = {"A_SECRET_KEY": SECRET}
    texts = {
        "as a name": "name: x${oc.env:A_SECRET_KEY}",
        "under another key": "callbacks: {curves: {folder: '${oc.env:A_SECRET_KEY}'}}",
        "by a made-up name": "name: ${oc.env:A_${task_name}}",
        "as it is": f"name: {SECRET}",
    }
    for name, text in texts.items():
        yield Case(f"secret: {name}", experiment=text, environment=environment)
    yield Case("secret: typed", ("+logger.csv.api_key=" + SECRET,))


def config_cases() -> Iterator[Case]:
    """All of this file, in order."""
    yield from _target_cases()
    yield from _hydra_cases()
    yield from _folder_cases()
    yield from _yaml_cases()
    yield from _secret_cases()
