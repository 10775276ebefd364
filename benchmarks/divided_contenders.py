"""The ways of computing attention over time and over space that are timed against each other, on the CPU or a GPU.

All of them start from the packed output of the qkv projection (B, S, 3, h, d) and end with the context (B, S, h * d) in
the same order of tokens, and for ``forward_backward`` with the gradient of qkv.

``eager`` is what the module code of TimeSformer and ViViT does: rearrange the tokens so that those that attend together
are neighbours, with a copy of the cls token for every frame, then scores, softmax, context, and all of it back. One
difference: TimeSformer repeats and rearranges before the projection, a third of the channels. ``sdpa`` replaces scores,
softmax and context by ``F.scaled_dot_product_attention``, and ``flex`` has compiled FlexAttention in its place.
``compiled`` and ``compiled_sdpa`` are ``torch.compile`` of eager and of sdpa. Where the order of the tokens allows it,
rearranging is a view for all of them. ``flash_attn`` and ``xformers`` take part where they are installed.

On a GPU the kernels of SDPA are pinned, each a contender of its own. ``triton`` is ours too, where ``vidattn`` takes
the backend "cuda".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vidattn
from benchmarks.calls import CONTENDERS, EXACT, GPU_CONTENDERS, Attend, build_calls, contenders, rival, why_absent
from benchmarks.shapes import DIVIDED_CASES, SMOKE_DIVIDED_CASES, DividedCase

__all__ = ["CONTENDERS", "GPU_CONTENDERS", "build", "build_copies", "contenders", "make_attend", "why_not"]

CASES = DIVIDED_CASES | SMOKE_DIVIDED_CASES
FUNCTIONS = {
    "temporal": "temporal_attention",
    "spatial": "spatial_attention",
    "factorized": "factorized_dot_product_attention",
}


def _sequences(qkv: Tensor, case: DividedCase, over_time: bool) -> Tensor:
    """(B, S, 3, h, d) to q, k, v of the tokens that attend together, (3, G, h, n, d)."""
    grid = (case.num_sites, case.num_frames) if case.token_order == "hwt" else (case.num_frames, case.num_sites)
    x = qkv[:, int(case.has_cls) :].unflatten(1, grid)
    if (case.token_order == "hwt") != over_time:
        x = x.transpose(1, 2)
    if case.has_cls:
        x = torch.cat((qkv[:, None, :1].expand(-1, case.num_frames, -1, -1, -1, -1), x), dim=2)
    return x.flatten(0, 1).permute(2, 0, 3, 1, 4)


def _tokens(context: Tensor, case: DividedCase, over_time: bool) -> Tensor:
    """(G, h, n, d) to (B, S, h * d), the contexts of the cls token averaged over the frames."""
    x = context.transpose(1, 2).flatten(2).unflatten(0, (case.batch, -1))
    cls, x = x[:, :, : int(case.has_cls)], x[:, :, int(case.has_cls) :]
    if (case.token_order == "hwt") != over_time:
        x = x.transpose(1, 2)
    x = x.flatten(1, 2)
    return torch.cat((cls.mean(1), x), dim=1) if case.has_cls else x


def _rearranged(qkv: Tensor, case: DividedCase, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    split = case.temporal_heads
    parts = [
        _tokens(attend(*_sequences(heads, case, over_time).unbind(0)), case, over_time)
        for over_time, heads in ((True, qkv[..., :split, :]), (False, qkv[..., split:, :]))
        if heads.shape[-2] > 0
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _options(case: DividedCase) -> dict[str, Any]:
    cls_token = {"cls_token": "mean" if case.has_cls else None} if case.kind == "spatial" else {}
    return {"num_frames": case.num_frames, "token_order": case.token_order, **cls_token}


def _vidattn(qkv: Tensor, case: DividedCase, backend: str | None = None) -> Tensor:
    return getattr(vidattn, FUNCTIONS[case.kind])(qkv, **_options(case), backend=backend)


def why_not(case: DividedCase, direction: str, dtype: str, contender: str) -> str | None:
    """Say why a contender of ``GPU_CONTENDERS`` is left out of a comparison; None if it takes part."""
    qkv = torch.empty(case.qkv_shape, dtype=getattr(torch, dtype), device="meta")
    return why_absent(contender, FUNCTIONS[case.kind], qkv, **_options(case))


def make_attend(shape: DividedCase, contender: str) -> Attend:
    """Give a contender's function of qkv.

    Args:
        shape: the call's sizes.
        contender: one of ``CONTENDERS`` or ``GPU_CONTENDERS``, or ``EXACT``.

    Returns:
        qkv -> context.
    """
    theirs = rival(contender, partial(_rearranged, case=shape))
    if theirs is not None:
        return theirs
    return partial(_vidattn, case=shape, backend={EXACT: "reference", "triton": "triton"}.get(contender))


def build_copies(
    shape: DividedCase, direction: str, dtype: str, contender: str, device: str = "cpu", copies: int = 1
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Make inputs, the same ones for every contender, and the calls to time.

    Args:
        shape: sizes of the call.
        direction: "forward" | "forward_backward".
        dtype: "float32" | "bfloat16" | "float16".
        contender: one of ``CONTENDERS`` or ``GPU_CONTENDERS``, or ``EXACT``.
        device: where the inputs are.
        copies: how many calls, each with a qkv and an output gradient of its own.

    Returns:
        Functions that return (context,), or (context, gradient of qkv).
    """
    attend = make_attend(shape, contender)
    return build_calls(attend, shape.qkv_shape, direction, dtype, device, copies, contender == EXACT)


def build(
    case: str, direction: str, dtype: str, contender: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """Make inputs and the one call to time: that of a named case, else as in ``build_copies``."""
    return build_copies(CASES[case], direction, dtype, contender, device)[0]
