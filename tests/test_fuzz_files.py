"""Damaged and malicious files: an error that says what is wrong, or a right result, soon and in little memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COUNTS = [50, pytest.param(1000, marks=pytest.mark.slow)]


def read_files(kind: str, count: int, folder: Path, first: str = "") -> subprocess.CompletedProcess[str]:
    """Read that many files in another process, which runs some Python first."""
    code = f"import sys, torch, fuzz_files\nfrom pathlib import Path\ntorch.set_num_threads(1)\n{first}\n"
    code += f"fuzz_files.main({kind!r}, 0, {count}, Path({str(folder)!r}))\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["videos", "checkpoints"])
def test_damaged_and_malicious_files(kind: str, count: int, tmp_path: Path) -> None:
    child = read_files(kind, count, tmp_path)
    # The last number that is printed is that of the file that did it: python tests/fuzz_files.py KIND NUMBER 1 FOLDER.
    assert child.returncode == 0, f"{child.returncode}: {child.stdout[-50:]}{child.stderr[-3000:]}"
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["read"] + found["refused"] == count
    # Neither is everything refused nor is nothing, and for many reasons.
    assert found["read"] > 0 and found["refused"] > count // 3 and len(found["kinds"]) >= 5, found
    assert found["seconds"] < 10, found


# By what goes wrong: of which files, what makes it go wrong, and what the process says.
FAULTS = {
    "code runs": (
        "checkpoints",
        "load = torch.load\n"
        "torch.load = lambda path, map_location, weights_only: load(path, map_location, weights_only=False)",
        "AssertionError: something was run",
    ),
    "memory": (
        "videos",
        "read = fuzz_files.read_video\nfuzz_files.read_video = lambda path: (bytearray(10**9), read(path))",
        "MemoryError",
    ),
    "a model half filled": (
        "checkpoints",
        "load = fuzz_files.load_checkpoint\n"
        "def fill(model, path):\n"
        "    with torch.no_grad():\n"
        "        next(model.parameters()).add_(1)\n"
        "    load(model, path)\n"
        "fuzz_files.load_checkpoint = fill",
        "AssertionError: a model half filled",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_seen(fault: str, tmp_path: Path) -> None:
    kind, code, said = FAULTS[fault]
    child = read_files(kind, 50, tmp_path, code)
    assert child.returncode == 1 and re.search(said, child.stderr), child.stderr[-2000:]


def test_what_takes_long_is_ended(tmp_path: Path) -> None:
    child = read_files(
        "videos", 1, tmp_path, "fuzz_files.SECONDS = 1\nfuzz_files.read_video = lambda path: [*iter(int, 1)]"
    )
    assert child.returncode == -signal.SIGALRM and child.stdout.splitlines()[-1] == "videos 0"
