"""The emulated GPU itself: it finds mistakes of every kind, nothing where there is none, and computes as PTX says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import OUTPUT_FACTOR, assert_close
from torch import Tensor

import tests.cuda_emulator as emulated
import vidattn
from tests.cuda_emulator import build, conformance

KERNELS = Path(emulated.__file__).parent / "kernels"
SEEDS = range(8)  # all combinations of the three bits that choose an order


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install()
    yield
    emulated.uninstall()


# ---- Planted mistakes ----

BUGS = re.findall(r"^  (k\w+),", (KERNELS / "planted_bugs.cu").read_text(), re.MULTILINE)
KIND = {
    "kSharedReadOutside": "out of bounds",
    "kGlobalWriteOutside": "out of bounds",
    "kGlobalReadOutside": "out of bounds",
    "kGlobalReadMisaligned": "misaligned",
    "kSharedReadMisaligned": "misaligned",
    "kSharedReadUninitialised": "uninitialised",
    "kOutputReadUninitialised": "uninitialised",
    "kInputWritten": "write to an input",
    "kOutputUnwritten": r"unwritten: 2 elements of output 0, the first one at \(9,\)",
    "kTwoWrites": "race.*two writes",
    "kTwoBlocksWrite": "race.*two writes",
    "kBarrierMissing": "race|uninitialised",
    "kSyncwarpMissing": "race|uninitialised",
    "kBarrierMissingBeforeReuse": "race.*may still read",
    "kBarrierInBranch": "divergence",
    "kBarriersDiffer": "divergence",
    "kMmaWithoutLane": "divergence|deadlock",
    "kLanesInDifferentOperations": "divergence.*different operations",
    "kOutsideOwnMask": "mask",
    "kShuffleFromOutsideMask": "shuffle.*takes no part",
    "kLaneHasLeft": "divergence",
    "kCopyMisaligned": "misaligned",
    "kCopiesOverlap": "race.*two writes",
    "kCopyReadEarly": "race.*not waited for",
    "kCopyWaitsForTooFew": "race.*not waited for",
    "kCopyOfAnotherLane": "race|uninitialised",
    "kCopyNotWaitedFor": "cp.async: the thread exits",
    "kLdmatrixMisaligned": "misaligned",
    "kLdmatrixOutside": "out of bounds",
    "kLocalIndex": "array index",
    "kShiftTooFar": "shift out of range",
    "kAtomicsAndWrite": "race",
}


def planted(bug: str) -> Tensor:
    out = torch.full((128,), torch.nan)
    emulated.run(KERNELS / "planted_bugs.cu", "planted_bug", [torch.arange(64.0)], [out], BUGS.index(bug))
    return out


@pytest.mark.parametrize("bug", BUGS[1:-1])
def test_a_planted_mistake_is_found(bug: str) -> None:
    with pytest.raises(emulated.MistakesFound, match=KIND[bug]) as raised:
        planted(bug)
    finding = raised.value.findings[0]
    if finding.kind != "unwritten":
        assert "planted_bugs.cu:" in str(raised.value)
        assert 0 <= finding.thread < 64 and finding.lane == finding.thread % 32


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_found_in_a_correct_kernel(seed: int) -> None:
    with emulated.controls(seed=seed):
        once = planted("kNone")
        assert bool(once.isfinite().all()) and torch.equal(once[:64], once[64:])


def test_a_finding_says_where_in_the_source_and_in_memory() -> None:
    with pytest.raises(emulated.MistakesFound) as raised:
        planted("kSharedReadOutside")
    (finding,) = raised.value.findings
    line = (
        (KERNELS / "planted_bugs.cu")
        .read_text()
        .split("\n")
        .index("  if constexpr (kBug == kSharedReadOutside) value += s[t + 65 + kThreads];")
    )
    assert f"planted_bugs.cu:{line + 1}" in str(raised.value)
    assert "4-byte read of shared byte 516, the block has 512" in finding.text
    assert (finding.block, finding.thread) == ((0, 0, 0), 0) and finding.address % 4 == 0


def test_what_a_kernel_left_in_memory_is_seen_without_a_copy() -> None:
    out = planted("kNone")
    shared = emulated.shared_memory(np.float32)
    assert shared.size == 128 and shared[0] == 64  # what the atomics added up
    emulated.view(out)[0] = 3.0
    assert out[0] == 3.0
    assert emulated.view(out.bfloat16()).dtype == np.uint16


def test_launches_that_a_gpu_refuses_are_refused() -> None:
    with emulated.controls(shared_limit=256), pytest.raises(RuntimeError, match="more shared memory"):
        planted("kNone")


# ---- Primitives ----


def test_primitives_give_what_is_committed() -> None:
    """The committed file is what a GPU is compared with, so it must be what the emulator gives."""
    results = conformance.run()
    for seed in SEEDS[1:]:
        with emulated.controls(seed=seed):
            assert np.array_equal(conformance.run(), results)
    assert (KERNELS / "conformance.txt").read_text() == conformance.as_text(results)


def test_the_results_of_a_gpu_may_differ_in_last_bits_alone() -> None:
    with emulated.controls(truncate=True, approximate=True):
        assert conformance.compare(conformance.run(), conformance.committed()) == []
    for case in range(conformance.CASES):
        wrong = conformance.committed()
        wrong[case, 7, 2] ^= 1 << 20
        (difference,) = conformance.compare(wrong, conformance.committed())
        assert difference.startswith(f"case {case}: 1 words differ") and "word 2 of lane 7" in difference
    for ulp, told in ((2, 0), (-2, 0), (3, 1), (-3, 1)):
        wrong = conformance.committed()
        wrong.view(np.int32)[conformance.POWERS, 7, 0] += ulp
        assert len(conformance.compare(wrong, conformance.committed())) == told, ulp


def halves(array: np.ndarray, bfloat16: bool) -> np.ndarray:
    """Read words (..., n) as elements (..., 2 n) of 16 bits."""
    bits = np.ascontiguousarray(array).astype("<u4").view("<u2")
    if bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(float)
    return bits.view(np.float16).astype(float)


@pytest.mark.parametrize(("case", "bfloat16"), [(7, True), (9, False), (11, True), (13, False)])
def test_products_are_those_of_the_fragments_of_ptx(case: int, bfloat16: bool) -> None:
    """The tables of the PTX manual, read as strides: element = sum of strides over thread % 4, thread / 4 and value."""
    results = conformance.run()
    got, raw = results[case].view(np.float32).astype(float), results[case + 1]
    a, b = halves(raw[:, :4], bfloat16), halves(raw[:, 4:6], bfloat16)
    given = conformance.words()[:512].reshape(32, 16)[:, 12:].astype(int)
    c = given % 16 - 8 if case < 11 else (given % 4096 - 2048) / 65536 * 2.0 ** (given // 4096 % 16)
    left, right, added, deep, shallow = (np.zeros(s) for s in ((16, 16), (8, 16), (16, 8), (16, 8), (16, 8)))
    for t in range(32):
        for v in range(8):
            i = t % 4 * 32 + t // 4 + v % 2 * 16 + v // 2 % 2 * 8 + v // 4 * 128
            left[i % 16, i // 16] = a[t, v]
        for v in range(4):
            i = t % 4 * 16 + t // 4 + v % 2 * 8 + v // 2 * 64
            right[i % 8, i // 8] = b[t, v]
            i = t % 4 * 32 + t // 4 + v % 2 * 16 + v // 2 * 8
            place = i % 16, i // 16
            added[place], deep[place], shallow[place] = c[t, v], got[t, v], got[t, v + 4]
    exact_to = 0 if case < 11 else 1e-6 * np.abs(deep).max()
    np.testing.assert_allclose(deep, added + left @ right.T, rtol=0, atol=exact_to)
    np.testing.assert_allclose(shallow, added + left[:, :8] @ right[:, :8].T, rtol=0, atol=exact_to)


def test_ldmatrix_spreads_rows_over_the_lanes() -> None:
    results, rows = conformance.run(), conformance.words()[:256].astype("<u4").view("<u2").reshape(64, 8)
    addresses = [(t * 5 % 32) * 2 + (t & 1) for t in range(32)]
    for m in range(4):
        matrix = rows[addresses[m * 8 : m * 8 + 8]].astype(int)
        for t in range(32):
            i, j = t // 4, t % 4 * 2
            assert results[0, t, 2 + m] == matrix[i, j] | matrix[i, j + 1] << 16
            assert results[1, t, 2 + m] == matrix[j, i] | matrix[j + 1, i] << 16
    assert np.array_equal(results[:2, :, :2], results[:2, :, 2:4])


def test_shuffles_votes_and_copies() -> None:
    results, given, t = conformance.run(), conformance.words(), np.arange(32)
    v = given[:32]
    across = np.where(t < 16, t, t ^ 20)  # what would be from behind the own sixteen is the lane's own
    sources = [np.full(32, 5), t * 7 % 32, t ^ 9, t // 8 * 8 + (t + 3) % 8, across]
    for word, source in enumerate(sources):
        assert np.array_equal(results[2, :, word], v[source]), word
    assert (results[3, :, 0] == sum(int(x & 1) << i for i, x in enumerate(v))).all()
    assert (results[3, :, 1] == 1).all() and (results[3, :, 2] == 0).all()
    assert (results[4, :, 6] == 0).all() and (results[4, :, 7] == 1).all()
    lowest = [(int(x) & -int(x)).bit_length() for x in v]
    assert np.array_equal(results[3, :, 3], v.astype(np.uint64) * given[t + 3] >> 32)
    assert np.array_equal(results[3, :, 4], lowest)
    copied = np.where(np.arange(128) // 4 % 3 != 0, given[256:384], 0)
    single = np.where(t % 5 != 0, given[512:544], 0)
    expected = copied[t * 4 + 1], copied[(t ^ 1) * 4], single[t ^ 1], copied[(t ^ 2) * 4 + 3]
    assert np.array_equal(results[5, :, :4].T, expected)
    expected = (
        given[t * 2],
        given[t * 2 + 1],
        given[(t ^ 5) * 2],
        given[(t ^ 5) * 2 + 1],
        given[t * 7],
        given[t * 3 + 1],
    )
    assert np.array_equal(results[15, :, :6].T, expected)


def test_conflicts_of_banks_are_counted() -> None:
    """Loads of 4 bytes at distances of 28 and 12 and of 8 side by side have none; rows of 32 bytes for ldmatrix do."""
    before = emulated.counts()
    conformance.run()
    after = emulated.counts()
    assert after["load_conflicts"] == before["load_conflicts"]
    # Of the 32 rows, 8 at a time, those an even number of rows apart in the same half: 4 share each group of banks.
    rows = [(t * 5 % 32) * 32 + (t & 1) * 16 for t in range(32)]
    turns = [max(np.bincount([row % 128 // 16 for row in rows[m * 8 : m * 8 + 8]])) - 1 for m in range(4)]
    assert after["ldmatrix_conflicts"] - before["ldmatrix_conflicts"] == 2 * (sum(turns) + sum(turns[:2]))


def test_rounding_and_powers_of_two() -> None:
    results, given = conformance.run(), conformance.words()[:32]
    f = ((given % 4096).astype(np.float32) - 2048) / 64
    both = torch.from_numpy(np.stack([f, -f * np.float32(1.001)], -1))
    assert np.array_equal(results[4, :, 0].copy().view(np.uint16).reshape(32, 2), emulated.view(both.bfloat16()))
    with np.errstate(over="ignore"):
        large = np.stack([f * np.float32(1e5), np.full(32, 1e-8, np.float32)], -1).astype(np.float16)
    assert np.array_equal(results[4, :, 2].copy().view(np.uint16).reshape(32, 2), large.view(np.uint16))
    assert (results[4, :, 3] == 0x7F807FFF).all()  # the one NaN, and infinity
    powers = results[6].view(np.float32)
    wide = f.astype(float)
    with np.errstate(over="ignore", under="ignore"):
        exact = [np.exp2(wide), np.exp2(-4 * wide), np.exp2(-40 * wide), np.log2(wide**2 + 2)]
        rounded = np.stack(exact, -1).astype(np.float32)
    rounded[np.abs(rounded) < np.float32(2.0**-126)] = 0  # no denormals
    assert np.array_equal(powers[:, [0, 1, 2, 4]], rounded)  # rounded once: what a GPU is compared with
    assert (powers[:, 3] == 0).all() and (powers[:, 5] == -np.inf).all()


def test_the_tensor_cores_and_ex2_can_be_made_as_bad_as_allowed() -> None:
    best = conformance.run()
    with emulated.controls(truncate=True, approximate=True):
        worst = conformance.run()
    assert np.array_equal(worst[:6], best[:6]) and np.array_equal(worst[7:11], best[7:11])
    off = np.abs(worst[6].view(np.int32) - best[6].view(np.int32))
    assert 0 < off.max() <= 2
    products, truncated = best[11].view(np.float32), worst[11].view(np.float32)
    assert (np.abs(truncated) <= np.abs(products)).all() and (truncated != products).any()


def test_every_primitive_of_the_gpu_is_emulated_and_compared() -> None:
    def names(path: Path) -> set[str]:
        text = path.read_text()
        functions = re.findall(r"\b(?:inline|__forceinline__) [^;{(]*?(\w+)(?:<\w+>)?\(", text)
        return {*functions, *re.findall(r"^VIDATTN_LDMATRIX\((\w+)", text, re.MULTILINE)} - {"name", "flush"}

    gpu = names(build.CSRC / "cuda" / "primitives.cuh")
    assert {"mma_16x8x16", "ldmatrix_transposed", "cp_async_16", "exp2_approx", "shared_memory"} <= gpu
    assert gpu == names(build.INCLUDE / "primitives.cuh")
    compared = set(re.findall(r"gpu::(\w+)", (KERNELS / "conformance.cu").read_text()))
    assert gpu - {"shared_memory_limit", "multiprocessors"} == compared


# ---- The backend ----


def attend(dtype: torch.dtype = torch.float16, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Attend on the emulated GPU, by the reference, and by the reference in float64."""
    qkv, table = torch.randn(1, 4, 6, 5, 3, 2, 32).to(dtype), torch.randn(3 * 7 * 5, 2).to(dtype)
    options = {"window_size": (2, 4, 3), "shift_size": (1, 2, 1), **options}
    given = [(qkv, table, "cuda"), (qkv, table, "reference"), (qkv.double(), table.double(), "reference")]
    return tuple(vidattn.window3d_attention(x, t, **options, backend=b) for x, t, b in given)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_call_goes_from_the_public_function_to_the_kernel(dtype: torch.dtype, seed: int) -> None:
    blocks = emulated.blocks_run()
    with emulated.controls(seed=seed, truncate=bool(seed), approximate=bool(seed)):
        actual, plain, exact = attend(dtype)
    assert emulated.blocks_run() - blocks == 2 * 2 * 2 * 2  # windows along each axis, heads
    assert_close("context", actual, plain, exact, dtype, OUTPUT_FACTOR)


