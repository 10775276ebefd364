"""The CUDA kernels with one mistake each, on the emulated GPU: every mistake must show, as a finding or in the numbers.

Whoever changes a statement that a mistake spoils chooses another one here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from tolerance import OUTPUT_FACTOR, assert_close

import tests.cuda_emulator as emulated
import vidattn
from tests.cuda_emulator import build

Edits = dict[str, Callable[[str], str]]

# How it shows, and what is spoiled: the file, a pattern in it, and what stands in place of the first match.
MISTAKES = {
    "no barrier behind the table of tokens": (
        "race|uninitialised",
        "forward.cuh",
        r"find_rows\(\);\s*__syncthreads\(\);",
        "find_rows();",
    ),
    "no barrier behind the copies": (
        "race|uninitialised",
        "forward.cuh",
        r"(load_bias\(\)\);\s*gpu::cp_async_wait<0>\(\);)\s*__syncthreads\(\);",
        r"\1",
    ),
    "no wait for the copies": (
        "race.*not waited for",
        "forward.cuh",
        r"(load_bias\(\)\);)\s*gpu::cp_async_wait<0>\(\);",
        r"\1",
    ),
    "waits for one group too few": (
        "race.*not waited for",
        "forward.cuh",
        r"(load_bias\(\)\);\s*)gpu::cp_async_wait<0>",
        r"\1gpu::cp_async_wait<1>",
    ),
    "a barrier in a branch": (
        "divergence|deadlock",
        "forward.cuh",
        r"(bool done = first_row >= .*?;)",
        r"\1 if (lane < 16) __syncthreads();",
    ),
    "one piece too many is copied": ("race", "forward.cuh", r"(\* Layout::kPieces); i", r"\1 + 1; i"),
    "one piece too few is copied": ("uninitialised", "forward.cuh", r"(\* Layout::kPieces); i", r"\1 - 1; i"),
    "one key too many has weight": ("off by", "forward.cuh", r"j >= count", "j > count"),
    "the wrong rows of K": ("off by", "forward.cuh", r"lane % 8, piece", "lane % 4, piece"),
    "the wrong rows of V": ("off by", "forward.cuh", r"lane % 16, piece \+ lane / 16", "lane / 2, piece + lane % 2"),
    "weights in the wrong order": ("off by", "forward.cuh", r"\[i % 2 \* 2\], p\[t\]", "[i % 2 * 2 + 1], p[t]"),
    "the quads are not added up": ("off by", "forward.cuh", r"__shfl_xor_sync\(~0u, sum\[half\], 2\)", "0.0f"),
    "a shuffle of half a warp": (
        "mask",
        "forward.cuh",
        r"__shfl_xor_sync\(~0u, x, 2\)",
        "__shfl_xor_sync(0xffff, x, 2)",
    ),
    "two rows of a lane are one": (
        "unwritten|race",
        "forward.cuh",
        r"output_row\(row \+ 8 \* half\)",
        "output_row(row)",
    ),
    "elements behind the head are written": (
        "race|out of bounds",
        "forward.cuh",
        r"if \(at < group.head_dim\(\)\) \*reinterpret",
        "*reinterpret",
    ),
    "too little shared memory": ("out of bounds", "window3d.cu", r"(size_t\(a.plan.shared_bytes\))", r"\1 - 16"),
    "one block too few": ("unwritten", "window3d.cu", r"(call.heads \* call.groups)", r"\1 - 1"),
    "regions of the wrong border": ("off by", "window3d.cuh", r"== count - 1\) border_", "== 0) border_"),
    "the row of the next token": ("out of bounds", "window3d.cuh", r"source\[2\] \*", "(source[2] + 1) *"),
}


def one_kernel(text: str) -> str:
    """Leave the one instance that the case runs, which compiles in a fraction of the time."""
    only = r"\1\n  return window_forward<__nv_bfloat16, 32>;\n}"
    return re.sub(r"(?s)(auto kernel_for\(.*?\{).*?\n\}", only, text)


def edits(mistake: str | None) -> Edits:
    """Give what is done to the files."""
    if mistake is None:
        return {"window3d.cu": one_kernel}
    _, file, pattern, spoiled = MISTAKES[mistake]

    def spoil(text: str) -> str:
        changed, found = re.subn(pattern, spoiled, text, count=1)
        if not found:
            raise ValueError(f"{mistake}: {file} no longer has {pattern!r}")
        return changed

    if file == "window3d.cu":
        return {file: lambda text: one_kernel(spoil(text))}
    return {"window3d.cu": one_kernel, file: spoil}


# The others take as long again.
DEFAULT = (
    "no barrier behind the table of tokens",
    "no wait for the copies",
    "one piece too few is copied",
    "one key too many has weight",
    "the wrong rows of V",
    "weights in the wrong order",
    "a shuffle of half a warp",
    "two rows of a lane are one",
    "too little shared memory",
    "the row of the next token",
)
CHOICES = [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in MISTAKES]


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    emulated.install()
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    chosen = [item.callspec.params["mistake"] for item in tests]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(build.backend_library, True, edits(mistake)) for mistake in (None, *chosen)]
    wait(futures)  # what went wrong, the test of the mistake will say
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


@pytest.mark.parametrize("mistake", CHOICES)
def test_a_mistake_shows(mistake: str) -> None:
    with pytest.raises(AssertionError, match=MISTAKES[mistake][0]):
        attend(mistake)


def test_rows_that_are_not_rotated_share_banks() -> None:
    def aligned(text: str) -> str:
        changed, found = re.subn(r"\(\(piece \^ \(.*?\)\) << 4\)", "(piece << 4)", text)
        assert found == 1, "rows.cuh no longer rotates the pieces here"
        return changed

    def conflicts() -> int:
        return emulated.counts()["ldmatrix_conflicts"]

    before = conflicts()
    attend(None)
    assert conflicts() == before
    with emulated.edited({"window3d.cu": one_kernel, "rows.cuh": aligned}):
        vidattn.window3d_attention(torch.randn(1, 4, 4, 4, 3, 1, 32).bfloat16(), window_size=(4, 4, 4), backend="cuda")
    assert conflicts() > before
