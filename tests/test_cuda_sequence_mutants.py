"""The CUDA kernels of sequences with one mistake each: every mistake must show, as a finding or in the numbers.

As in test_cuda_mutants.py, whoever changes a statement that a mistake spoils chooses another one here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import divided_cases
import mixing_cases
import pytest
import torch
from cuda_mistakes import SEQUENCES_ALONE, Edits, chosen_mistakes, compile_all, one_kernel, spoil, together
from sequence_cases import BF16, KB, judge
from tolerance import OUTPUT_FACTOR, assert_close

import tests.cuda_emulator as emulated

pytestmark = pytest.mark.slow  # kernels with a mistake are compiled anew, which takes seconds for each

# Most have more sequences than an emulated GPU has blocks in the backward pass.
CASES: dict[str, Any] = {
    "cls": divided_cases.Case("per_frame", 5, 40, "hwt", batch=2, heads=2, head_dim=24),
    "mean": divided_cases.Case("mean", 3, 40, batch=2, heads=2, head_dim=24),
    "heads": divided_cases.Case("factorized", 34, 35, heads=3, num_temporal_heads=1, batch=1, head_dim=16),
    "pieces": mixing_cases.Case(5, 35, heads=2, head_dim=24, channel_shifts=((0, 8, 1), (16, 40, -2))),
    "channels": mixing_cases.Case(5, 35, heads=2, head_dim=24, channel_shifts=((1, 6, 1), (9, 40, -2))),
    "far": mixing_cases.Case(3, 35, heads=2, head_dim=24, channel_shifts=((0, 8, 3), (16, 40, -(2**45)))),
    "long": divided_cases.Case("temporal", 70, 9, batch=1, heads=2, head_dim=24),
    "blocks": divided_cases.Case("temporal", 200, 1, batch=2, heads=1, head_dim=24),
}
LIMITS = {"blocks": 40 * KB}  # of shared memory, which has no room for two sequences then

# How it shows, in which case, and what is spoiled: the file, a pattern in it, what stands in place of the first match.
FORWARD: dict[str, tuple[str, str, str, str, str]] = {
    "no barrier behind the rows": (
        "race|uninitialised",
        "cls",
        "forward.cuh",
        r"(Share::find\(.*?\);)\s*__syncthreads\(\);",
        r"\1",
    ),
    "the cls token of the first clip": (
        "off by",
        "cls",
        "sequences.cuh",
        r"clip_ \* rows\.cls_stride\[0\]",
        "0 * rows.cls_stride[0]",
    ),
    "the cls token of the next head": (
        "off by",
        "cls",
        "sequences.cuh",
        r"head_ \* rows\.cls_head_stride",
        "(head_ + 1) * rows.cls_head_stride",
    ),
    "the cls token takes no place": (
        "off by|out of bounds|unwritten",
        "cls",
        "sequences.cuh",
        r"a_\.cls \* rows\.row_stride",
        "0 * rows.row_stride",
    ),
    "sequences a row apart": (
        "off by|race|unwritten",
        "mean",
        "sequences.cuh",
        r"sequence_ \* rows\.sequence_stride",
        "sequence_ * rows.row_stride",
    ),
    "a query too many": (
        "race|out of bounds",
        "cls",
        "sequences.cuh",
        r"n < keys\(\) \? n : kNoToken",
        "n <= keys() ? n : kNoToken",
    ),
    "one context of a cls token for all frames": (
        "race|unwritten",
        "cls",
        "sequences.cuh",
        r"divisor\(\) \+ sequence_;",
        "divisor();",
    ),
    "one log-sum-exp of a cls token for all frames": (
        "race|unwritten",
        "mean",
        "sequences.cuh",
        r"\+ sequence_ \* a_\.all_heads",
        "",
    ),
    "a range is a channel too long": (
        "off by",
        "channels",
        "sequences.cuh",
        r"channel < a_\.range\[r\]\.last",
        "channel <= a_.range[r].last",
    ),
    "a range begins a channel late": (
        "off by",
        "channels",
        "sequences.cuh",
        r"channel >= a_\.range\[r\]\.first",
        "channel > a_.range[r].first",
    ),
    "channels of the first piece": (
        "off by",
        "pieces",
        "sequences.cuh",
        r"source_of\(piece \* 8\)(;\s*valid)",
        r"source_of(0)\1",
    ),
    "a segment has a frame more": (
        "off by|out of bounds|race",
        "pieces",
        "sequences.cuh",
        r"there >= frames \? there - frames",
        "there > frames ? there - frames",
    ),
    "too little shared memory": (
        "out of bounds",
        "cls",
        "sequences.cu",
        r"size_t\(a\.plan\.shared_bytes\)",
        "size_t(a.plan.shared_bytes - 128)",
    ),
}
BACKWARD: dict[str, tuple[str, str, str, str, str]] = {
    "no barrier behind the rows, backward": (
        "race|uninitialised",
        "cls",
        "sequence_backward.cuh",
        r"(find_rows\(1\);\s*)__syncthreads\(\);(\s*begin\(0\))",
        r"\1\2",
    ),
    "no wait for the next queries": (
        "race.*not waited for",
        "long",
        "sequence_backward.cuh",
        r"(left > B::kQueries\) \{\s*)gpu::cp_async_wait<0>\(\);",
        r"\1",
    ),
    "the next keys in the place of these": (
        "race|off by",
        "long",
        "sequence_backward.cuh",
        r"round_ % 2 \* a_\.backward\.half",
        "0",
    ),
    "numbers of the next rows in the place of these": (
        "race|off by|unwritten|out of bounds",
        "cls",
        "sequence_backward.cuh",
        r"round % 3 \* int\(kSequenceBytes\)",
        "0",
    ),
    "the first tile of every sequence in one place": (
        "race|off by",
        "long",
        "sequence_backward.cuh",
        r"round_ \* \(\(keys\(\) \+ 31\) / 32\)",
        "0",
    ),
    "a block has one sequence": (
        "unwritten|uninitialised",
        "cls",
        "sequence_backward.cuh",
        r"Group::task_of\(.*\) < arguments\.tasks",
        "round == 0",
    ),
    "delta of a tile again": (
        "off by|uninitialised|race",
        "long",
        "sequence_backward.cuh",
        r"find_deltas\(more \? query \+ B::kQueries",
        "find_deltas(more ? query",
    ),
    "keys give place to the next ones too early": (
        "race",
        "long",
        "sequence_backward.cuh",
        r"arguments\.keys > B::kQueries \? B::kQueries : 0",
        "0",
    ),
    "records of two sequences in one place": (
        "race|off by",
        "long",
        "sequence_backward.cuh",
        r"round_ % 2 \* a_\.slots \* int\(sizeof",
        "0 * int(sizeof",
    ),
    "no barrier behind a sequence": (
        "race|uninitialised",
        "long",
        "sequence_backward.cuh",
        r"moderate = __syncthreads_and\(moderate\);",
        "",
    ),
    "a part of dQ is left out": (
        "unwritten|uninitialised",
        "cls",
        "sequence_backward.cuh",
        r"for \(int half = 0; half < 2; \+\+half\) \{(\s*if \(plan\.job_warps)",
        r"for (int half = 1; half < 2; ++half) {\1",
    ),
    "gradients stay in the frame that reads": (
        "off by|race|unwritten",
        "channels",
        "sequences.cuh",
        r"row \+ source\.frames \* (a_\.rows\[slot\]\.sequence_stride \+ 2)",
        r"row + 0 * \1",
    ),
    "what nobody reads has a gradient": (
        "off by",
        "pieces",
        "sequences.cuh",
        r"source\.is_inside \? words_of\(row\) : make_uint4\(0, 0, 0, 0\)",
        "words_of(row)",
    ),
    "what nobody reads is not written": (
        "unwritten",
        "channels",
        "sequences.cuh",
        r"(\*reinterpret_cast<uint16_t\*>\(to\) = source\.is_inside)",
        r"if (source.is_inside) \1",
    ),
    "two channels have one gradient": (
        "off by",
        "channels",
        "sequences.cuh",
        r"pairs\[i / 2\] >> i % 2 \* 16",
        "pairs[i / 2]",
    ),
    "one gradient of a cls token for q, k and v": (
        "race|uninitialised",
        "cls",
        "sequences.cuh",
        r"frame \* 3 \+ slot - kDq",
        "frame * 3",
    ),
    "dQ of the last block of keys": (
        "off by",
        "blocks",
        "backward.cuh",
        r"if \(block > 0\) x \+= at\.x, y \+= at\.y;",
        "",
    ),
    "a place for the dQ of one sequence": (
        "out of bounds",
        "blocks",
        "sequences_backward.cu",
        r"tasks \* round_up\(keys, 32\)",
        "round_up(keys, 32)",
    ),
}
# Of files that take no time to compile.
OTHERS: dict[str, tuple[str, str, str, str, str]] = {
    "the last frame has no share in a cls token": (
        "off by",
        "cls",
        "divided.cu",
        r"frame < a\.frames; \+\+frame",
        "frame + 1 < a.frames; ++frame",
    ),
    "shares of the next frames for the next clip": (
        "off by",
        "cls",
        "divided.cu",
        r"clip \* a\.frames \* a\.num_parts",
        "clip * a.num_parts",
    ),
    "the mean is a sum": ("off by", "mean", "divided.cu", r"1\.0f / float\(call\.frames\)", "1.0f"),
    "the gradient of the first frame for all": (
        "off by",
        "cls",
        "divided.cu",
        r"frame % a\.frames \* a\.gradient_stride\[1\]",
        "0 * a.gradient_stride[1]",
    ),
    "a context and its gradient in each other's place": (
        "off by",
        "cls",
        "divided.cu",
        r"\(slot == kOut \? row : 0\)",
        "(slot == kOut ? 0 : row)",
    ),
    "log-sum-exps of a cls token have no room": (
        "race|unwritten",
        "cls",
        "divided.cu",
        r"\(patches \+ call\.cls \* call\.frames\) \* call\.heads",
        "patches * call.heads",
    ),
    "the first heads over both axes": (
        "unwritten|uninitialised",
        "heads",
        "divided.cu",
        r"a\.first_head = int\(call\.first_head\)",
        "a.first_head = 0",
    ),
    "an offset of 64 bits": ("off by", "far", "mixing.cu", r"int\(clamp\(shift\.offset\)\)", "int(shift.offset)"),
    "segments a frame apart": (
        "race|unwritten|off by",
        "pieces",
        "mixing.cu",
        r"call\.segment \* t\.stride\[0\], t\.stride\[0\]",
        "t.stride[0], t.stride[0]",
    ),
}
MISTAKES = FORWARD | BACKWARD | OTHERS


def no_backward(text: str) -> str:
    """Leave out the backward pass."""
    return """#include "sequences_host.h"