@pytest.mark.slow  # the emulated GPU is compiled anew
def test_unchecked_calls_give_the_same_bits() -> None:
    torch.manual_seed(3)
    checked, _, _ = attend()
    try:
        emulated.install(checked=False)
        torch.manual_seed(3)
        assert torch.equal(attend()[0], checked)
    finally:
        emulated.install()


def test_without_install_cpu_tensors_are_refused() -> None:
    emulated.uninstall()
    try:
        with pytest.raises(ValueError, match="backend 'cuda' cannot run this call"):
            attend()
    finally:
        emulated.install()


def test_auto_does_not_take_the_emulated_gpu() -> None:
    blocks = emulated.blocks_run()
    vidattn.window3d_attention(torch.randn(1, 2, 2, 2, 3, 1, 8).half(), window_size=(2, 2, 2))
    assert emulated.blocks_run() == blocks


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"runs float16 and bfloat16, got torch\.float32"):
        attend(torch.float32)
    with pytest.raises(ValueError, match="runs head dimensions up to 64, got 80"):
        vidattn.window3d_attention(torch.zeros(1, 2, 2, 2, 3, 1, 80).half(), window_size=(2, 2, 2), backend="cuda")


def test_a_pass_without_kernels_never_runs_those_of_another_device() -> None:
    with pytest.raises(NotImplementedError, match="_cpu_isa: expected a pass that has CUDA kernels"):
        emulated._launch("_cpu_isa", ())


