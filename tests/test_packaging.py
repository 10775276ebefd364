"""The files that are published: what sdist and wheels hold and say of themselves, and what the binary asks for."""

from __future__ import annotations

import importlib.resources
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

import vidattn
from vidattn import installation

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns("build", "dist", ".venv", ".git", ".benchmarks", ".*_cache", ".hypothesis")
VERSION = vidattn.__version__

needs_extension = pytest.mark.skipif(not installation.EXTENSION.is_file(), reason="the extension is not built")


def run_setup(tree: Path, *arguments: str, **environment: str) -> None:
    """Run setup.py where torch cannot be imported: only compiling may need it."""
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", program, "-q", *arguments]
    child = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository that commands can write to."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "tree", symlinks=True, ignore=LEFT_OUT)


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    """The unpacked sdist, built without torch and without a compiler."""
    folder = tmp_path_factory.mktemp("sdist")
    run_setup(tree, "sdist", "--dist-dir", str(folder), VIDATTN_BUILD_EXT="1", PATH=str(folder))
    with tarfile.open(folder / f"vidattn-{VERSION}.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    return folder / f"vidattn-{VERSION}"


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """The wheel of pure Python."""
    folder = tmp_path_factory.mktemp("wheel")
    (tree / "kernels" / "probe.py").write_text('"""Stands for a Triton kernel."""\n')
    run_setup(tree, "bdist_wheel", "--dist-dir", str(folder), VIDATTN_BUILD_EXT="0")
    (tree / "kernels" / "probe.py").unlink()
    (found,) = folder.iterdir()
    return found


# ---- What is in them ----


def test_the_sdist_holds_the_repository(sdist, tree):
    """All that is tracked, and nothing that is ignored; where there is no git, as in an sdist, all that is here."""
    tracked = others = listed(tree)
    if (ROOT / ".git").exists():
        tracked, others = git_files("--cached"), git_files("--others", "--exclude-standard")
    made = {"PKG-INFO", "setup.cfg"}
    assert tracked - made - listed(sdist) == set()
    assert listed(sdist) - made - tracked - others == set()
    assert os.readlink(sdist / "vidattn" / "kernels") == os.path.join("..", "kernels")


def git_files(*which: str) -> set[str]:
    command = ["git", "ls-files", "--deduplicate", *which]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in names if os.path.lexists(ROOT / name)}


def listed(folder: Path) -> set[str]:
    """Name the files of a source tree, a link to a folder as one of them, without what is built there."""
    found = set()
    for top, folders, files in os.walk(folder):
        here = Path(top)
        files += [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name != "__pycache__" and not name.endswith(".egg-info")]
        found |= {(here / name).relative_to(folder).as_posix() for name in files if not name.endswith(".so")}
    return found


def test_the_sdist_describes_a_project(sdist):
    assert (sdist / "PKG-INFO").read_text().startswith("Metadata-Version: 2.4\nName: vidattn\n")


def test_the_wheel_of_pure_python_holds_the_package(wheel, tree):
    assert wheel.name == f"vidattn-{VERSION}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    expected = {path.relative_to(tree).as_posix() for path in (tree / "vidattn").rglob("*.py")}
    expected |= {"vidattn/py.typed", "vidattn/labels/kinetics400.txt", "vidattn/kernels/probe.py"}
    assert expected | {f"vidattn/{installation.PURE_BY_CHOICE}"} <= set(names)
    inside = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in inside} == {"vidattn"}
    assert not [name for name in inside if not name.endswith((".py", ".typed", ".txt"))]
    info = f"vidattn-{VERSION}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/entry_points.txt"} <= set(names)


