"""Make the package for Hugging Face's kernel hub out of this repository: ``python hub/make.py build/hub``.

The folder is a project of kernel-builder (``build.toml``, ``torch-ext/vidattn``), which builds and uploads it. Under
``build`` it also holds what kernel-builder would make of it, so that ``kernels.get_local_kernel`` loads it as it is.

Its sources are the files here that the ops need, changed in two ways, so that an installed vidattn and several versions
of the package can be in one process: imports are relative, and the ops are in a namespace of the build.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
# How kernel-builder has the namespace of a build, in a file of its own.
OPS = '''"""The namespace of this build's ops."""

import torch

_NAME = "{name}"
ops = getattr(torch.ops, _NAME)


def add_op_namespace_prefix(name: str) -> str:
    """Name an op with its namespace."""
    return f"{{_NAME}}::{{name}}"
'''


def file_of(module: str) -> Path | None:
    """Give the file of a module or package of vidattn; None if it has none."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def needed() -> dict[Path, str]:
    """Give the text of all files that the ops need, by their place in the package."""
    found: dict[Path, str] = {}
    modules = ["vidattn.ops"]
    while modules:
        file = file_of(modules.pop())
        if file is None or (place := file.relative_to(ROOT / "vidattn")) in found:
            continue
        found[place] = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(found[place])):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vidattn":
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                modules += [part if file_of(part) else node.module for part in parts]
    return found


def rewritten(text: str, place: Path) -> str:
    """Make the imports of a file relative and its ops those of the build; raise if something is left."""
    dots = "." * len(place.parts)
    text = re.sub(r"^( *)from vidattn(?:\.(?=\w)|(?= ))", rf"\1from {dots}", text, flags=re.MULTILINE)
    before = text
    text = re.sub(r'f"vidattn::\{(\w+)\}"', r"add_op_namespace_prefix(\1)", text)
    text = text.replace('"vidattn::"', 'add_op_namespace_prefix("")')
    text = text.replace('torch.library.Library("vidattn"', "torch.library.Library(namespace.name")
    text = re.sub(r"(?<!`)torch\.ops\.vidattn\b", "namespace", text)
    if text != before:
        first = "from __future__ import annotations\n"
        text = text.replace(first, f"{first}from {dots}_ops import add_op_namespace_prefix, ops as namespace\n", 1)
    for node in ast.walk(ast.parse(text)):
        if (
            (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("vidattn"))
            or (isinstance(node, ast.Import) and any(alias.name.startswith("vidattn") for alias in node.names))
            or (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.vidattn")
            or (isinstance(node, ast.Constant) and isinstance(node.value, str) and "vidattn::" in node.value)
        ):
            raise ValueError(f"{place}:{node.lineno}: {ast.unparse(node)}: vidattn is named in a new way")
    return text


def make(folder: Path) -> None:
    """Write the package into a folder, in place of one that was made before."""
    for name in ("torch-ext", "build"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(HUB, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("make.py", "__pycache__"))
    shutil.copy2(ROOT / "LICENSE", folder)
    package = folder / "torch-ext" / "vidattn"
    for place, text in needed().items():
        file = package / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rewritten(text, place), encoding="utf-8")
        (file.parent / "__init__.py").touch()
    # vidattn.installation looks for this file: nobody is told to compile what the hub has none of.
    (package / "pure_by_choice.txt").write_text("The hub's package has no compiled extension.\n", encoding="utf-8")

    settings = (folder / "build.toml").read_text(encoding="utf-8")
    version, backends = re.search(r"^version = (\d+)(?:.|\n)*?^backends = (.*)$", settings, re.MULTILINE).groups()
    digest = hashlib.sha256()
    for file in sorted(file for file in package.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(package)}\0{file.read_text(encoding='utf-8')}\0".encode())
    for backend in ast.literal_eval(backends):
        name = f"_vidattn_{backend}_{digest.hexdigest()[:7]}"
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(package, variant)
        (variant / "_ops.py").write_text(OPS.format(name=name), encoding="utf-8")
        metadata = {
            "name": "vidattn",
            "id": name,
            "version": int(version),
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the package for Hugging Face's kernel hub.")
    parser.add_argument("folder", type=Path, help="where to write it, build/hub say")
    make(parser.parse_args().folder)
