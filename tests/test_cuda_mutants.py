"""The CUDA kernels with one mistake each, on the emulated GPU: every mistake must show, as a finding or in the numbers.

Whoever changes a statement that a mistake spoils chooses another one here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tolerance import OUTPUT_FACTOR, assert_close

import tests.cuda_emulator as emulated
import vidattn
from tests.cuda_emulator import build

Edits = dict[str, Callable[[str], str]]

# How it shows, and what is spoiled: the file, the text, and what stands in its place; of several such texts the first.
MISTAKES = {
    "no barrier behind the table of tokens": (
        "race|uninitialised",
        "forward.cuh",
        "  group.find_rows();\n  __syncthreads();",
        "group.find_rows();",
    ),
    "no barrier behind the copies": (
        "race|uninitialised",
        "forward.cuh",
        "gpu::cp_async_wait<0>();\n  __syncthreads();",
        "gpu::cp_async_wait<0>();",
    ),
    "no wait for the copies": (
        "race.*not waited for",
        "forward.cuh",
        "gpu::cp_async_wait<0>();\n  __syncthreads();",
        "__syncthreads();",
    ),
    "waits for one group too few": ("race.*not waited for", "forward.cuh", "cp_async_wait<0>()", "cp_async_wait<1>()"),
    "a barrier in a branch": (
        "divergence|deadlock",
        "forward.cuh",
        "    bool done = first_row >= keys;",
        "    bool done = first_row >= keys;\n    if (lane < 16) __syncthreads();",
    ),
    "one piece too many is copied": (
        "race",
        "forward.cuh",
        "i < rows * Layout::kPieces;",
        "i <= rows * Layout::kPieces;",
    ),
    "one piece too few is copied": (
        "uninitialised",
        "forward.cuh",
        "i < rows * Layout::kPieces;",
        "i < rows * Layout::kPieces - 1;",
    ),
    "one key too many has weight": ("off by", "forward.cuh", "if (kTail && j >= count)", "if (kTail && j > count)"),
    "the wrong rows of K": (
        "off by",
        "forward.cuh",
        "first + n * 8 + lane % 8, part * 4 + lane / 8)",
        "first + n * 8 + lane % 4, part * 4 + lane / 8)",
    ),
    "the wrong rows of V": (
        "off by",
        "forward.cuh",
        "lane % 16, 2 * part + lane / 16)",
        "lane / 2, 2 * part + lane % 2)",
    ),
    "the fragment of the weights in the wrong order": (
        "off by",
        "forward.cuh",
        "[i % 2 * 2], p[t]",
        "[i % 2 * 2 + 1], p[t]",
    ),
    "the quads are not added up": ("off by", "forward.cuh", "sum[half] += __shfl_xor_sync(~0u, sum[half], 2);", ""),
    "a shuffle of half a warp": ("mask", "forward.cuh", "__shfl_xor_sync(~0u, x, 2)", "__shfl_xor_sync(0xffff, x, 2)"),
    "the second row of a lane is the first one": (
        "unwritten|race",
        "forward.cuh",
        "group.output_row(row + 8 * half)",
        "group.output_row(row)",
    ),
    "elements behind the head are written": (
        "race|out of bounds",
        "forward.cuh",
        "if (at < group.head_dim()) *reinterpret_cast",
        "*reinterpret_cast",
    ),
    "too little shared memory": (
        "out of bounds",
        "window3d.cu",
        "size_t(a.plan.shared_bytes)",
        "size_t(a.plan.shared_bytes) - 16",
    ),
    "one block too few": (
        "unwritten",
        "window3d.cu",
        "dim3(uint32_t(call.heads * call.groups))",
        "dim3(uint32_t(call.heads * call.groups - 1))",
    ),
    "regions of the wrong border": (
        "off by",
        "window3d.cuh",
        "a_.region_mask[axis] && at_[axis] == a_.count[axis] - 1",
        "a_.region_mask[axis] && at_[axis] == 0",
    ),
    "the row of the next token": (
        "out of bounds",
        "window3d.cuh",
        "source[2] * stride[3]",
        "(source[2] + 1) * stride[3]",
    ),
}


def one_kernel(text: str) -> str:
    """Leave the one instance that the case runs, which compiles in a fraction of the time."""
    only = r"\1\n  return window_forward<__nv_bfloat16, 32>;\n}"
    return re.sub(r"(?s)(auto kernel_for\(.*?\{).*?\n\}", only, text)


def edits(mistake: str | None) -> Edits:
    """Give what is done to the files."""
    if mistake is None:
        return {"window3d.cu": one_kernel}
    _, file, old, new = MISTAKES[mistake]

    def spoil(text: str) -> str:
        if old not in text:
            raise ValueError(f"{mistake}: {file} no longer has {old!r}")
        return text.replace(old, new, 1)

    if file == "window3d.cu":
        return {file: lambda text: one_kernel(spoil(text))}
    return {"window3d.cu": one_kernel, file: spoil}


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda mistake: build.backend_library(True, edits(mistake)), [None, *MISTAKES]))
    yield
    emulated.uninstall()


def attend(mistake: str | None) -> None:
    """Run a case that every part of the kernel has a share in, and compare it with the reference."""
    torch.manual_seed(0)
    qkv, table = torch.randn(1, 4, 8, 9, 3, 2, 24), torch.randn(7 * 9 * 9, 2)
    options = {"window_size": (4, 5, 5), "shift_size": (0, 2, 2)}
    given = [x.bfloat16() for x in (qkv, table)]
    with emulated.edited(edits(mistake)):
        actual = vidattn.window3d_attention(*given, **options, backend="cuda")
    plain = vidattn.window3d_attention(*given, **options, backend="reference")
    exact = vidattn.window3d_attention(*(x.double() for x in given), **options, backend="reference")
    assert_close("context", actual, plain, exact, torch.bfloat16, OUTPUT_FACTOR)


def test_the_kernel_without_a_mistake_passes() -> None:
    attend(None)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    with pytest.raises(AssertionError, match=MISTAKES[mistake][0]):
        attend(mistake)


def test_rows_that_are_not_rotated_share_banks() -> None:
    def aligned(text: str) -> str:
        changed, found = re.subn(r"\(\(piece \^ \(.*?\)\) << 4\)", "(piece << 4)", text)
        assert found == 1, "rows.cuh no longer rotates the pieces here"
        return changed

    before = emulated.counts()["bank_conflicts"]
    attend(None)
    assert emulated.counts()["bank_conflicts"] == before
    with emulated.edited({"window3d.cu": one_kernel, "rows.cuh": aligned}):
        vidattn.window3d_attention(torch.randn(1, 4, 4, 4, 3, 1, 32).bfloat16(), window_size=(4, 4, 4), backend="cuda")
    assert emulated.counts()["bank_conflicts"] > before
