"""Builds data_loaders/native/rows.so while the package is installed, where there is a C compiler and libjpeg-turbo.

Without them the loader decodes with Pillow. EVENKEEL_NATIVE=0 builds nothing; with 1 it is an error not to. CC, CFLAGS
and LDFLAGS are heeded.
"""

import os
import shlex
import subprocess
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
GUARDS = ["-Wall", "-Wextra", "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]


class Native(BuildHookInterface):
    """Of hatchling: called for each wheel, editable ones among them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get("EVENKEEL_NATIVE", "")
        if self.target_name != "wheel":
            return
        if wanted == "0":
            (Path(self.root) / "data_loaders" / "native" / "rows.so").unlink(missing_ok=True)
            return
        try:
            build(Path(self.root) / "data_loaders" / "native")
        except (OSError, subprocess.CalledProcessError) as wrong:
            if wanted == "1":
                raise
            self.app.display_warning(f"The native decoder was not built, so Pillow decodes: {reason(wrong)}")
            return
        if version != "editable":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")
            build_data["artifacts"].append("data_loaders/native/rows.so")


def build(folder: Path) -> None:
    """folder/rows.c -> folder/rows.so, which replaces an older one at once. Raises OSError or CalledProcessError."""
    source, made = folder / "rows.c", folder / f"rows.{os.getpid()}.so"
    compiler, flags, links = (shlex.split(os.environ.get(name, "")) for name in ("CC", "CFLAGS", "LDFLAGS"))
    known = f"-DSOURCE={zlib.crc32(source.read_bytes())}u"
    command = [*(compiler or ["cc"]), *FLAGS, *GUARDS, *flags, known, str(source), "-o", str(made), *links]
    try:
        subprocess.run([*command, "-ljpeg", "-lm"], check=True, capture_output=True, text=True)
        made.replace(folder / "rows.so")
    finally:
        made.unlink(missing_ok=True)


def reason(wrong: OSError | subprocess.CalledProcessError) -> str:
    """The first error, in one line."""
    said = wrong.stderr.splitlines() if isinstance(wrong, subprocess.CalledProcessError) else [str(wrong)]
    return next((line for line in said if "error" in line), said[0] if said else "the compiler failed").strip()
