"""Launches divided attention: over time, over space, with or without a cls token, or some heads each.

The functions take a call, then the tensors of the pass, as the native ops ``_divided_attention_forward / _backward``
do. A plan is a list of launches, in order; it can be run, compiled for another GPU, or only looked at.

Short sequences are packed, whole, into tiles that hold several of them; longer ones are gone through tile by tile. The
heads that attend over time and those that attend over space are launches of their own: their tiles need different
numbers of registers, and one kernel for both would need the larger everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidattn.calls import DividedCall
from vidattn.kernels import plans
from vidattn.kernels.configs import Config, architecture, padded_head_dim, product_precision, tuned
from vidattn.kernels.divided_backward import (
    divided_backward_keys,
    divided_backward_packed,
    divided_backward_queries,
)
from vidattn.kernels.divided_configs import (
    ShapeClass,
    candidate_configs,
    default_config,
    packed_config,
    padded_length,
)
from vidattn.kernels.divided_forward import divided_forward_packed, divided_forward_stream
from vidattn.kernels.divided_sequences import Mixing, Sequences, sequences_of
from vidattn.kernels.divided_tiles import ClsGradients, Context, Gradients, Kept, Shape
from vidattn.kernels.launch import Launch, Work, new_workspace
from vidattn.kernels.rows import Rows
from vidattn.kernels.softmax import dropout_of
from vidattn.kernels.sums import plan_sum_frames
from vidattn.ops._tensors import keeps_lse

__all__ = ["backward", "forward", "plan_backward", "plan_forward"]


def forward(call: DividedCall, out: Tensor, cls: Tensor | None, cls_mean: Tensor | None, lse: Tensor | None) -> None:
    """Run the forward pass; arguments as of ``plan_forward``, results in ``out`` to ``lse``."""
    plans.run(plan_forward, call, out, cls, cls_mean, lse)


def backward(
    call: DividedCall,
    dout: Tensor,
    dcls: Tensor | None,
    out: Tensor | None,
    cls: Tensor | None,
    lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Run the backward pass; arguments as of ``plan_backward``, results in ``dq``, ``dk`` and ``dv``."""
    plans.run(plan_backward, call, dout, dcls, out, cls, lse, dq, dk, dv)


