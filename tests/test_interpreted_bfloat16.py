"""bfloat16 in Triton kernels is what torch has, on a GPU and in the interpreter, which the tests mend for that."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton
import triton.language as tl
from attention_cases import device_of
from torch import Tensor

from vidattn.kernels.launch import INTERPRETED

pytestmark = pytest.mark.needs_triton


@triton.jit
def multiply(x, y, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    square = rows[:, None] * SIZE + rows[None, :]
    tl.store(out + square, tl.dot(tl.load(x + square), tl.load(y + square)))


@triton.jit
def compute(x, y, out, truth, SIZE: tl.constexpr):
    """Results of bfloat16 in rows of ``out``, comparisons in rows of ``truth``."""
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + SIZE + at, a * b)
    tl.store(out + 2 * SIZE + at, -a)
    tl.store(out + 3 * SIZE + at, tl.where(a > b, a, b))
    tl.store(out + 4 * SIZE + at, at.to(tl.bfloat16))
    tl.store(out + 5 * SIZE + at, tl.abs(a))
    tl.store(out + 6 * SIZE + at, (a * -3).to(tl.bfloat16))
    tl.store(truth + at, ((a < b) | (a != a)).to(tl.int32))


@triton.jit
def cast(x, y, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


def matrices(count: int) -> list[Tensor]:
    return [torch.randn(32, 32, device=device_of("triton"), dtype=torch.bfloat16) for _ in range(count)]


def test_products() -> None:
    x, y = matrices(2)
    out = torch.empty(32, 32, device=x.device)
    multiply[(1,)](x, y, out, 32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has nothing to mend")
def test_products_are_wrong_where_the_interpreter_is_not_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    import interpreted_bfloat16

    for name, method in interpreted_bfloat16.ORIGINAL.items():
        monkeypatch.setattr(f"triton.runtime.interpreter.InterpreterBuilder.{name}", method)
    x, y = matrices(2)
    out = torch.empty(32, 32, device=x.device)
    multiply[(1,)](x, y, out, 32)
    assert (out - x.float() @ y.float()).abs().max() > 1e6


def test_sums_products_and_comparisons() -> None:
    x, y = (matrix.flatten() for matrix in matrices(2))
    y[::7] = x[::7]
    x[5] = float("nan")
    out, truth = x.new_empty(7, x.numel()), torch.empty(x.numel(), dtype=torch.int32, device=x.device)
    compute[(1,)](x, y, out, truth, x.numel())
    numbers = torch.arange(x.numel(), device=x.device).bfloat16()
    expected = torch.stack([x + y, x * y, -x, torch.where(x > y, x, y), numbers, x.abs(), x * -3])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(truth.bool(), (x < y) | (x != x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts(dtype: torch.dtype) -> None:
    """All numbers of 16 bits to and fro; of 32 bits ties, the largest, subnormal numbers, infinities and NaN."""
    bits = torch.arange(2**16, dtype=torch.int32)
    device = device_of("triton")
    numbers = bits.to(torch.int16).view(torch.bfloat16).to(device)
    found = torch.empty(2**16, dtype=dtype, device=device)
    cast[(64,)](numbers, found, 1024)
    torch.testing.assert_close(found, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
    fine = bits.to(torch.int16).view(torch.float16).to(device)
    if dtype == torch.float32:
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        fine = (bits[:, None] << 16 | low).view(torch.float32).flatten().to(device)
    found = torch.empty(fine.shape, dtype=torch.bfloat16, device=device)
    cast[(fine.numel() // 1024,)](fine, found, 1024)
    torch.testing.assert_close(found, fine.bfloat16(), rtol=0, atol=0, equal_nan=True)
