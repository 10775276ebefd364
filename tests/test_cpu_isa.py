"""Every instruction set that this machine has, each in a process of its own: the choice is made once a process."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vidattn

HERE = Path(__file__).parent
BUILT = not vidattn.why_not("window3d_attention", backend="cpu")
FILES = ("test_window3d.py", "test_window3d_windows.py", "test_divided.py", "test_mixing.py")
# What differs between instruction sets: vector and tile lengths, conversions, the exponential, the dropout mask.
SELECTION = (
    "cpu and (head_dims or every_short or padding or clipped or dropout or log_sum_exp or adversarial or nan"
    " or repeatable or masked_rows or expanded or hid or channel_shifts or (window_lengths and 98))"
)


def _run(arguments: list[str], isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VIDATTN_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=HERE.parent, timeout=900
    )


def _available() -> list[str]:
    return torch.ops.vidattn._cpu_isas().split(",") if BUILT else []


def test_the_baseline_is_always_there() -> None:
    """Without the extension there is nothing to choose from, and that is what the registry says."""
    if BUILT:
        assert _available()[0] == "baseline"
        assert torch.ops.vidattn._cpu_isa() == os.environ.get("VIDATTN_CPU_ISA", _available()[-1])
    else:
        assert vidattn.why_not("window3d_attention", backend="cpu")


# The one in use is what the rest of the tests run.
@pytest.mark.parametrize("isa", [isa for isa in _available() if isa != torch.ops.vidattn._cpu_isa()])
def test_same_numbers(isa: str) -> None:
    """The tests of the cpu backend that depend on vectors pass with it too: a fifth of the cases of each."""
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SELECTION, "--share=5"]
    result = _run([*command, *(str(HERE / name) for name in FILES)], isa)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 150, result.stdout[-500:]


@pytest.mark.parametrize("isa", _available())
def test_the_environment_chooses(isa: str) -> None:
    result = _run(["-c", "import torch, vidattn; print(torch.ops.vidattn._cpu_isa())"], isa)
    assert result.stdout.strip() == isa


def test_dropout_masks_agree(tmp_path: Path) -> None:
    """Forward on one instruction set, backward on another: they drop the same weights."""
    code = (
        "import sys, torch, vidattn\n"
        "qkv = torch.zeros(1, 3, 5, 7, 3, 2, 8); qkv[..., 2, :, :] = torch.randn(qkv[..., 2, :, :].shape,"
        " generator=torch.Generator().manual_seed(1)).round()\n"
        "torch.manual_seed(2)\n"
        "call = dict(window_size=(2, 3, 3), shift_size=1, dropout_p=0.4, backend=sys.argv[2])\n"
        "torch.save(vidattn.window3d_attention(qkv, **call), sys.argv[1])\n"
    )
    results = []
    for isa in [*_available(), ""]:
        path = tmp_path / f"{isa or 'reference'}.pt"
        result = _run(["-c", code, str(path), "cpu" if isa else "reference"], isa)
        assert result.returncode == 0, result.stderr
        results.append(torch.load(path))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not BUILT, reason="VIDATTN_CPU_ISA chooses among what the extension holds")
def test_unknown_instruction_set() -> None:
    call = "import torch, vidattn; vidattn.window3d_attention(torch.zeros(1, 1, 1, 1, 3, 1, 8), window_size=1)"
    result = _run(["-c", call], "mmx")
    assert result.returncode != 0
    assert re.search(r"VIDATTN_CPU_ISA: expected one of baseline.*, got mmx", result.stderr)


TILES = """
#include <immintrin.h>
extern "C" void load(const void* layout) { _tile_loadconfig(layout); }
extern "C" void store(void* layout) { _tile_storeconfig(layout); }
"""


def test_tile_registers_are_left_as_they_were(tmp_path: Path) -> None:
    """Another library may have them set up for its own products. Without AMX there are none."""
    if not BUILT or torch.ops.vidattn._cpu_isa() != "avx512_amx":
        return
    source, library = tmp_path / "tiles.cpp", tmp_path / "tiles.so"
    source.write_text(TILES)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    subprocess.run([*compiler, "-O1", "-mamx-tile", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    tiles = ctypes.CDLL(str(library))
    wanted = bytes([1]).ljust(16, b"\0") + bytes([32, 0]).ljust(32, b"\0") + bytes([8]).ljust(16, b"\0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for layout in (wanted, bytes(64)):  # one register of 8 rows of 32 bytes; none
            found = ctypes.create_string_buffer(64)
            tiles.load(layout)
            vidattn.spatial_attention(torch.randn(1, 49, 3, 2, 32).bfloat16(), num_frames=1)
            tiles.store(found)
            assert found.raw == layout
    finally:
        tiles.load(bytes(64))
        torch.set_num_threads(threads)
