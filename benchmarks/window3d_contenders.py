"""The ways of computing window attention that are timed against each other.

All of them start from the packed output of the qkv projection (B, D, H, W, 3, h, d) and end with the context
(B, D, H, W, h * d), and for ``forward_backward`` with the gradients of both qkv and the bias table.

``eager`` is what the module code of Video Swin does: pad, roll, partition, scores, gathered bias, cached mask, softmax,
context, reverse. One difference: the modules roll and partition before the projection, a third of the channels.
``compiled`` is ``torch.compile`` of it. ``sdpa`` replaces scores, softmax and context by
``F.scaled_dot_product_attention``, with bias plus shift mask as its mask, built in the call: the bias is a parameter.
``sdpa_prebuilt`` gets that mask ready made, as an inference engine could keep one for each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import vidattn
from benchmarks.shapes import DTYPES, SMOKE_CASES, WINDOW_CASES, WindowCase
from vidattn.geometry import bias_rows, region_mask

CASES = WINDOW_CASES | SMOKE_CASES
CONTENDERS = ("eager", "sdpa", "sdpa_prebuilt", "compiled", "vidattn", "vidattn_float32")


def contenders(direction: str, dtype: str) -> list[str]:
    """Name those that make sense: nothing prebuilt in training, no second float32 run beside the first."""
    absent = {"sdpa_prebuilt"} if direction == "forward_backward" else set()
    if dtype == "float32":
        absent.add("vidattn_float32")
    return [name for name in CONTENDERS if name not in absent]


def _partition(x: Tensor, case: WindowCase) -> Tensor:
    """(B, D, H, W, 3, h, d) to q, k, v of all windows, (3, B * nW, h, N, d)."""
    windows = case.geometry
    (nd, nh, nw), (wd, wh, ww) = windows.counts, windows.window
    pad = [p - g for p, g in zip(windows.padded, windows.grid, strict=True)]
    if any(pad):
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    if any(windows.shift):
        x = torch.roll(x, [-offset for offset in windows.shift], dims=(1, 2, 3))
    x = x.view(case.batch, nd, wd, nh, wh, nw, ww, 3, case.heads, case.head_dim)
    x = x.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9).contiguous()
    return x.view(3, case.batch * windows.num_windows, case.heads, windows.num_tokens, case.head_dim)


def _reverse(context: Tensor, case: WindowCase) -> Tensor:
    """(B * nW, h, N, d) to (B, D, H, W, h * d)."""
    windows = case.geometry
    (nd, nh, nw), (wd, wh, ww) = windows.counts, windows.window
    context = context.transpose(1, 2).reshape(case.batch, nd, nh, nw, wd, wh, ww, case.heads * case.head_dim)
    context = context.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(case.batch, *windows.padded, case.heads * case.head_dim)
    if any(windows.shift):
        context = torch.roll(context, windows.shift, dims=(1, 2, 3))
    depth, height, width = windows.grid
    return context[:, :depth, :height, :width].contiguous()


def _bias(table: Tensor, rows: Tensor) -> Tensor:
    return table[rows.view(-1)].view(*rows.shape, -1).permute(2, 0, 1).contiguous()  # (h, N, N)


def _eager(qkv: Tensor, table: Tensor, rows: Tensor, mask: Tensor | None, case: WindowCase) -> Tensor:
    q, k, v = _partition(qkv, case).unbind(0)
    scores = (q * case.head_dim**-0.5) @ k.transpose(-2, -1)
    scores = scores + _bias(table, rows)
    if mask is not None:
        scores = scores.view(case.batch, -1, *scores.shape[1:]) + mask[None, :, None]
        scores = scores.view(-1, *scores.shape[2:])
    return _reverse(scores.softmax(-1) @ v, case)


def _sdpa_mask(table: Tensor, rows: Tensor, mask: Tensor | None, case: WindowCase) -> Tensor:
    bias = _bias(table, rows)[None]
    if mask is None:
        return bias
    both = bias + mask[:, None]  # (nW, h, N, N)
    return both.repeat(case.batch, 1, 1, 1) if case.batch > 1 else both


def _sdpa_prebuilt(qkv: Tensor, table: Tensor, attention_mask: Tensor, case: WindowCase) -> Tensor:
    q, k, v = _partition(qkv, case).unbind(0)
    return _reverse(F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask), case)


def _sdpa(qkv: Tensor, table: Tensor, rows: Tensor, mask: Tensor | None, case: WindowCase) -> Tensor:
    return _sdpa_prebuilt(qkv, table, _sdpa_mask(table, rows, mask, case), case)


def _vidattn(qkv: Tensor, table: Tensor, case: WindowCase) -> Tensor:
    return vidattn.window3d_attention(qkv, table, window_size=case.window, shift_size=case.shift)


def build(case: str, direction: str, dtype: str, contender: str) -> Callable[[], tuple[Tensor, ...]]:
    """Make inputs, the same ones for every contender, and the call to time.

    Args:
        case: name of a case in ``shapes``.
        direction: "forward" | "forward_backward".
        dtype: "float32" | "bfloat16".
        contender: one of ``CONTENDERS``.

    Returns:
        A function that returns (context,), or (context, gradient of qkv, gradient of the table).
    """
    shape, training = CASES[case], direction == "forward_backward"
    element = DTYPES["float32" if contender == "vidattn_float32" else dtype]
    generator = torch.Generator().manual_seed(0)
    qkv, table, gradient = (
        torch.randn(size, generator=generator).to(element)
        for size in (shape.qkv_shape, shape.table_shape, (*shape.qkv_shape[:4], shape.heads * shape.head_dim))
    )
    rows = bias_rows(shape.window, shape.geometry)
    regions = region_mask(shape.geometry)
    mask = None if regions is None else regions.to(element) * -100.0

    eager = partial(_eager, rows=rows, mask=mask, case=shape)
    attend: Callable[[Tensor, Tensor], Tensor]
    if contender == "eager":
        attend = eager
    elif contender == "compiled":
        torch.compiler.reset()  # every case counts as the first: no recompilation limit, no dynamic shapes
        attend = torch.compile(eager, dynamic=False, fullgraph=True)
    elif contender == "sdpa":
        attend = partial(_sdpa, rows=rows, mask=mask, case=shape)
    elif contender == "sdpa_prebuilt":
        attend = partial(_sdpa_prebuilt, attention_mask=_sdpa_mask(table, rows, mask, shape), case=shape)
    else:
        attend = partial(_vidattn, case=shape)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(qkv, table),)

    def forward_backward() -> tuple[Tensor, ...]:
        context = attend(qkv, table)
        return (context, *torch.autograd.grad(context, (qkv, table), gradient))

    if training:
        qkv.requires_grad_()
        table.requires_grad_()
        return forward_backward
    return forward