def test_a_wheel_without_kernels_by_chance_is_none_by_choice(tree, tmp_path):
    """One for which there was no compiler; a warning will say what is missing."""
    run_setup(tree, "bdist_wheel", "--dist-dir", str(tmp_path), VIDATTN_BUILD_EXT="", CXX="no-such-compiler")
    names = zipfile.ZipFile(tmp_path / f"vidattn-{VERSION}-py3-none-any.whl").namelist()
    assert f"vidattn/{installation.PURE_BY_CHOICE}" not in names


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as packed:
        said = Parser().parsestr(packed.read(f"vidattn-{VERSION}.dist-info/METADATA").decode())
    needed = said.get_all("Requires-Dist", [])
    assert [name for name in needed if "extra ==" not in name] == ["torch>=2.11"]  # no triton: torch brings it, or not
    assert said["Requires-Python"] == ">=3.10" and said["License-Expression"] == "Apache-2.0"
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", " ".join(said.get_all("Classifier", [])))
    assert pythons == [f"3.{minor}" for minor in range(10, 15)]
    urls = dict(url.split(", ") for url in said.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(urls)
    assert all(url.startswith("https://github.com/vidattn/vidattn") for url in urls.values())
    assert "## Install" in said.get_payload()


# ---- The binary ----


def asked_of(file: Path) -> tuple[set[str], dict[str, set[str]]]:
    """Read which libraries a binary names, and which versions of their symbols, by prefix: {"GLIBC": {"2.17"}}."""
    with file.open("rb") as opened:
        elf = ELFFile(opened)
        libraries = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        versions: dict[str, set[str]] = {}
        for section in elf.iter_sections():
            if isinstance(section, GNUVerNeedSection):
                for _, symbols in section.iter_versions():
                    for symbol in symbols:
                        prefix, _, version = symbol.name.partition("_")
                        versions.setdefault(prefix, set()).add(version)
    return libraries, versions


@needs_extension
def test_the_extension_runs_on_manylinux_2_28():
    """On machines without a driver and beside a torch without CUDA, too."""
    policies = json.loads((importlib.resources.files("auditwheel.policy") / "manylinux-policy.json").read_text())
    policy = next(policy for policy in policies if policy["name"] == "manylinux_2_28")
    libraries, versions = asked_of(installation.EXTENSION)
    assert "libtorch_cpu.so" in libraries
    libraries -= {"libtorch.so", "libtorch_cpu.so", "libc10.so", "ld-linux-x86-64.so.2"}
    assert libraries <= set(policy["lib_whitelist"])
    allowed = policy["symbol_versions"][platform.machine()]
    if torch.ops.vidattn._cuda_build()[0].isdigit():
        # The static CUDA runtime takes threads and dlopen from where they are: with glibc 2.34 they moved into libc.
        allowed["GLIBC"].append("2.34")
    newer = {prefix: found - set(allowed.get(prefix, ())) for prefix, found in versions.items()}
    assert not any(newer.values()), newer
    assert installation.EXTENSION.stat().st_size < 15e6


@pytest.mark.parametrize(
    ("asked", "tag"),
    [
        ({"GLIBC_2.2.5", "GLIBC_2.27", "GLIBCXX_3.4.21", "CXXABI_1.3", "GCC_3.0"}, "manylinux_2_28"),
        ({"GLIBC_2.2.5", "GLIBC_2.34", "GLIBCXX_3.4.24"}, "manylinux_2_34"),
        ({"GLIBC_2.17", "GLIBCXX_3.4.25"}, ""),
        ({"GLIBC_2.17", "GLIBC_ABI_DT_RELR"}, ""),
        ({"GLIBC_2.17", "FOO_1"}, ""),
        (set(), ""),
    ],
)
def test_a_wheel_is_tagged_with_what_its_binary_asks_for(asked, tag, tmp_path):
    lines = "".join(f"    0x0d696913 0x00 20 {version}\n" for version in sorted(asked))
    text = tmp_path / "text"
    text.write_text(f"  SONAME FOO_9\n\nVersion References:\n  required from libc.so.6:\n{lines}\n")
    objdump = tmp_path / "objdump"
    objdump.write_text(f"#!/bin/sh\ncat {text}\n")
    objdump.chmod(0o755)
    program = """
import pathlib, runpy, setuptools
setuptools.setup = lambda **_: None
print(runpy.run_path("setup.py")["manylinux"](pathlib.Path("_C.so")))
"""
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}"}
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert child.stdout == f"{tag}\n"


@needs_extension
def test_the_extension_knows_no_python():
    with installation.EXTENSION.open("rb") as opened:
        symbols = [symbol.name for symbol in ELFFile(opened).get_section_by_name(".dynsym").iter_symbols()]
    assert symbols and not [name for name in symbols if name.startswith(("Py", "_Py"))]
