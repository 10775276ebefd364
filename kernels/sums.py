"""The second stage of sums over many programs: partial results, added in one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vidattn.kernels.launch import Launch, Work

__all__ = ["plan_sum", "sum_parts"]


@triton.jit(do_not_specialize=["num_parts", "num_rows", "num_columns", "pitch"])
def sum_parts(  # type: ignore[no-untyped-def]
    parts, total, num_parts, num_rows, num_columns, pitch, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum float32 ``parts`` (num_parts, num_rows, pitch) into ``total`` (num_rows, num_columns)."""
    blocks = tl.cdiv(num_columns, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        numbers = first + tl.arange(0, BLOCK_P)
        inside = (numbers < num_parts)[:, None] & (columns < num_columns)[None, :]
        starts = (numbers.to(tl.int64) * num_rows + row) * pitch
        sums += tl.load(parts + starts[:, None] + columns[None, :], mask=inside, other=0.0)
    tl.store(total + row * num_columns + columns, tl.sum(sums, 0), mask=columns < num_columns)


def plan_sum(parts: Tensor, total: Tensor, num_rows: int, num_columns: int, pitch: int) -> Launch:
    """Plan the sum of ``parts`` (any number, num_rows, pitch) into ``total`` (num_rows, num_columns), both float32."""
    block_p, block_c = 16, 128
    arguments = {
        "parts": parts,
        "total": total,
        "num_parts": parts.shape[0],
        "num_rows": num_rows,
        "num_columns": num_columns,
        "pitch": pitch,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    work = Work(bytes=4 * (parts.numel() + total.numel()))
    return Launch(sum_parts, num_rows * -(-num_columns // block_c), arguments, work=work)