def plan_forward(
    call: DividedCall,
    out: Tensor,
    cls: Tensor | None,
    cls_mean: Tensor | None,
    lse: Tensor | None,
    *,
    mixing: Mixing | None = None,
    arch: str | None = None,
) -> list[Launch]:
    """Plan the forward pass.

    Args:
        call: inputs and options.
        out: (B, T * N, h * d), last dimension dense; the context without that of the cls token.
        cls: float32 (B, T, h * d), contiguous, the context of the cls token in each frame; None without.
        cls_mean: (B, h * d), last dimension dense, the mean over the frames; None if not needed.
        lse: float32 (B, T * N, h), contiguous, T more rows for the cls token of each frame; None if not needed.
        mixing: what keys and values take from other sequences.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    launches = []
    for sequences in sequences_of(call, out.shape[1], mixing):
        shape = _shape_class(call, sequences, arch)
        arguments = _arguments(call, sequences, out.shape[1]) | {"out": _context(out), "cls": cls, "lse": lse}
        cost = _cost(call, sequences, products=2, tensors=4, vectors_of_cls=1, kept=[lse])
        packed = packed_config("divided_forward_packed", shape)
        if packed is not None:
            launches.append(_packed(divided_forward_packed, sequences, arguments, cost, packed))
        else:
            launches.append(_streamed(divided_forward_stream, sequences, arguments, cost, shape, call.q.device))
    if cls_mean is not None:
        assert cls is not None
        total = cls_mean.unflatten(-1, call.q.shape[-2:])
        launches.append(plan_sum_frames(cls[None], [total], 1.0 / call.num_frames))
    return launches


def plan_backward(
    call: DividedCall,
    dout: Tensor,
    dcls: Tensor | None,
    out: Tensor | None,
    cls: Tensor | None,
    lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    mixing: Mixing | None = None,
    arch: str | None = None,
) -> list[Launch]:
    """Plan the backward pass.

    Args:
        call: inputs and options.
        dout: like ``out``, any strides but a dense last dimension.
        dcls: float32, like ``cls``, any strides but a dense last dimension.
        out: context of the forward pass; it, ``cls`` and ``lse`` may be None where rows are seen whole.
        cls: what the forward pass wrote.
        lse: its log-sum-exp.
        dq: (B, S, h, d), last dimension dense, of the same strides as ``dk`` and ``dv``.
        dk: like ``dq``.
        dv: like ``dq``.
        mixing: what keys and values take from other sequences.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    q, rows = call.q, dout.shape[1]
    assert dq.stride() == dk.stride() == dv.stride()
    grads = Gradients(dq, dk, dv, *dq.stride()[:3])
    parts = of_cls = None
    if q.shape[1] > rows:
        assert dcls is not None
        parts = new_workspace(q, (3, q.shape[0], call.num_frames, q.shape[2] * q.shape[3]))
        of_cls = ClsGradients(dcls, dcls.stride(0), dcls.stride(1), parts, parts.stride(0))
    launches: list[Launch] = []
    for sequences in sequences_of(call, rows, mixing):
        shape = _shape_class(call, sequences, arch)
        arguments = _arguments(call, sequences, rows) | {"dout": _context(dout), "dcls": of_cls, "grads": grads}
        cost = partial(_cost, call, sequences, vectors_of_cls=4)
        packed = packed_config("divided_backward_packed", shape)
        if packed is not None:
            all_at_once = cost(products=5, tensors=7)
            launches.append(_packed(divided_backward_packed, sequences, arguments, all_at_once, packed))
        elif shape.whole:
            arguments |= {"kept": None}
            all_at_once = cost(products=5, tensors=7)
            launches.append(_streamed(divided_backward_keys, sequences, arguments, all_at_once, shape, q.device))
        else:
            assert out is not None and lse is not None
            kept = Kept(lse, new_workspace(lse, lse.shape))
            arguments |= {"kept": kept, "out": _context(out), "cls": cls}
            of_queries, of_keys = cost(products=3, tensors=6, kept=kept), cost(products=4, tensors=6, kept=kept)
            launches.append(_streamed(divided_backward_queries, sequences, arguments, of_queries, shape, q.device))
            arguments |= {"grads": grads._replace(q=None)}
            launches.append(_streamed(divided_backward_keys, sequences, arguments, of_keys, shape, q.device))
    if parts is not None:
        launches.append(plan_sum_frames(parts, [grad[:, 0] for grad in (dq, dk, dv)]))
    return launches


# ---- Arguments ----


def _arguments(call: DividedCall, sequences: Sequences, rows: int) -> dict[str, Any]:
    """Give what all kernels take, and a little more: ``rows`` are the tokens of a clip besides the cls token."""
    q, k, v, mixing = call.q, call.k, call.v, sequences.mixing
    assert k is not None and v is not None  # native ops alone take packed tensors
    return {
        "q": Rows(q, *q.stride()[:3]),
        "k": Rows(k, *k.stride()[:3]),
        "v": Rows(v, *v.stride()[:3]),
        "dropout": dropout_of(call.seed, call.dropout_p),
        "places": sequences.places,
        "num_groups": sequences.groups,
        "place_step": sequences.place_step,
        "slot_step": sequences.slot_step,
        "first_head": sequences.first_head,
        "heads": sequences.heads,
        "all_heads": q.shape[2],
        "num_rows": rows + call.num_frames * (q.shape[1] > rows),
        "segment": 1 if mixing is None else mixing.segment,
        "scale": call.scale,
        "unit": abs(call.scale) or 1.0,
        "SHAPE": Shape(
            length=sequences.length,
            has_cls=sequences.has_cls,
            shifts=sequences.shifts,
            head_dim=q.shape[-1],
            block_d=padded_head_dim(q),
            sign=(call.scale > 0) - (call.scale < 0),
            precision=product_precision(q),
        ),
    }


