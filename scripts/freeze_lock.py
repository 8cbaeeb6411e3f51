"""Write requirements.lock: every package of an installation with the SHA-256 of its files.

    python -m venv /tmp/uv && /tmp/uv/bin/pip install uv
    .venv/bin/python scripts/freeze_lock.py /tmp/uv/bin/uv

The versions are those of constraints.txt; the hashes are of all files of a version, so that one
lock serves every system and Python. pip then takes no other file, whoever serves it:

    pip install --require-hashes -r requirements.lock && pip install --no-deps -e .
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = "requirements.lock"
HEADER = """\
# pip install --require-hashes -r requirements.lock && pip install --no-deps -e .
# made by scripts/freeze_lock.py from pyproject.toml (with demo and wandb) and constraints.txt
"""


def main() -> int:
    """Write the lock. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uv", help="the program uv")
    parser.add_argument("--output", type=Path, default=ROOT / LOCK)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / LOCK
        command = [options.uv, "pip", "compile", "pyproject.toml", "--quiet", "--universal"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--python-version=3.10"]
        command += ["--extra=demo", "--extra=wandb", "--constraints=constraints.txt"]
        done = subprocess.run([*command, f"--output-file={target}"], cwd=ROOT)
        if done.returncode:
            return done.returncode
        text = target.read_text(encoding="utf-8")
    if found := re.search(r"https?://|file://", text):
        print(f"the lock names a place to fetch from: {found[0]}", file=sys.stderr)
        return 1
    options.output.write_text(HEADER + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
