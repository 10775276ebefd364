"""The package as it is installed: what it needs, what it brings."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vidattn
from vidattn import installation

ROOT = Path(__file__).parent.parent

# Makes everything but torch and its own requirements unimportable, then uses the package.
BARE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"triton", "numpy", "av", "rich", "matplotlib", "safetensors", "PIL", "torchvision", "pytest", "hypothesis"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is absent", name=name)

sys.meta_path.insert(0, Absent())
import torch
import vidattn
"""


def copy_package(folder: Path) -> Path:
    """Copy the package without its extension."""
    left_out = shutil.ignore_patterns("_C*.so", "__pycache__")
    return shutil.copytree(ROOT / "vidattn", folder / "vidattn", ignore=left_out)


def run_bare(code: str, folder: Path) -> str:
    """Run code on a copy of the package, with no compiler and no GPU in reach."""
    hidden = ("VIDATTN_BACKEND", "VIDATTN_CPU_ISA", "CC", "CXX", "CUDA_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(folder), "PATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore::UserWarning:torch", "-c", BARE + code]
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return copy_package(tmp_path_factory.mktemp("bare")).parent


def test_works_with_nothing_but_torch(folder):
    printed = run_bare(
        """
qkv = torch.randn(1, 3, 5, 4, 3, 2, 8, requires_grad=True)
table = torch.randn(3 * 5 * 5, 2, requires_grad=True)
context = vidattn.window3d_attention(qkv, table, window_size=(2, 3, 3), shift_size=1)
context.sum().backward()
assert context.shape == (1, 3, 5, 4, 16) and table.grad.isfinite().all() and qkv.grad.shape == qkv.shape
reasons = vidattn.why_not("window3d_attention", backend="cpu")
print(vidattn.__file__, len(reasons), "vidattn/_C.so is not built" in str(reasons), sep="|")
""",
        folder,
    )
    file, count, named = printed.strip().split("|")
    assert Path(file).is_relative_to(folder)
    assert int(count) >= 1 and named == "True"


def test_a_named_backend_stays_strict_without_the_extension(folder):
    printed = run_bare(
        """
try:
    vidattn.window3d_attention(torch.randn(1, 2, 2, 2, 3, 1, 4), window_size=2, backend="cpu")
except ValueError as error:
    print(error)
""",
        folder,
    )
    assert "backend 'cpu' cannot run this call" in printed


def test_model_and_accelerate_work_with_nothing_but_torch(folder):
    printed = run_bare(
        """
model = vidattn.models.create_model("video_swin_t", embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5).eval()
video = torch.randn(1, 3, 4, 32, 32)
with torch.no_grad():
    before = model(video)
    vidattn.accelerate(model)
    print((model(video) - before).abs().max().item())
""",
        folder,
    )
    assert float(printed) < 1e-5


def test_import_needs_only_torch():
    # torch's FLOP counter, which knows our formulas, imports triton of its own accord where there is one.
    code = (
        "import torch.utils.flop_counter, sys; before = set(sys.modules); import vidattn;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names) - {'vidattn', 'torch'}))"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.split() == []


def test_version_is_a_literal():
    # setuptools reads it without importing the package, which would need torch.
    tree = ast.parse((ROOT / "vidattn" / "__init__.py").read_text())
    values = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "__version__"
        and isinstance(node.value, ast.Constant)
    ]
    assert values == [vidattn.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", vidattn.__version__)


def test_kernels_folder_does_not_shadow_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import kernels; print(getattr(kernels, '__file__', None))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "None"  # a namespace, which any installed package goes before


@pytest.mark.parametrize(
    ("loads", "reason"),
    [
        # It registers nothing, as one without a version. Native ops would read other arguments than they are given.
        ("lambda path: None", "the compiled extension vidattn/_C.so was built from other sources; build it again"),
        ("torch.ops.load_library", "the compiled extension vidattn/_C.so does not load ({folder}/vidattn/_C.so: "),
    ],
)
def test_an_extension_of_other_sources_or_a_broken_one_is_not_called(loads, reason, tmp_path):
    (copy_package(tmp_path) / "_C.so").write_text("no library")
    program = f"""
import torch
torch.ops.load_library = {loads}
import vidattn
assert vidattn.temporal_attention(torch.ones(1, 4, 3, 1, 2), 2).shape == (1, 4, 2)
try:
    vidattn.temporal_attention(torch.ones(1, 4, 3, 1, 2), 2, backend="cpu")
except ValueError as error:
    print(error)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert run.returncode == 0 and reason.format(folder=tmp_path) in run.stdout, run.stderr


def test_a_wrong_wish_for_cuda_is_refused():
    environment = os.environ | {"VIDATTN_BUILD_EXT": "1", "VIDATTN_BUILD_CUDA": "yes"}
    command = [sys.executable, "setup.py", "--name"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode != 0
    assert "VIDATTN_BUILD_CUDA: expected 0, 1 or nothing, got 'yes'" in child.stderr


def find_cuda(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask setup.py for the toolkit it takes, in an environment without one but for what is said."""
    program = """
import pathlib, runpy, sys, setuptools
setuptools.setup = lambda **_: None
found = runpy.run_path("setup.py")["find_cuda"](pathlib.Path(sys.argv[1]))
print(found.home, found.build, sep="|")
"""
    hidden = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "VIDATTN_BUILD_CUDA")}
    command = [sys.executable, "-c", program.replace('"setup.py"', repr(str(ROOT / "setup.py"))), str(folder)]
    environment = hidden | {"PATH": str(folder), "VIDATTN_BUILD_EXT": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def toolkit(folder: Path, version: str, works: bool = True) -> Path:
    """Make a folder that looks like a CUDA toolkit."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    outcome = "exit 0" if works else "echo 'the compiler \"g++\" is too new'; exit 1"
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'Cuda compilation tools, release {version}, V{version}.1';; "
        f"*) {outcome};; esac\n"
    )
    nvcc.chmod(0o755)
    return folder


def test_a_toolkit_that_works_is_taken(tmp_path):
    good = toolkit(tmp_path / "good", "13.1")
    (tmp_path / "nvcc").symlink_to(good / "bin" / "nvcc")
    for environment in ({}, {"CUDA_HOME": str(good)}, {"VIDATTN_BUILD_CUDA": "1"}):
        assert find_cuda(tmp_path, **environment).stdout == f"{good}|13.1\n"
    assert find_cuda(tmp_path, VIDATTN_BUILD_CUDA="0").stdout == "None|VIDATTN_BUILD_CUDA was 0\n"


@pytest.mark.parametrize(
    ("version", "works", "problem"),
    [
        ("12.4", True, "nvcc is of CUDA 12.4, which is older than 12.8"),
        ("13.0", False, 'the compiler "g++" is too new'),
    ],
)
def test_a_toolkit_that_does_not_work_is_named(tmp_path, version, works, problem):
    home = str(toolkit(tmp_path / "bad", version, works))
    built = find_cuda(tmp_path, CUDA_HOME=home)
    assert built.stdout.startswith("None|") and problem in built.stdout
    assert problem in built.stderr and built.stderr.count("\n") == 1
    required = find_cuda(tmp_path, CUDA_HOME=home, VIDATTN_BUILD_CUDA="1")
    assert (
        required.returncode != 0 and f"VIDATTN_BUILD_CUDA=1: {home}" in required.stderr and problem in required.stderr
    )


def test_without_a_toolkit_there_are_no_cuda_kernels(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert find_cuda(tmp_path, CUDA_HOME=nowhere).stdout.startswith("None|no nvcc was found; with VIDATTN_BUILD_CUDA=1")
    assert "no nvcc was found" in find_cuda(tmp_path, CUDA_HOME=nowhere, VIDATTN_BUILD_CUDA="1").stderr


def test_the_command_that_builds_names_what_was_installed(tmp_path, monkeypatch):
    python = shlex.quote(sys.executable)
    tools = f'{python} -m pip install "setuptools>=77" ninja'
    assert installation.is_checkout()
    assert installation.build_command() == (
        f"cd {shlex.quote(str(ROOT))} && {tools} && VIDATTN_BUILD_EXT=1 {python} setup.py build_ext --inplace"
    )
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "vidattn")
    (tmp_path / "vidattn").mkdir()
    monkeypatch.delenv("VIDATTN_BUILD_EXT", raising=False)
    assert not installation.is_checkout() and not installation.pure_by_choice()
    (tmp_path / "vidattn" / installation.PURE_BY_CHOICE).touch()
    assert installation.pure_by_choice()

    class Installed:
        text: str | None
        version = "1.2"

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return self.text

    monkeypatch.setattr(installation.importlib.metadata, "distribution", lambda name: Installed())
    vcs = {"url": "https://host/v.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    for text, source in (
        (None, "--no-binary vidattn vidattn==1.2"),
        (json.dumps({"url": "file:///a/vidattn-1.2-py3-none-any.whl"}), "--no-binary vidattn vidattn==1.2"),
        (json.dumps({"url": "file:///a%20b/clone", "dir_info": {}}), "file:///a%20b/clone"),
        (json.dumps(vcs), "git+https://host/v.git@abc"),
    ):
        Installed.text = text
        command = installation.build_command()
        assert command.startswith(f"{tools} && VIDATTN_BUILD_EXT=1 {python} -m pip install ")
        assert command.endswith(f" --force-reinstall {source}")
