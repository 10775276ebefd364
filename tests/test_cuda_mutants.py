"""The CUDA kernels with one mistake each, on the emulated GPU: every mistake must show, as a finding or in the numbers.

Whoever changes a statement that a mistake spoils chooses another one here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from cuda_mistakes import WINDOWS_ALONE, Edits, chosen_mistakes, compile_all, one_kernel, spoil, together, without
from tolerance import OUTPUT_FACTOR, assert_close

import tests.cuda_emulator as emulated
import vidattn

pytestmark = pytest.mark.slow  # kernels with a mistake are compiled anew, which takes seconds for each

KB = 1024


@dataclass(frozen=True)
class Case:
    """A call that a kernel runs: which one, the shapes, sizes of (q and k, bias), and what the emulator is told."""

    kernel: str
    grid: tuple[int, int, int]
    window_size: tuple[int, int, int]
    shift_size: tuple[int, int, int]
    head_dim: int = 32
    heads: int = 1
    sizes: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    controls: dict[str, int] = field(default_factory=dict)


CASES = {
    "width fastest": Case("window_forward", (4, 8, 9), (4, 5, 5), (0, 2, 2), head_dim=24, heads=2),
    "depth fastest": Case(
        "depth_fastest_window_forward", (16, 10, 7), (8, 5, 7), (4, 1, 0), sizes=((1.0, 1.0), (12.0, 1.0), (0.3, 600.0))
    ),  # the proof that hidden keys have no weight works for the first sizes, and fails for the others
    "streamed": Case("streamed_window_forward", (4, 7, 7), (4, 7, 7), (0, 0, 0), controls={"shared_limit": 25 * KB}),
}

# How it shows, and what is spoiled: the file, a pattern in it, what stands in place of the first match, and the case if
# it is not the first.
MISTAKES: dict[str, tuple[str, ...]] = {
    "no barrier behind the table of tokens": (
        "race|uninitialised",
        "forward.cuh",
        r"(Share::find\(.*?\);)\s*__syncthreads\(\);",
        r"\1",
    ),
    "no barrier behind the copies": (
        "race|uninitialised",
        "forward.cuh",
        r"(load_bias\(.*?\)\);\s*gpu::cp_async_wait<0>\(\);)\s*__syncthreads\(\);",
        r"\1",
    ),
    "no wait for the copies": (
        "race.*not waited for",
        "forward.cuh",
        r"(load_bias\(.*?\)\);)\s*gpu::cp_async_wait<0>\(\);",
        r"\1",
    ),
    "waits for one group too few": (
        "race.*not waited for",
        "forward.cuh",
        r"(load_bias\(.*?\)\);\s*)gpu::cp_async_wait<0>",
        r"\1gpu::cp_async_wait<1>",
    ),
    "a barrier in a branch": (
        "divergence|deadlock",
        "forward.cuh",
        r"(const bool done = folds && .*?;)",
        r"\1 if (threadIdx.x % 32 < 16) __syncthreads();",
    ),
    "one row too many is copied": ("race|out of bounds", "rows.cuh", r"row < rows; row", "row < rows + 1; row"),
    "one row too few is copied": ("uninitialised", "rows.cuh", r"row < rows; row", "row < rows - 1; row"),
    "one key too many has weight": ("off by", "forward.cuh", r"j >= count", "j > count"),
    "the wrong rows of K": ("off by", "forward.cuh", r"lane % 8, 4", "lane % 4, 4"),
    "the wrong rows of V": ("off by", "forward.cuh", r"lane % 16, 2 \* i \+ lane / 16", "lane / 2, 2 * i + lane % 2"),
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
        r"(row \+ 16 \* t) \+ 8 \* half, token",
        r"\1, token",
    ),
    "elements behind the head are written": (
        "race|out of bounds",
        "forward.cuh",
        r"if \(i \* 8 < group.head_dim\(\)\) \*reinterpret",
        "*reinterpret",
    ),
    "too little shared memory": ("out of bounds", "window3d.cu", r"(size_t\(a.plan.shared_bytes\))", r"\1 - 16"),
    "one block too few": ("unwritten", "window3d.cu", r"(shape.blocks \* a.plan.splits)", r"\1 - 1"),
    "regions of the wrong border": ("off by", "window_tokens.cuh", r"== int\(.*?\) - 1\) border_", "== 0) border_"),
    # What lies behind the last row is a matter of luck: nothing, or a tensor that is not written yet.
    "the row of the next token": (
        "out of bounds|uninitialised",
        "window_tokens.cuh",
        r"real \? token :",
        "real ? token + 1 :",
    ),
    "a pair of tiles too few": ("unwritten", "forward.cuh", r"(quotient\(pairs \* \(share \+ 1\)\))", r"\1 - 1"),
    "a chunk too few": ("off by", "forward.cuh", r"kChunk \* end;", "kChunk * (end - 1);", "depth fastest"),
    "the last keys of a chunk with the first values": (
        "off by",
        "forward.cuh",
        r"v\[j\], out",
        "v[0], out",
        "depth fastest",
    ),
    "the next step of the bias": ("off by|uninit", "window3d.cuh", r"odd\[step - 1\]", "odd[step]", "depth fastest"),
    "keys are hidden without a proof": ("off by", "forward.cuh", r"hides &= .*?;", "", "depth fastest"),
    "the bias has no part in the proof": (
        "off by",
        "forward.cuh",
        r"hiding_room\(\) - most.y",
        "hiding_room()",
        "depth fastest",
    ),
    "the chunks of the other region": (
        "off by",
        "window3d.cuh",
        r"(common_region\(lane\)) == ",
        r"\1 != ",
        "depth fastest",
    ),
    "all depths are seen": ("off by", "window3d.cuh", r"differs\) seen.step = 0;", "differs) {}", "depth fastest"),
    "the other depths are seen": ("off by", "window3d.cuh", r"(4 \* 2 \+ shift) >= 8", r"\1 < 8", "depth fastest"),
    "no barrier between blocks of keys": (
        "race|uninitialised",
        "forward.cuh",
        r"__syncthreads\(\);  // this block",
        "// this block",
        "streamed",
    ),
    "no wait for a block of keys": (
        "race.*not waited for",
        "forward.cuh",
        r"gpu::cp_async_wait<0>\(\);(\s*__syncthreads\(\);  // this block)",
        r"\1",
        "streamed",
    ),
    "a block of keys is copied to where the last one is": (
        "race|uninitialised",
        "forward.cuh",
        r"copy\(key \+ step, stage \^ 1\)",
        "copy(key + step, stage)",
        "streamed",
    ),
}


def no_backward(text: str) -> str:
    """Leave out the backward pass, which would be compiled anew with every change of what both passes share."""
    return """#include "window3d_cuda.h"
