"""Builds the C modules when a compiler is there; without it the Python versions serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = (
    Path("backup/lazarette/backup/_native.c"),
    Path("fuse/lazarette/fuse/_native.c"),
    Path("fuse/lazarette/fuse/_records.c"),
    Path("fuse/lazarette/fuse/_serving.c"),
    Path("storage/lazarette/storage/_native.c"),
)


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles each C module next to its source, for editable installs and wheels alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See hatchling's BuildHookInterface."""
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if self.target_name != "wheel" or compiler is None:
            return
        for source in SOURCES:
            self._build(compiler, Path(self.root) / source, build_data)

    def _build(self, compiler: str, source: Path, build_data: dict[str, Any]) -> None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        module = source.with_name(f"{source.stem}{suffix}")
        command = [compiler, "-O3", "-fPIC", "-shared", "-Wall", "-o", f"{module}.new"]
        command += [f"-I{sysconfig.get_path('include')}", str(source)]
        built = subprocess.run(command, check=False, capture_output=True, text=True)
        if built.returncode != 0:
            self.app.display_warning(f"{source} was not built: {built.stderr.strip()}")
            return
        os.replace(f"{module}.new", module)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(f"/{module.relative_to(self.root)}")
