"""The package for Hugging Face's kernel hub: made of the sources here, loaded by their library, put into a model."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from kernels._rust import Build  # what kernel-builder reads build.toml with

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "vidattn"
    subprocess.run([sys.executable, ROOT / "hub" / "make.py", folder], check=True)
    return folder


def test_it_is_a_project_of_kernel_builder(made: Path) -> None:
    backends = {str(backend) for backend in Build.open(made).general.backends}
    assert {f"torch-{backend}" for backend in backends} == {path.name for path in (made / "build").iterdir()}
    assert {path.name for path in made.iterdir()} >= {"CARD.md", "LICENSE", "flake.nix", "torch-ext"}
    assert not list(made.rglob("make.py")) and not list(made.rglob("*.so"))


def test_it_imports_pytorch_and_triton_alone(made: Path) -> None:
    imported = set()
    for file in (made / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module)
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_it_is_made_anew(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(made, folder)
    (folder / "torch-ext" / "vidattn" / "old.py").touch()
    subprocess.run([sys.executable, ROOT / "hub" / "make.py", folder], check=True)
    files = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in (made, folder)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_two_builds_beside_vidattn(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made, other)
    for file in (other / "build" / "torch-cpu").glob("*.*"):  # what another version differs in
        file.write_text(file.read_text(encoding="utf-8").replace("_vidattn_cpu_", "_vidattn_cpu_0"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "hub_tasks.py", made, other],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TRITON_INTERPRET": "1",
            "VIDATTN_BACKEND": "triton",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "as vidattn\n"
