"""The ways of computing window attention that are timed against each other, on the CPU or a GPU.

All of them start from the packed output of the qkv projection (B, D, H, W, 3, h, d) and end with the context
(B, D, H, W, h * d), and for ``forward_backward`` with the gradients of both qkv and the bias table.

``eager`` is what the module code of Video Swin does: pad, roll, partition, scores, gathered bias, cached mask, softmax,
context, reverse. One difference: the modules roll and partition before the projection, a third of the channels.
``sdpa`` replaces scores, softmax and context by ``F.scaled_dot_product_attention``, with bias plus shift mask as its
mask, built in the call: the bias is a parameter. ``sdpa_prebuilt`` gets that mask ready made, as an inference engine
could keep one for each layer. ``compiled`` and ``compiled_sdpa`` are ``torch.compile`` of eager and of sdpa. ``flex``
is compiled FlexAttention, which gathers the bias from the table in its score_mod and excludes what the shift separates
by its mask_mod; its block mask is ready made. It has no backward on a CPU.

On a GPU there are more. The kernels of SDPA are pinned, each a contender of its own, and those that take a mask ready
made too. ``triton`` is ours too, where ``vidattn`` takes the backend "cuda". ``cuequivariance`` is the triangle
attention of that package: one call for plain windows, one for each kind of window of a shifted grid, bias and mask
dense in float32. ``xformers`` takes the mask that SDPA takes. ``natten`` computes something less: no bias and no shift.
They take part where they are installed. Nobody keeps what it makes of the table from call to call, but for
``..._prebuilt``: what a CUDA graph repeats is what a call does without one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import vidattn
from benchmarks.calls import EXACT, SDPA, compiled, installed, pinned_sdpa, why_absent, xformers
from benchmarks.shapes import SMOKE_CASES, WINDOW_CASES, WindowCase
from vidattn.geometry import bias_rows, region_mask

CASES = WINDOW_CASES | SMOKE_CASES
CONTENDERS = (
    "eager", "sdpa", "sdpa_prebuilt", "compiled", "compiled_sdpa", "flex", *installed("xformers", "natten"), "vidattn",
    "vidattn_float32",
)  # fmt: skip
PREBUILT = "_prebuilt"
GPU_CONTENDERS = (
    "vidattn", "triton", "eager", *SDPA, "sdpa_efficient_prebuilt", "sdpa_cudnn_prebuilt", "cuequivariance", "xformers",
    "natten", "compiled", "flex",
)  # fmt: skip

Attend = Callable[[Tensor, Tensor], Tensor]


def contenders(direction: str, dtype: str) -> list[str]:
    """Name those that make sense: nothing prebuilt or without a backward in training, no second float32 run."""
    absent = {"sdpa_prebuilt", "flex"} if direction == "forward_backward" else set()
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


def _sdpa_prebuilt(
    qkv: Tensor, table: Tensor, attention_mask: Tensor, case: WindowCase, attend: Callable[..., Tensor]
) -> Tensor:
    q, k, v = _partition(qkv, case).unbind(0)
    return _reverse(attend(q, k, v, attn_mask=attention_mask), case)


def _sdpa(
    qkv: Tensor, table: Tensor, rows: Tensor, mask: Tensor | None, case: WindowCase, attend: Callable[..., Tensor]
) -> Tensor:
    return _sdpa_prebuilt(qkv, table, _sdpa_mask(table, rows, mask, case), case, attend)


def _flex(shape: WindowCase, rows: Tensor, mask: Tensor | None) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A row of the table is a difference of two numbers that depend on one token each: two short gathers, not N x N.
    offsets, base = rows[:, 0].int().contiguous(), int(rows[0, 0])
    block_mask = None
    if mask is not None:
        allowed, kinds = mask == 0, mask.shape[0]
        windows, tokens = shape.batch * kinds, mask.shape[1]
        block_mask = create_block_mask(
            lambda b, h, i, j: allowed[b % kinds, i, j], windows, None, tokens, tokens, device=str(mask.device)
        )

    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        wide = table.float()  # the backward adds to the table's gradient once per score

        def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + wide[offsets[query] - offsets[key] + base, head]

        q, k, v = _partition(qkv, shape).unbind(0)
        return _reverse(flex_attention(q, k, v, score_mod=add_bias, block_mask=block_mask), shape)

    return attend


def _triangle(shape: WindowCase, rows: Tensor, mask: Tensor | None) -> Attend:
    from cuequivariance_torch import triangle_attention

    if mask is None:

        def attend_alike(qkv: Tensor, table: Tensor) -> Tensor:
            q, k, v = (x[None] for x in _partition(qkv, shape).unbind(0))  # (1, B * nW, h, N, d)
            bias = _bias(table, rows).float()[None, None]
            return _reverse(triangle_attention(q, k, v, bias, scale=shape.head_dim**-0.5)[0], shape)

        return attend_alike
    masks, kinds = mask.float().unique(dim=0, return_inverse=True)
    windows = [(kinds == kind).nonzero().flatten() for kind in range(len(masks))]
    back = torch.cat(windows).argsort()

    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        parts = _partition(qkv, shape).unflatten(1, (shape.batch, -1))  # (3, B, nW, h, N, d)
        bias, contexts = _bias(table, rows).float(), []
        for of_kind, added in zip(windows, masks, strict=True):
            q, k, v = (x[None] for x in parts[:, :, of_kind].flatten(1, 2).unbind(0))
            context = triangle_attention(q, k, v, (bias + added)[None, None], scale=shape.head_dim**-0.5)[0]
            contexts.append(context.unflatten(0, (shape.batch, -1)))
        return _reverse(torch.cat(contexts, dim=1)[:, back].flatten(0, 1), shape)

    return attend


def _natten(qkv: Tensor, table: Tensor, case: WindowCase) -> Tensor:
    from natten import na3d

    window = case.geometry.window
    return na3d(*qkv.unbind(4), kernel_size=window, stride=window).flatten(-2)


def _vidattn(qkv: Tensor, table: Tensor, case: WindowCase, backend: str | None = None) -> Tensor:
    options = {"window_size": case.window, "shift_size": case.shift, "wrap": case.wrap}
    return vidattn.window3d_attention(qkv, table, **options, backend=backend)


def why_not(case: WindowCase, direction: str, dtype: str, contender: str) -> str | None:
    """Say why a contender of ``GPU_CONTENDERS`` is left out of a comparison; None if it takes part."""
    if contender.endswith(PREBUILT) and direction == "forward_backward":
        return "a mask made before the call has no gradient"
    if contender == "natten" and (any(case.geometry.shift) or case.geometry.padded != case.grid):
        return "natten has no shifted or padded windows"
    qkv = torch.empty(case.qkv_shape, dtype=getattr(torch, dtype), device="meta")
    table = torch.empty(case.table_shape, device="meta", requires_grad=direction == "forward_backward")
    options = {"window_size": case.window, "shift_size": case.shift, "wrap": case.wrap}
    return why_absent(contender, "window3d_attention", qkv, table, **options)


def computes_the_same(contender: str) -> bool:
    """Tell whether results of a contender can be compared with those of the others."""
    return contender != "natten"


def make_attend(shape: WindowCase, contender: str, table: Tensor) -> Attend:
    """Prepare what a contender keeps between calls, and give its function of qkv and table.

    Args:
        shape: the call's sizes.
        contender: one of ``CONTENDERS`` or ``GPU_CONTENDERS``, or ``EXACT``.
        table: bias table, for what is built from it beforehand; its device and dtype are those of the call.

    Returns:
        (qkv, table) -> context.
    """
    rows = bias_rows(shape.window, shape.geometry, device=table.device)
    regions = region_mask(shape.geometry, table.device)
    mask = None if regions is None else regions.to(table.dtype) * -100.0

    eager = partial(_eager, rows=rows, mask=mask, case=shape)
    if contender == "eager":
        return eager
    if contender in ("xformers", "compiled_sdpa") or contender.startswith("sdpa"):
        attend = xformers if contender == "xformers" else pinned_sdpa(contender.removesuffix(PREBUILT))
        if contender.endswith(PREBUILT):
            made = _sdpa_mask(table, rows, mask, shape)
            return partial(_sdpa_prebuilt, attention_mask=made, case=shape, attend=attend)
        in_call = partial(_sdpa, rows=rows, mask=mask, case=shape, attend=attend)
        return compiled(in_call) if contender.startswith("compiled") else in_call
    if contender == "cuequivariance":
        return _triangle(shape, rows, mask)
    if contender == "natten":
        return partial(_natten, case=shape)
    if contender in ("compiled", "flex"):
        return compiled(eager if contender == "compiled" else _flex(shape, rows, mask))
    backend = {EXACT: "reference", "triton": "triton"}.get(contender)
    return partial(_vidattn, case=shape, backend=backend)


def build_copies(
    shape: WindowCase, direction: str, dtype: str, contender: str, device: str = "cpu", copies: int = 1
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Make inputs, the same ones for every contender, and the calls to time.

    Args:
        shape: sizes of the call.
        direction: "forward" | "forward_backward".
        dtype: "float32" | "bfloat16" | "float16".
        contender: one of ``CONTENDERS`` or ``GPU_CONTENDERS``, or ``EXACT``.
        device: where the inputs are.
        copies: how many calls, each with a qkv and an output gradient of its own; the table is everybody's.

    Returns:
        Functions that return (context,), or (context, gradient of qkv, gradient of the table).
    """
    wider = {EXACT: torch.float64, "vidattn_float32": torch.float32}  # on the same numbers as everybody
    generator = torch.Generator(device).manual_seed(0)

    def random(size: tuple[int, ...]) -> Tensor:
        numbers = torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))
        return numbers.to(wider.get(contender, numbers.dtype))

    qkvs, table = [random(shape.qkv_shape)], random(shape.table_shape)
    gradients = [random((*shape.qkv_shape[:4], shape.heads * shape.head_dim))]
    for _ in range(copies - 1):
        qkvs.append(random(shape.qkv_shape))
        gradients.append(random(gradients[0].shape))
    attend = make_attend(shape, contender, table)

    def forward(qkv: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(qkv, table),)

    def forward_backward(qkv: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        context = attend(qkv, table)
        learnt = (qkv, table) if computes_the_same(contender) else (qkv,)
        return (context, *torch.autograd.grad(context, learnt, gradient))

    call = forward
    if direction == "forward_backward":
        call = forward_backward
        for leaf in (*qkvs, table):
            leaf.requires_grad_()
    return [partial(call, qkv, gradient) for qkv, gradient in zip(qkvs, gradients, strict=True)]


def build(
    case: str, direction: str, dtype: str, contender: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """Make inputs and the one call to time: that of a named case, else as in ``build_copies``."""
    return build_copies(CASES[case], direction, dtype, contender, device)[0]