namespace vidattn::cuda {
int64_t window3d_backward_floats(const Window3dArgs&, bool, bool) { return 0; }
const char* window3d_backward(const Window3dArgs&, const SharedGradients&, float*, void*) { return "left out"; }
}  // namespace vidattn::cuda
"""


FORWARD_ALONE: Edits = {
    **WINDOWS_ALONE,
    **without("window3d_backward"),
    "window3d_backward.cu": no_backward,
}


def case_of(mistake: str | None) -> str:
    entry = MISTAKES[mistake] if mistake else ()
    return entry[4] if len(entry) > 4 else "width fastest"


def kernel_of(case: str) -> Callable[[str], str]:
    return one_kernel(f"{CASES[case].kernel}<__nv_bfloat16, 32>")


def edits(mistake: str | None, case: str) -> Edits:
    """Give what is done to the files."""
    kernel = FORWARD_ALONE | {"window3d.cu": kernel_of(case)}
    if mistake is None:
        return kernel
    _, file, pattern, spoiled = MISTAKES[mistake][:4]
    return together({file: spoil(mistake, file, pattern, spoiled)}, kernel)


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    emulated.install()
    mistakes = [edits(mistake, case_of(mistake)) for mistake in chosen_mistakes(request)]
    compile_all([*(edits(None, case) for case in CASES), *mistakes])
    yield
    emulated.uninstall()


def attend(mistake: str | None, name: str) -> None:
    """Run a case, which every part of its kernel has a share in, and compare it with the reference."""
    case = CASES[name]
    torch.manual_seed(0)
    qkv = torch.randn(1, *case.grid, 3, case.heads, case.head_dim)
    table = torch.randn(math.prod(2 * extent - 1 for extent in case.window_size), case.heads).bfloat16()
    options = {"window_size": case.window_size, "shift_size": case.shift_size}
    for size, bias in case.sizes:
        given = [(qkv * torch.tensor([size, size, 1.0])[:, None, None]).bfloat16(), table * bias]
        with emulated.edited(edits(mistake, name)), emulated.controls(**case.controls):
            actual = vidattn.window3d_attention(*given, **options, backend="cuda")
        plain = vidattn.window3d_attention(*given, **options, backend="reference")
        exact = vidattn.window3d_attention(*(x.double() for x in given), **options, backend="reference")
        assert_close("context", actual, plain, exact, torch.bfloat16, OUTPUT_FACTOR)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_without_a_mistake_passes(case: str) -> None:
    attend(None, case)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    with pytest.raises(AssertionError, match=MISTAKES[mistake][0]):
        attend(mistake, case_of(mistake))


def test_rows_that_are_not_rotated_share_banks() -> None:
    def aligned(text: str) -> str:
        changed, found = re.subn(r"\(\(piece \^ \(.*?\)\) << 4\)", "(piece << 4)", text)
        assert found == 1, "rows.cuh no longer rotates the pieces here"
        return changed

    def conflicts() -> int:
        return emulated.counts()["ldmatrix_conflicts"]

    before = conflicts()
    attend(None, "width fastest")
    assert conflicts() == before
    with emulated.edited(FORWARD_ALONE | {"window3d.cu": kernel_of("width fastest"), "rows.cuh": aligned}):
        vidattn.window3d_attention(torch.randn(1, 4, 4, 4, 3, 1, 32).bfloat16(), window_size=(4, 4, 4), backend="cuda")
    assert conflicts() > before


def test_who_shares_the_queries_leaves_the_bits() -> None:
    kernel = kernel_of("depth fastest")
    qkv = torch.randn(1, 16, 10, 7, 3, 1, 32).bfloat16()
    found, blocks = [], []
    for many in (False, True):  # blocks, as it looks: then none is split
        before = emulated.blocks_run()
        pretend = {"plan.h": lambda text: text.replace("kManyBlocks = 264", "kManyBlocks = 1")}
        with emulated.edited({**FORWARD_ALONE, "window3d.cu": kernel, **(pretend if many else {})}):
            found.append(vidattn.window3d_attention(qkv, window_size=(8, 5, 7), shift_size=(4, 1, 0), backend="cuda"))
        blocks.append(emulated.blocks_run() - before)
    assert blocks == [12, 4]
    assert torch.equal(*found)
