"""How this copy of vidattn came here: whether its kernels are missing by choice, and which command builds them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# The compiled extension. An installation may link the other files to a source tree, but not this one.
EXTENSION = Path(__file__).parent / "_C.so"
# setup.py leaves this file in an installed copy for which VIDATTN_BUILD_EXT=0 was set.
PURE_BY_CHOICE = "pure_by_choice.txt"

_TOOLS = '"setuptools>=77" ninja'


def pure_by_choice() -> bool:
    """Tell whether somebody wanted no compiled extension: now or when this copy was installed."""
    return os.environ.get("VIDATTN_BUILD_EXT") == "0" or (PACKAGE / PURE_BY_CHOICE).is_file()


def is_checkout(package: Path | None = None) -> bool:
    """Tell whether a copy, this one if not said otherwise, lies in a source tree: the extension is built in place."""
    package = package or PACKAGE
    return (package.parent / "setup.py").is_file() and (package.parent / "csrc").is_dir()


def build_command() -> str:
    """Return the shell command that builds the compiled extension of this copy; it fails if there is no compiler."""
    python = shlex.quote(sys.executable or "python")
    tools = f"{python} -m pip install {_TOOLS}"
    if is_checkout():
        return (
            f"cd {shlex.quote(str(PACKAGE.parent))} && {tools} && "
            f"VIDATTN_BUILD_EXT=1 {python} setup.py build_ext --inplace"
        )
    install = "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall"
    return f"{tools} && VIDATTN_BUILD_EXT=1 {python} -m {install} {_source()}"


def _source() -> str:
    """Return where pip finds the sources of this copy; "." for a clone that is the current folder."""
    try:
        distribution = importlib.metadata.distribution("vidattn")
    except importlib.metadata.PackageNotFoundError:
        return "."
    found = json.loads(distribution.read_text("direct_url.json") or "{}")
    url = found.get("url", ".whl")
    if url.endswith(".whl"):  # of an index, or a file: it has no sources, but the index has
        return f"--no-binary vidattn vidattn=={distribution.version}"
    if "vcs_info" in found:
        url = f"{found['vcs_info']['vcs']}+{url}@{found['vcs_info']['commit_id']}"
    return shlex.quote(url)
