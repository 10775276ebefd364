"""The CUDA kernels of the backward pass with one mistake each: every mistake must show, as a finding or in the numbers.

As in test_cuda_mutants.py, whoever changes a statement that a mistake spoils chooses another one here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from cuda_mistakes import (
    WINDOWS_ALONE,
    Edits,
    check_gradients,
    chosen_mistakes,
    compile_all,
    one_kernel,
    spoil,
    together,
)

import tests.cuda_emulator as emulated

pytestmark = pytest.mark.slow  # kernels with a mistake are compiled anew, which takes seconds for each

# How it shows, and what is spoiled: the file, a pattern in it, and what stands in place of the first match.
MISTAKES = {
    "no barrier behind the table of tokens": (
        "race|uninitialised",
        "backward.cuh",
        r"group.find_rows\(\);\s*__syncthreads\(\);",
        "group.find_rows();",
    ),
    "no barrier before dQ": (
        "race|uninitialised",
        "backward.cuh",
        r"__syncthreads\(\);(\s*sum_queries\(block)",
        r"\1",
    ),
    "no barrier behind dQ": (
        "race",
        "backward.cuh",
        r"if \(plan.score_tiles == 1\) __syncthreads\(\);",
        "",
    ),
    "no wait for the next queries": (
        "race.*not waited for",
        "backward.cuh",
        r"gpu::cp_async_wait<0>\(\);(\s*__syncthreads\(\);\s*sum_queries\(block)",
        r"\1",
    ),
    "the next queries overwrite these": (
        "race|off by|uninitialised",
        "backward_rows.cuh",
        r"const int stage = stage_of\(first\);",
        "const int stage = stage_of(first + kQueries);",
    ),
    "no barrier between windows": (
        "race",
        "backward.cuh",
        r"__syncthreads\(\);(\s*if \(threadIdx.x == 0\) \+\+now->group, now->first = false;)\s*__syncthreads\(\);",
        r"\1",
    ),
    "lanes of a warp do not wait for each other's dS": (
        "race|uninitialised",
        "row_sums.cuh",
        r"(void add\(int query\) const \{)\s*__syncwarp\(\);",
        r"\1",
    ),
    "nor between two queries": (
        "race",
        "row_sums.cuh",
        r"(\+= ds;\s*\})\s*__syncwarp\(\);",
        r"\1",
    ),
    "what fills up the tiles is a key": ("off by|race", "backward.cuh", r"count < kKeys\)", "count < 0)"),
    "delta is not taken off": ("off by", "backward_rows.cuh", r"record.minus_delta = -delta", "record.minus_delta = 0"),
    "P in the place of dS": (
        "off by",
        "backward.cuh",
        r"ds_packed\[t\]\[2 \* half \+ i\] = gpu::pack<T>\(ds\[half\]\[t\]\[2 \* i\], ds\[half\]\[t\]\[2 \* i \+ 1\]\)",
        "ds_packed[t][2 * half + i] = p_packed[t][2 * half + i]",
    ),
    "two rows of the second operand are one": (
        "off by",
        "backward.cuh",
        r"b\[half\]\[2 \* i \+ 1\]",
        "b[half][2 * i]",
    ),
    "dK goes where dV belongs": (
        "unwritten|race",
        "backward.cuh",
        r"gradient\(kDk, key \+ n\)",
        "gradient(kDv, key + n)",
    ),
    "dQ of the wrong queries": (
        "off by|unwritten",
        "backward.cuh",
        r"Scores::place\(lane / 16 \* 8 \+ lane % 8, 2 \* step \+ lane / 8 % 2\)",
        "Scores::place(lane / 16 * 8 + lane % 8, 2 * step + lane / 16 % 2)",
    ),
    "lanes have one key in common": (
        "race",
        "row_sums.cuh",
        r"group.bias_offset\(key \+ lane\)",
        "group.bias_offset(key)",
    ),
    "padding is a key like any other": (
        "off by",
        "backward.cuh",
        r"real\[t\]\[half\] = dk \|\| n >= count",
        "real[t][half] = n >= count",
    ),
    "the tables of the warps are not cleared": (
        "uninitialised|off by",
        "backward.cuh",
        r"table\(0\)\[i\] = 0\.0f",
        "(void)i",
    ),
    "the last share is left out": ("off by", "reduce.cuh", r"share < a.shares", "share < a.shares - 1"),
    "scale is forgotten": ("off by", "backward.cuh", r"sum\[j\]\[2 \* half\] \*= group\.scale\(\), ", ""),
    "short: dQ before all of dS": (
        "race|uninitialised",
        "short_window.cuh",
        r"__syncthreads\(\);  // from here on",
        "// from here on",
    ),
    "short: sums of P before all have them": (
        "race|uninitialised",
        "short_window.cuh",
        r"__syncthreads\(\);(\s*bool moderate = true;)",
        r"\1",
    ),
    "short: delta of one warp's keys": ("off by", "short_window.cuh", r"product \+= part\[2\]", "product = part[2]"),
    "short: what fills up the tiles is a key": (
        "off by",
        "short_window.cuh",
        r"n < group\.keys\(\) \? group\.key_bias",
        "n >= 0 ? group.key_bias",
    ),
    "short: pairs of the last window alone": (
        "off by",
        "short_window.cuh",
        r"(pairs\.sum\[2 \* step \+ half\]\[i\]) \+=",
        r"\1 =",
    ),
    "short: padding is no key": ("off by", "short_window.cuh", r"== kPadding", "== kNoToken"),
    "short: dK and dV in each other's place": (
        "off by",
        "short_window.cuh",
        r"kGradients\[3\] = \{kDq, kDk, kDv\}",
        "kGradients[3] = {kDq, kDv, kDk}",
    ),
    "too little shared memory": (
        "out of bounds",
        "window3d_backward.cu",
        r"size_t\(a.backward.shared_bytes\)",
        "size_t(a.backward.shared_bytes - 256)",
    ),
    "one block too few": (
        "unwritten|uninitialised",
        "window3d_backward.cu",
        r"call.heads \* a.shares\)",
        "call.heads * a.shares - 1)",
    ),
}


USUAL, SHORT, DEPTH = (f"window3d_backward{name}.cu" for name in ("", "_short", "_depth"))
KERNELS: dict[bool, Edits] = {  # by whether windows are short
    short: {
        **WINDOWS_ALONE,
        USUAL: one_kernel("nullptr" if short else "window_backward<__nv_bfloat16, 32>"),
        SHORT: one_kernel("short_window_backward<__nv_bfloat16, kWholeRowTokens>")
        if short
        else one_kernel("nullptr", "short_window_kernel"),
        DEPTH: one_kernel("nullptr", "depth_fastest_kernel"),
    }
    for short in (False, True)
}


def two_shares(text: str) -> str:
    """Make it several windows a share."""
    return re.sub(r"(?s)a.shares = backward_shares\(.*?\);", "a.shares = 2;", text)


def is_short(mistake: str) -> bool:
    return mistake.startswith("short")


def edits(mistake: str | None, short: bool) -> Edits:
    """Give what is done to the files."""
    kernels = together({USUAL: two_shares}, KERNELS[short])
    if mistake is None:
        return kernels
    _, file, pattern, spoiled = MISTAKES[mistake]
    return together({file: spoil(mistake, file, pattern, spoiled)}, kernels)


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    emulated.install()
    chosen = [edits(mistake, is_short(mistake)) for mistake in chosen_mistakes(request)]
    compile_all([edits(None, False), edits(None, True), *chosen])
    yield
    emulated.uninstall()


def differentiate_short(mistake: str | None) -> None:
    """The same of the kernel of short windows: 25 tokens, two shares of four windows."""
    torch.manual_seed(0)
    given = [torch.randn(1, 2, 7, 9, 3, 2, 24).bfloat16(), torch.randn(9 * 9, 2), torch.randn(3, 2, 24).bfloat16()]
    dout = torch.randn(1, 2, 7, 9, 2 * 24).bfloat16()
    check_gradients(edits(mistake, True), given, dout, window_size=(1, 5, 5), shift_size=(0, 2, 2))


def differentiate(mistake: str | None) -> None:
    """Run a case that every part of the kernel has a share in, and compare it with the reference.

    100 tokens, some of them padding, four windows a share; and so little shared memory that gradients of scores have
    room for one tile of queries.
    """
    torch.manual_seed(0)
    given = [torch.randn(1, 5, 7, 10, 3, 2, 24).bfloat16(), torch.randn(7 * 9 * 9, 2), torch.randn(3, 2, 24).bfloat16()]
    dout = torch.randn(1, 5, 7, 10, 2 * 24).bfloat16()
    options = {"window_size": (4, 5, 5), "shift_size": (0, 2, 2)}
    check_gradients(edits(mistake, False), given, dout, controls={"shared_limit": 52 * 1024}, **options)


def test_the_kernel_without_a_mistake_passes() -> None:
    differentiate(None)
    differentiate_short(None)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    with pytest.raises(AssertionError, match=MISTAKES[mistake][0]):
        differentiate_short(mistake) if is_short(mistake) else differentiate(mistake)
