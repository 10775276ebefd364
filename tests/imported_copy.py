"""Which copy of vidattn a test or benchmark run has imported, and whether it can be the one that is meant.

In a clone Python finds the clone's own package before an installed one. If nobody has built the extension there, every
call takes the reference: tests of kernels vanish, and times are not those of this library. Such a run does not start.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

import vidattn
import vidattn.ops
from vidattn.installation import EXTENSION, is_checkout

BUILD = "python setup.py build_ext --inplace"


def has_extension(package: Path) -> bool:
    """Tell whether a folder of the package holds the compiled extension."""
    return (package / EXTENSION.name).is_file()


def installed_copies() -> list[Path]:
    """Find the folders of the package that an installation put in place, an editable one included."""
    roots = [Path(entry or ".") for entry in sys.path]
    for distribution in importlib.metadata.distributions(name="vidattn"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            roots.append(Path(unquote(urlparse(origin["url"]).path)))
    return [root / "vidattn" for root in roots if (root / "vidattn" / "__init__.py").is_file()]


def why_refused(
    package: Path = Path(vidattn.__file__).parent,
    environment: Mapping[str, str] = os.environ,
    copies: Iterable[Path] | None = None,
) -> str | None:
    """Say why a run must not start with the copy that was imported; None if it may.

    Args:
        package: folder of the copy.
        environment: the variables that choose a backend or a build.
        copies: folders of other copies; those that are installed unless given.

    Returns:
        What is wrong and the command that helps.
    """
    if has_extension(package) or not is_checkout(package):
        return None
    if environment.get("VIDATTN_BACKEND", "auto") not in ("", "auto"):
        return None
    found = f"vidattn was imported from {package.parent}, a source tree without the compiled extension"
    cure = f"build it there: {BUILD}"
    for copy in installed_copies() if copies is None else copies:
        if copy.resolve() != package.resolve() and has_extension(copy):
            return f"{found}, while the copy in {copy.parent} has one; {cure} (VIDATTN_BACKEND=reference runs without)"
    compiler = environment.get("CXX", "c++").split()[0]
    if environment.get("VIDATTN_BUILD_EXT") != "0" and shutil.which(compiler):
        return f"{found}, and a C++ compiler ({compiler}) is here; {cure} (VIDATTN_BUILD_EXT=0 runs without)"
    return None


def describe() -> str:
    """Say in one line which copy was imported and what its kernels are."""
    package = Path(vidattn.__file__).parent
    reasons = vidattn.why_not("window3d_attention", backend="cpu")
    kernels = f"no compiled kernels ({reasons[0]})" if reasons else f"CPU kernels for {torch.ops.vidattn._cpu_isa()}"
    return f"vidattn {vidattn.__version__} from {package}: {kernels}; backend {vidattn.current_backend()}"
