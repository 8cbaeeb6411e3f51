"""What the package's own source may call: one module unpickles, nothing runs text as code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import beit

ROOT = Path(beit.__file__).parent
PICKLES = "tokenizers/pickles.py"

# module or attribute whose use runs code out of a file or a text, and where it may stand
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "pickle": (PICKLES,),
    "torch.load": (PICKLES,),
    "torch.serialization": (PICKLES,),
    **dict.fromkeys(("cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"), ()),
    **dict.fromkeys(("torch.hub", "torch.jit.load", "torch.package", "pandas.read_pickle"), ()),
    **dict.fromkeys(("numpy.load", "numpy.fromfile", "eval", "exec", "compile"), ()),
    **dict.fromkeys(("os.system", "os.popen", "os.execv", "os.execve", "os.execvp"), ()),
    **dict.fromkeys(("yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), ()),
    "yaml.load": ("security/folders.py",),  # with our own bounded loader
    # git describe; the members of a sweep; the processes of a job
    "subprocess": ("run_folder.py", "sweep.py", "job/"),
    "importlib.import_module": ("__init__.py", "security/targets.py"),
    "__import__": (),
    "load_state_dict_from_url": (),
}
# keyword arguments with these values
FORBIDDEN_VALUES = {
    ("weights_only", False),
    ("allow_pickle", True),
    ("trust_remote_code", True),
    ("shell", True),
    ("pickle_module", ...),
}


def uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Full names that a module uses, as far as its own imports tell, and the lines."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, _, rest = dotted(node).partition(".")
            yield f"{names.get(first, first)}.{rest}".rstrip("."), node.lineno


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "()"


def faults(text: str, place: str) -> list[str]:
    tree = ast.parse(text)
    found = []
    for name, line in uses(tree):
        for forbidden, allowed in FORBIDDEN.items():
            used = name == forbidden or name.startswith(f"{forbidden}.")
            if used and not place.startswith(allowed):
                found.append(f"{place}:{line}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            value = node.value.value if isinstance(node.value, ast.Constant) else ...
            # Lightning's own save takes an argument of that name, which reads nothing
            saves = place == "checkpoints/keeper.py" and node.arg == "weights_only"
            if (node.arg, value) in FORBIDDEN_VALUES and not saves:
                found.append(f"{place}:{node.value.lineno}: {node.arg}={value}")
    return found


def test_only_one_module_reads_foreign_pickles() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 60
    found = [fault for path in files for fault in _of(path)]
    assert not found, "\n".join(found)


def _of(path: Path) -> list[str]:
    return faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())


def test_every_exception_is_used() -> None:
    for name, places in FORBIDDEN.items():
        for place in places:
            if place.endswith("/"):
                continue
            used = [n for n, _ in uses(ast.parse((ROOT / place).read_text(encoding="utf-8")))]
            assert any(n == name or n.startswith(f"{name}.") for n in used), (name, place)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load",
        "from torch import hub as h\nh.load('x')",
        "import numpy as np\nnp.load('x')",
        "f(weights_only=False)",
        "f(allow_pickle=True)",
        "import yaml\nyaml.load('x', Loader=yaml.UnsafeLoader)",
        "eval('1')",
        "import os\nos.system('x')",
        "import subprocess as s\ns.run('x')",
        "from importlib import import_module as i\ni('x')",
    ],
)
def test_the_scan_finds(text: str) -> None:
    assert faults(text, "data/x.py")


def test_weights_only_is_always_said() -> None:
    """Where it is said, the variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has no say."""
    tree = ast.parse((ROOT / PICKLES).read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads
    for call in loads:
        assert "weights_only=True" in ast.unparse(call)
