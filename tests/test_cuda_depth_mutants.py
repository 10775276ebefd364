"""The backward kernel of depth-fastest windows with one mistake each, as in test_cuda_backward_mutants.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from cuda_mistakes import Edits, check_gradients, chosen_mistakes, compile_all, one_kernel, spoil

import tests.cuda_emulator as emulated
from tests.cuda_emulator import build

pytestmark = pytest.mark.slow  # kernels with a mistake are compiled anew, which takes seconds for each

FILES = ("depth_fastest.cuh", "depth_fastest_rows.cuh")
# How it shows, a pattern in one of these, and what stands in place of the first match.
MISTAKES = {
    "no barrier before dQ": (
        "race|uninitialised",
        r"__syncthreads\(\);(\s*if \(next >= group.*continue;)",
        r"\1",
    ),
    "no barrier behind dQ": ("race", r"(again\(\)\.write_queries\(.*\);)\s*__syncthreads\(\);", r"\1"),
    "no wait for the next queries": (
        "race.*not waited for",
        r"gpu::cp_async_wait<0>\(\);(\s*const int next)",
        r"\1",
    ),
    "the next row overwrites this one": ("race|off by", r"is_odd_row\(first\) \? 2 \* kRowBytes : 0", "0"),
    "sums of the wrong height": (
        "race|off by",
        r"difference = kPlaces - 1 - warp",
        "difference = kPlaces - 1 - (warp + 1) % kPlaces",
    ),
    "sums of the wrong width": ("off by", r"sum\[kPlaces - 1 - key\]", "sum[key]"),
    "pairs of bias in the wrong order": ("off by", r"kPlaces - 1 - width - before", "kPlaces - 1 + width - before"),
    "the same bias for two places of keys": ("off by", r"kPlaces - 1 - width - before", "kPlaces - 1 - width"),
    "regions by height alone": ("off by", r"height \|\| \(group\.region", "height && (group.region"),
    "the last keys stand along": ("off by", r"if \(place \+ 1 == kPlaces\) words\[n\] = .*", ""),
    "delta is not taken off": ("off by", r"minus = -this->sum_of_quad\(sum\)", "minus = 0.0f"),
    "dS in the wrong rows": (
        "off by|race|uninitialised",
        r"\(2 \* t \+ half\) \* 8 \* kScoreBytes",
        "(2 * t + 1 - half) * 8 * kScoreBytes",
    ),
    "delta of another row": (
        "off by|race|uninitialised",
        r"find_deltas<kExact>\(next\)",
        "find_deltas<kExact>(next - kRowTokens)",
    ),
    "dS of two rows in one place": ("off by|uninitialised", r"kExact \? 0 : kScoresDistance", "0"),
    "dQ of one row twice": ("off by", r"kScoresDistance - kPlaces \* 16", "-kPlaces * 16"),
    "the last keys for their values": ("off by", r"lane / 8 % 2 \* kValuesDistance", "0"),
    "dQ goes to the next window": (
        "off by|unwritten",
        r"written_tokens\(\)\[(first \+ place \* 8 \+ lane / 4)\]",
        r"this->token(\1)",
    ),
    "no barrier behind the next tables": ("race|off by", r"(next\.find_rows\(\);)\s*__syncthreads\(\);", r"\1"),
    "padding has no gradient": ("off by", r"padded \|= token < 0;", ""),
    "the last row of the table is left out": ("off by", r"key < min\(8, 8 - depth\)", "key < min(7, 8 - depth)"),
}


def two_shares(text: str) -> str:
    """Make it several windows a share."""
    return re.sub(r"(?s)a.shares = backward_shares\(.*?\);", "a.shares = 2;", text)


KERNEL: Edits = {
    "window3d_backward.cu": lambda text: one_kernel("nullptr")(two_shares(text)),
    "window3d_backward_depth.cu": one_kernel(
        "depth_fastest_window_backward<__nv_bfloat16, 32>", "depth_fastest_kernel"
    ),
}


def edits(mistake: str | None) -> Edits:
    """Give what is done to the files."""
    if mistake is None:
        return KERNEL
    _, pattern, spoiled = MISTAKES[mistake]
    file = next((name for name in FILES if re.search(pattern, (build.CSRC / "cuda" / name).read_text())), FILES[0])
    return KERNEL | {file: spoil(mistake, file, pattern, spoiled)}


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    emulated.install()
    compile_all([edits(None)])  # what the others share is compiled once
    compile_all(map(edits, chosen_mistakes(request)))
    yield
    emulated.uninstall()


def differentiate(mistake: str | None) -> None:
    """Run a case that every part of the kernel has a share in: eight windows of 392 tokens, some of them padding."""
    torch.manual_seed(0)
    given = [torch.randn(1, 13, 9, 9, 3, 1, 24), torch.randn(15 * 13 * 13, 1), torch.randn(3, 1, 24)]
    given = [given[0].bfloat16(), given[1], given[2].bfloat16()]
    dout = torch.randn(1, 13, 9, 9, 24).bfloat16()
    check_gradients(edits(mistake), given, dout, window_size=(8, 7, 7), shift_size=(3, 1, 3))


def test_the_kernel_without_a_mistake_passes() -> None:
    differentiate(None)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    with pytest.raises(AssertionError, match=MISTAKES[mistake][0]):
        differentiate(mistake)
