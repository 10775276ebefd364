"""What every primitive of csrc/cuda/primitives.cuh gives: the inputs, the committed results, and the comparison.

The committed file is what the emulator gives. ``kernels/conformance_gpu.cu`` prints the same from a GPU:

    nvcc -std=c++17 -arch=native -I csrc/cuda tests/cuda_emulator/kernels/conformance_gpu.cu -o build/conformance
    build/conformance > build/conformance.txt
    python -m tests.cuda_emulator.conformance build/conformance.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from tests import cuda_emulator

__all__ = ["committed", "compare", "parse", "run", "words"]

KERNELS = Path(__file__).parent / "kernels"
CASES, LANES, WORDS = 17, 32, 8
POWERS, ROUNDED = 6, (11, 13)  # cases that hardware may give otherwise: ex2, and products whose sums are rounded
EX2_ULP, PRODUCT_ERROR = 2, 1e-5  # from the exact value, which is the committed one; of the largest element


def words() -> np.ndarray:
    """Make the inputs: a linear congruence, whose upper half is the good one, so that nothing has to be stored."""
    state, found = 12345, []
    for _ in range(1024):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append(state >> 32)
    return np.array(found, np.uint32)


def run() -> np.ndarray:
    """Run every primitive on the emulated GPU; gives words by case and lane."""
    given = torch.from_numpy(words().view(np.int32))
    out = torch.zeros(CASES * LANES * WORDS, dtype=torch.int32)
    cuda_emulator.run(KERNELS / "conformance.cu", "conformance_launch", [given], [out])
    return cuda_emulator.view(out).view(np.uint32).reshape(CASES, LANES, WORDS).copy()


def committed() -> np.ndarray:
    """Read the committed results."""
    return parse((KERNELS / "conformance.txt").read_text())


def parse(text: str) -> np.ndarray:
    """Read results from text: a line a lane, with its case, its number and its words."""
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    results = np.array([[int(word, 16) for word in row[2:]] for row in rows], np.uint32)
    return results.reshape(CASES, LANES, WORDS)


def as_text(results: np.ndarray) -> str:
    """Write results as ``parse`` reads them."""
    lines = [
        f"{case:2d} {lane:2d}  " + " ".join(f"{word:08x}" for word in results[case, lane])
        for case in range(CASES)
        for lane in range(LANES)
    ]
    return "\n".join(["# What every primitive gives: case, lane, words. See conformance.cu.", *lines]) + "\n"


def compare(actual: np.ndarray, expected: np.ndarray) -> list[str]:
    """Compare the results of a GPU with those of the emulator.

    Returns:
        What differs by more than it may, a line a case: nothing at all may, but for the last bits of powers of two and
        of products whose sums are rounded.
    """
    differences = []
    for case in range(CASES):
        ours, theirs = actual[case], expected[case]
        if case == POWERS:
            off = np.abs(ours.view(np.int32).astype(int) - theirs.view(np.int32).astype(int))
            bad, how = off > EX2_ULP, f"by up to {off.max()} ulp"
        elif case in ROUNDED:
            x, y = ours.view(np.float32).astype(float), theirs.view(np.float32).astype(float)
            error = np.abs(x - y) / np.abs(y).max()
            bad, how = ~(error <= PRODUCT_ERROR), f"by up to {error.max():.1e} of the largest element"
        else:
            bad, how = ours != theirs, ""
        if bad.any():
            lane, word = np.argwhere(bad)[0]
            got, wanted = ours[lane, word], theirs[lane, word]
            differences.append(
                f"case {case}: {bad.sum()} words differ {how}, the first one is word {word} of lane {lane}: "
                f"expected {wanted:08x}, got {got:08x}"
            )
    return differences


if __name__ == "__main__":
    found = compare(parse(Path(sys.argv[1]).read_text()), committed())
    print("\n".join(found) or "all primitives give what the emulator gives")
    sys.exit(bool(found))