# ---- What is the same on a GPU ----


def test_the_current_stream_is_found_in_a_torch_that_python_loaded(tmp_path: Path) -> None:
    """As Python loads it: for itself, so that the default search for symbols does not find it."""

    def library(name: str, text: str) -> Path:
        (tmp_path / f"{name}.cpp").write_text(text)
        command = [build.COMPILER, "-std=c++17", "-shared", "-fPIC", f"-I{build.CSRC}", str(tmp_path / f"{name}.cpp")]
        path = tmp_path / f"{name}.so"
        subprocess.run([*command, f"-Wl,-soname,{path.name}", "-ldl", "-o", str(path)], check=True)
        return path

    ask = """
        #include "cuda/stream.h"
        extern "C" int64_t ask(int device) {
          void* stream = nullptr;
          return vidattn::cuda::current_stream(device, &stream) ? reinterpret_cast<int64_t>(stream) : -1;
        }"""
    tell = """
        extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
          *stream = reinterpret_cast<void*>(device * 100L);
          return device < 0;
        }"""
    program = (
        "import ctypes, sys\n"
        "kept = [ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL) for path in sys.argv[2:]]\n"
        "print([ctypes.CDLL(sys.argv[1]).ask(device) for device in (3, -1)])"
    )
    command = [sys.executable, "-c", program, str(library("ask", ask))]  # where torch is not loaded
    for torches, streams in (((), "[-1, -1]"), ((str(library("libtorch_cuda", tell)),), "[300, -1]")):
        told = subprocess.run([*command, *torches], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == streams
