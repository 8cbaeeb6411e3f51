"""Puts configs/ into the wheel as beit/configs, the user's own configs/local/ left out.

Hatchling's force-include would ship that folder too, and leave a stale copy beside an editable
install, which reads configs/ in the checkout.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":
            return
        root = Path(self.root)
        for path in sorted((root / "configs").rglob("*.yaml")):
            relative = path.relative_to(root)
            if relative.parts[1] != "local":
                build_data["force_include"][str(path)] = f"beit/{relative.as_posix()}"