def _context(x: Tensor) -> Context:
    return Context(x, x.stride(0), x.stride(1))


# ---- Launches ----


def _packed(kernel: Any, sequences: Sequences, arguments: Mapping[str, Any], cost: _Cost, config: Config) -> Launch:
    """Plan a kernel whose tiles hold whole sequences."""
    block = config.block_m
    grid = -(-sequences.groups // (block // sequences.length)) * sequences.heads
    return _launch(kernel, grid, {**arguments, "BLOCK": block}, config, cost.work(grid * block * block))


def _streamed(
    kernel: Any,
    sequences: Sequences,
    arguments: Mapping[str, Any],
    cost: _Cost,
    shape: ShapeClass,
    device: torch.device,
) -> Launch:
    """Plan a kernel whose programs own a tile of one sequence, and go through all of it, cut as is fastest."""
    plan = partial(_tiled, kernel, sequences, arguments, cost)
    name = kernel.__name__
    candidates = partial(candidate_configs, name, shape)
    return plan(tuned(name, shape, default_config(name, shape), candidates, plan, device))


def _tiled(kernel: Any, sequences: Sequences, arguments: Mapping[str, Any], cost: _Cost, config: Config) -> Launch:
    """Plan a kernel that goes through sequences tile by tile."""
    rows, step = config.block_m, config.block_n
    if kernel is divided_backward_keys:  # whose programs own keys
        rows, step = step, rows
    full_tiles, tail = padded_length(sequences.length, sequences.has_cls, step)
    grid = sequences.groups * sequences.heads * -(-sequences.length // rows)
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TAIL": tail, "full_tiles": full_tiles}
    work = cost.work(grid * rows * (full_tiles * step + tail), full_tiles, rows * step)
    return _launch(kernel, grid, {**arguments, **tiles}, config, work)


def _launch(kernel: Any, grid: int, arguments: Mapping[str, Any], config: Config, work: Work) -> Launch:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(kernel, grid, {name: arguments[name] for name in kernel.arg_names}, options, work)


# ---- Tuning ----


def _shape_class(call: DividedCall, sequences: Sequences, arch: str | None) -> ShapeClass:
    q = call.q
    return ShapeClass(
        arch=arch or architecture(q.device),
        itemsize=q.itemsize,
        tensor_cores=q.dtype != torch.float32 or product_precision(q) != "ieee",
        block_d=padded_head_dim(q),
        length=sequences.length,
        dropout=call.dropout_p > 0,
        mixed=sequences.shifts is not None,
        whole=not keeps_lse(sequences.length, "triton"),
    )


# ---- Cost ----


@dataclass(frozen=True)
class _Cost:
    """What a kernel costs at least, however it is cut."""

    flops_per_score: int
    bytes: int

    def work(self, scores: int, steps: int = 0, scores_per_step: int = 0) -> Work:
        """Say what a launch does that computes so many scores."""
        return Work(steps, scores_per_step, scores, scores * self.flops_per_score, self.bytes)


def _cost(
    call: DividedCall,
    sequences: Sequences,
    *,
    products: int,
    tensors: int,
    vectors_of_cls: int,
    kept: Iterable[Tensor | None] = (),
) -> _Cost:
    """Count what a kernel does.

    Args:
        call: the call.
        sequences: the sequences that it attends in.
        products: matrix products over all scores.
        tensors: tensors like q that it reads or writes.
        vectors_of_cls: float32 vectors (h, d) that it reads or writes of the cls token in each frame.
        kept: float32 tensors that it reads or writes.

    Returns:
        The cost of these heads.
    """
    q = call.q
    all_heads, head_dim = q.shape[2:]
    numbers = sum(x.numel() for x in kept if x is not None)
    numbers += sequences.has_cls * sequences.groups * all_heads * head_dim * vectors_of_cls
    moved = (tensors * q.numel() * q.itemsize + 4 * numbers) * sequences.heads // all_heads
    return _Cost(products * 2 * head_dim, moved)