namespace vidattn::cuda {
int64_t sequences_backward_floats(int64_t, int64_t, int64_t) { return 0; }
const char* launch_sequences_backward(SequenceArguments, int64_t, Element, float*, void*) { return "left out"; }
}  // namespace vidattn::cuda
"""


FORWARD_KERNEL: Edits = {"sequences.cu": one_kernel("sequence_forward<__nv_bfloat16, 32>")}
NO_BACKWARD: Edits = {"sequences_backward.cu": no_backward, "sequences_backward_walk.cu": lambda text: ""}
# For what has no room for two sequences, and for all else.
BLOCKS_BACKWARD: Edits = {
    "sequences_backward.cu": one_kernel("sequence_backward<__nv_bfloat16, 64>"),
    "sequences_backward_walk.cu": lambda text: "",
}
WALKING_BACKWARD: Edits = {
    "sequences_backward.cu": one_kernel("walking_sequence_kernel(element, plan)"),
    "sequences_backward_walk.cu": one_kernel("walking_sequence_backward<__nv_bfloat16, 32>"),
}


def edits(mistake: str | None, case: str) -> Edits:
    """Give what is done to the files."""
    backward = BLOCKS_BACKWARD if case in LIMITS else WALKING_BACKWARD
    kernels = FORWARD_KERNEL | (NO_BACKWARD if mistake in FORWARD else backward)
    if mistake is None:
        return kernels
    file, pattern, spoiled = MISTAKES[mistake][2:]
    edit = {file: spoil(mistake, file, pattern, spoiled)}
    if mistake in OTHERS:
        return edit
    if (
        file.startswith("sequence") and mistake in BACKWARD and file != "sequences.cuh"
    ):  # which no forward pass includes
        kernels = backward
    if file in ("forward.cuh", "backward.cuh"):
        kernels = kernels | SEQUENCES_ALONE
    return together(edit, kernels)


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    emulated.install()
    wanted = [(None, "cls"), (None, "blocks"), *((name, MISTAKES[name][1]) for name in chosen_mistakes(request))]
    compile_all(edits(*each) for each in wanted)
    yield
    emulated.uninstall()


def check(mistake: str | None, name: str) -> None:
    """Run a case, which all that a mistake spoils has a share in, and compare it with the reference."""
    case, controls = CASES[name], {"shared_limit": LIMITS[name]} if name in LIMITS else {}
    with emulated.edited(edits(mistake, name)), emulated.controls(**controls):
        if mistake not in FORWARD:
            judge(case)
            return
        qkv, options = case.inputs(BF16)["qkv"], case.options()
        found = case.function()(qkv, **options, backend="cuda")
    plain = case.function()(qkv, **options, backend="reference")
    exact = case.function()(qkv.double(), **options, backend="reference")
    assert_close("context", found, plain, exact, BF16, OUTPUT_FACTOR)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_without_a_mistake_pass(case: str) -> None:
    check(None, case)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    shows, case = MISTAKES[mistake][:2]
    with pytest.raises(AssertionError, match=shows):
        check(mistake, case)


def test_who_shares_the_queries_leaves_the_bits() -> None:
    case, kernel = divided_cases.Case("temporal", 400, 1, batch=1, heads=2, head_dim=24), FORWARD_KERNEL["sequences.cu"]
    pretend = spoil("many blocks", "sequences.cu", r"a\.head_dim, blocks, limit", "a.head_dim, 1000, limit")
    qkv, found, blocks = torch.randn(1, 400, 3, 2, 24).to(BF16), [], []
    for changes in (FORWARD_KERNEL, {"sequences.cu": lambda text: kernel(pretend(text))}):  # then none is split
        before = emulated.blocks_run()
        with emulated.edited(changes):
            found.append(case.function()(qkv, **case.options(), backend="cuda"))
        blocks.append(emulated.blocks_run() - before)
    assert blocks == [6, 2]
    assert torch.equal(*found)
