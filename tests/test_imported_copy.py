"""Which copies of the package tests and benchmarks start with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from imported_copy import BUILD, describe, why_refused

import vidattn

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clone(tmp_path) -> Path:
    """The package in a source tree where nothing was built."""
    (tmp_path / "clone" / "csrc").mkdir(parents=True)
    (tmp_path / "clone" / "setup.py").touch()
    return make_package(tmp_path / "clone")


def make_package(root: Path, *, built: bool = False) -> Path:
    package = root / "vidattn"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if built:
        (package / "_C.so").touch()
    return package


def with_compiler(tmp_path: Path) -> dict[str, str]:
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    return {"CXX": f"{compiler} -O2"}


NO_COMPILER = {"CXX": "/no/such/compiler"}


def test_unbuilt_clone_beside_a_built_installation_is_refused(clone, tmp_path):
    installed = make_package(tmp_path / "site-packages", built=True)
    refused = why_refused(clone, NO_COMPILER, [clone, installed])
    assert str(clone.parent) in refused and str(installed.parent) in refused and BUILD in refused
    assert why_refused(clone, NO_COMPILER | {"VIDATTN_BACKEND": "reference"}, [installed]) is None
    pure = make_package(tmp_path / "pure")
    assert why_refused(clone, NO_COMPILER, [clone, pure]) is None


def test_unbuilt_clone_where_it_could_be_built_is_refused(clone, tmp_path):
    environment = with_compiler(tmp_path)
    assert BUILD in why_refused(clone, environment, [])
    assert BUILD in why_refused(clone, environment | {"VIDATTN_BACKEND": "auto"}, [])
    assert why_refused(clone, environment | {"VIDATTN_BACKEND": "reference"}, []) is None
    assert why_refused(clone, environment | {"VIDATTN_BUILD_EXT": "0"}, []) is None
    assert why_refused(clone, NO_COMPILER, []) is None


def test_built_clones_and_installations_start(clone, tmp_path):
    environment = with_compiler(tmp_path)
    assert why_refused(make_package(tmp_path / "site-packages"), environment, []) is None  # pure by choice
    (clone / "_C.so").touch()
    assert why_refused(clone, environment, [make_package(tmp_path / "other", built=True)]) is None


def test_description_names_copy_kernels_and_backend():
    with vidattn.use_backend("reference"):
        line = describe()
    assert str(ROOT / "vidattn") in line and "backend reference" in line and "\n" not in line


@pytest.mark.parametrize("folder", ["benchmarks", "tests"])
def test_suites_refuse_an_unbuilt_clone(folder, tmp_path):
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "golden", "results")
    for name in ("vidattn", "kernels", folder):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "tests/imported_copy.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VIDATTN_")}
    environment |= with_compiler(tmp_path) | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", folder, "-p", "no:cacheprovider", "--collect-only"]
    child = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 4, child.stdout + child.stderr
    assert f"vidattn was imported from {tmp_path}, a source tree without the compiled extension" in child.stderr
    assert BUILD in child.stderr
