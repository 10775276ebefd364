"""Launches divided attention: over time, over space, with or without a cls token, or some heads each.

The functions take what the native ops ``_divided_attention_forward / _backward`` take. A plan is a list of launches, in
order; it can be run, compiled for another GPU, or only looked at.

Short sequences are packed, whole, into tiles that hold several of them; longer ones are gone through tile by tile. The
heads that attend over time and those that attend over space are launches of their own: their tiles need different
numbers of registers, and one kernel for both would need the larger everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import triton
from torch import Tensor

from vidattn.kernels import plans
from vidattn.kernels.configs import Config, architecture, tuned
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
from vidattn.kernels.launch import Launch, Work, new_workspace
from vidattn.kernels.sums import plan_sum_frames
from vidattn.ops._tensors import keeps_lse

__all__ = ["Mixing", "backward", "forward", "plan_backward", "plan_forward"]


def forward(*arguments: Any) -> None:
    """Run the forward pass; arguments as of :func:`plan_forward`, results in ``out`` to ``lse``."""
    plans.run(plan_forward, *arguments)


def backward(*arguments: Any) -> None:
    """Run the backward pass; arguments as of :func:`plan_backward`, results in ``dq``, ``dk`` and ``dv``."""
    plans.run(plan_backward, *arguments)


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    num_frames: int,
    time_fastest: bool,
    temporal_heads: int,
    scale: float,
    dropout_p: float,
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
        q: (B, S, h, d), last dimension dense; so are ``k`` and ``v``. S is T * N, one more with a cls token in row 0.
        k: like ``q``.
        v: like ``q``.
        seed: int64 (1,), needed when ``dropout_p > 0``.
        num_frames: T.
        time_fastest: whether the T frames of a site are neighbours, or the N sites of a frame.
        temporal_heads: heads that attend over time, the first ones; the rest attends over space. 0 with a cls token.
        scale: factor of q k^T.
        dropout_p: dropout probability.
        out: (B, T * N, h * d), last dimension dense; the context without that of the cls token.
        cls: float32 (B, T, h * d), contiguous, the context of the cls token in each frame; None without.
        cls_mean: (B, h * d), last dimension dense, the mean over the frames; None if not needed.
        lse: float32 (B, T * N, h), contiguous, T more rows for the cls token of each frame; None if not needed.
        mixing: what keys and values take from other sequences.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    call = _Call(q, k, v, seed, out.shape[1], num_frames, time_fastest, temporal_heads, scale, dropout_p, mixing, arch)
    launches = [part.forward(out, cls, lse) for part in call.parts]
    if cls_mean is not None:
        assert cls is not None
        total = cls_mean.unflatten(-1, q.shape[-2:])
        launches.append(plan_sum_frames(cls[None], [total], 1.0 / num_frames))
    return launches


def plan_backward(
    dout: Tensor,
    dcls: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    num_frames: int,
    time_fastest: bool,
    temporal_heads: int,
    scale: float,
    dropout_p: float,
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
        dout: like ``out``, any strides but a dense last dimension.
        dcls: float32, like ``cls``, any strides but a dense last dimension.
        q: as in :func:`plan_forward`, and so are all arguments up to ``dropout_p``.
        k: like ``q``.
        v: like ``q``.
        seed: key of the dropout mask.
        num_frames: T.
        time_fastest: token order.
        temporal_heads: heads that attend over time.
        scale: factor of q k^T.
        dropout_p: dropout probability.
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
    call = _Call(q, k, v, seed, dout.shape[1], num_frames, time_fastest, temporal_heads, scale, dropout_p, mixing, arch)
    assert dq.stride() == dk.stride() == dv.stride()
    parts = None
    if call.has_cls:
        parts = new_workspace(q, (3, q.shape[0], num_frames, q.shape[2] * q.shape[3]))
    grads = _Gradients(dout, dcls, dq, dk, dv, parts)
    launches: list[Launch] = []
    for part in call.parts:
        launches += part.backward(grads, out, cls, lse)
    if parts is not None:
        launches.append(plan_sum_frames(parts, [grad[:, 0] for grad in (dq, dk, dv)]))
    return launches


@dataclass(frozen=True)
class Mixing:
    """Channels that keys and values of a sequence take from other sequences; each clip is one sequence, a frame.

    Attributes:
        segment: frames across whose ends nothing is mixed.
        shifts: (first, last, frame offset) of ranges of concatenated channels, in ascending order.
    """

    segment: int
    shifts: tuple[tuple[int, int, int], ...]

    def head_groups(self, heads: int, head_dim: int, itemsize: int) -> list[tuple[int, int, Mixing]]:
        """Cut the heads into groups of neighbours: (first head, heads, what they take from elsewhere).

        Ranges that start or end off 16 bytes cannot be loaded 16 bytes at a time, and then nothing of their launch is.
        """
        cuts = [cut for first, last, _ in self.shifts for cut in (first, last)]
        odd = {cut // head_dim for cut in cuts if cut % head_dim * itemsize % 16 != 0}
        groups = []
        for _, members in itertools.groupby(range(heads), key=lambda head: head in odd):
            first_head, *more = members
            count = 1 + len(more)
            begin, end = first_head * head_dim, (first_head + count) * head_dim
            taken = tuple(shift for shift in self.shifts if shift[0] < end and shift[1] > begin)
            groups.append((first_head, count, replace(self, shifts=taken)))
        return groups


@dataclass(frozen=True)
class _Gradients:
    """What comes into the backward pass and goes out: of the cls token, ``cls_parts`` (3, B, T, h * d) by frame."""

    dout: Tensor
    dcls: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor
    cls_parts: Tensor | None

    @property
    def incoming(self) -> dict[str, Any]:
        """Arguments of the kernels."""
        dcls = self.dcls
        return {
            "dout": self.dout,
            "dout_batch": self.dout.stride(0),
            "dout_token": self.dout.stride(1),
            "dcls": dcls,
            "dcls_batch": 0 if dcls is None else dcls.stride(0),
            "dcls_frame": 0 if dcls is None else dcls.stride(1),
            "grad_batch": self.dq.stride(0),
            "grad_token": self.dq.stride(1),
            "grad_head": self.dq.stride(2),
            "cls_parts": self.cls_parts,
            "part_size": 0 if self.cls_parts is None else self.cls_parts[0].numel(),
        }


@dataclass(frozen=True)
class _Call:
    """One call: its inputs, and the one or two kinds of sequences in it; ``rows`` tokens besides the cls token."""

    q: Tensor
    k: Tensor
    v: Tensor
    seed: Tensor | None
    rows: int
    num_frames: int
    time_fastest: bool
    temporal_heads: int
    scale: float
    dropout_p: float
    mixing: Mixing | None
    arch: str | None

    @property
    def num_sites(self) -> int:
        """Sites of a frame."""
        return self.rows // self.num_frames

    @property
    def has_cls(self) -> bool:
        """Whether row 0 is a cls token."""
        return self.q.shape[1] > self.rows

    @cached_property
    def parts(self) -> list[_Part]:
        """The sequences over time, then those over space."""
        frames, sites = self.num_frames, self.num_sites
        frame_step, site_step = (1, frames) if self.time_fastest else (sites, 1)
        heads, head_dim = self.q.shape[2:]
        if self.mixing is not None:
            groups = self.mixing.head_groups(heads, head_dim, self.q.itemsize)
            return [_Part(self, sites, False, 1, sites, 1, *group) for group in groups]
        over_time = _Part(self, frames, False, sites, site_step, frame_step, 0, self.temporal_heads)
        over_space = _Part(
            self, sites + self.has_cls, self.has_cls, frames, frame_step, site_step,
            self.temporal_heads, heads - self.temporal_heads,
        )  # fmt: skip
        return [part for part in (over_time, over_space) if part.heads > 0]


@dataclass(frozen=True)
class _Part:
    """The sequences of one kind, over time or over space, and the heads that attend in them.

    Attributes:
        call: the call.
        length: tokens of a sequence, the cls token included.
        has_cls: whether a cls token is among them.
        places: sequences of a clip.
        place_step: rows from one sequence to the next.
        slot_step: rows from one token of a sequence to the next.
        first_head: the first head.
        heads: their number.
        mixing: what their keys and values take from other sequences.
    """

    call: _Call
    length: int
    has_cls: bool
    places: int
    place_step: int
    slot_step: int
    first_head: int
    heads: int
    mixing: Mixing | None = None

    @property
    def num_groups(self) -> int:
        """Sequences of the whole batch."""
        return self.call.q.shape[0] * self.places

    @cached_property
    def shape_class(self) -> ShapeClass:
        """What the choice of a configuration depends on."""
        q = self.call.q
        return ShapeClass(
            arch=self.call.arch or architecture(q.device),
            itemsize=q.itemsize,
            tensor_cores=q.dtype != torch.float32 or _precision(q) != "ieee",
            block_d=_block_d(q.shape[-1]),
            length=self.length,
            dropout=self.call.dropout_p > 0,
            mixed=self.mixing is not None and len(self.mixing.shifts) > 0,
            whole=not keeps_lse(self.length, "triton"),
        )

    def packed(self, kernel: Any) -> Config | None:
        """How whole sequences are packed into tiles; None if they are too long."""
        return packed_config(kernel.__name__, self.shape_class)

    def forward(self, out: Tensor, cls: Tensor | None, lse: Tensor | None) -> Launch:
        """Plan the forward pass."""
        given = self._outputs(out, cls, lse) | {"HAS_LSE": lse is not None}
        packed = self.packed(divided_forward_packed)
        if packed is not None:
            return self._pack(divided_forward_packed, packed, given, 2, 4)
        return self._stream(divided_forward_stream, given, "block_m", 2, 4)

    def backward(self, grads: _Gradients, out: Tensor | None, cls: Tensor | None, lse: Tensor | None) -> list[Launch]:
        """Plan the backward pass."""
        given = grads.incoming | {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
        packed = self.packed(divided_backward_packed)
        if packed is not None:
            return [self._pack(divided_backward_packed, packed, given, 5, 7)]
        if self.shape_class.whole:
            given |= {"lse": None, "delta": None, "WHOLE": True}
            return [self._stream(divided_backward_keys, given, "block_n", 5, 7)]
        assert out is not None and lse is not None
        given |= self._outputs(out, cls, lse) | {"delta": new_workspace(lse, lse.shape), "WHOLE": False}
        return [
            self._stream(divided_backward_queries, given, "block_m", 3, 6),
            self._stream(divided_backward_keys, given | {"dq": None}, "block_n", 4, 6),
        ]

    def _outputs(self, out: Tensor, cls: Tensor | None, lse: Tensor | None) -> dict[str, Any]:
        return {"out": out, "out_batch": out.stride(0), "out_token": out.stride(1), "cls": cls, "lse": lse}

    def _pack(self, kernel: Any, config: Config, given: dict[str, Any], products: int, tensors: int) -> Launch:
        """Plan a kernel whose tiles hold whole sequences."""
        block = config.block_m
        grid = -(-self.num_groups // (block // self.length)) * self.heads
        work = Work(
            scores=grid * block * block,
            flops=grid * block * block * products * 2 * self.call.q.shape[-1],
            bytes=self._bytes(given, tensors),
        )
        return self._pick(kernel, grid, given | {"BLOCK": block}, config, work)

    def _stream(self, kernel: Any, given: dict[str, Any], own: str, products: int, tensors: int) -> Launch:
        """Plan a kernel whose programs own a tile of one sequence, ``own`` of the configuration, and go through all."""

        def plan(config: Config) -> Launch:
            rows, step = (config.block_m, config.block_n)[:: 1 if own == "block_m" else -1]
            full_tiles, tail = padded_length(self.length, self.has_cls, step)
            grid = self.num_groups * self.heads * -(-self.length // rows)
            scores = grid * rows * (full_tiles * step + tail)
            work = Work(
                steps=full_tiles,
                scores_per_step=rows * step,
                scores=scores,
                flops=scores * products * 2 * self.call.q.shape[-1],
                bytes=self._bytes(given, tensors),
            )
            tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TAIL": tail, "full_tiles": full_tiles}
            return self._pick(kernel, grid, given | tiles, config, work)

        return self._tuned(kernel, plan)

    def _tuned(self, kernel: Any, launch: Callable[[Config], Launch]) -> Launch:
        name, shape = kernel.__name__, self.shape_class
        candidates = partial(candidate_configs, name, shape)
        return launch(tuned(name, shape, default_config(name, shape), candidates, launch, self.call.q.device))

    def _bytes(self, given: dict[str, Any], tensors: int) -> int:
        """Bytes of ``tensors`` tensors like q, and of the float32 ones, as far as they belong to these heads."""
        q = self.call.q
        vectors = (given.get(name) for name in ("lse", "delta"))
        small = sum(x.numel() for x in vectors if x is not None)
        # Of each cls token one vector out of the forward pass, and one into and three out of the backward pass.
        vectors_of_cls = self.has_cls * self.num_groups * q.shape[2] * q.shape[3] * (1 if tensors == 4 else 4)
        return (tensors * q.numel() * q.itemsize + 4 * (small + vectors_of_cls)) * self.heads // q.shape[2]

    def _pick(self, kernel: Any, grid: int, given: dict[str, Any], config: Config, work: Work) -> Launch:
        call = self.call
        q, has_cls = call.q, call.has_cls
        arguments = given | {
            "q": q,
            "k": call.k,
            "v": call.v,
            "seed": call.seed,
            "places": self.places,
            "num_groups": self.num_groups,
            "place_step": self.place_step,
            "slot_step": self.slot_step,
            "first_head": self.first_head,
            "heads": self.heads,
            "all_heads": q.shape[2],
            "segment": 1 if self.mixing is None else self.mixing.segment,
            "SHIFTS": tuple(itertools.chain(*self.mixing.shifts)) or None if self.mixing is not None else None,
            "num_rows": call.rows + call.num_frames * has_cls,
            "scale": call.scale,
            "unit": abs(call.scale) or 1.0,
            "SIGN": (call.scale > 0) - (call.scale < 0),
            "threshold": math.ceil(call.dropout_p * 2**24),
            "kept": 1.0 / (1.0 - call.dropout_p),
            "LENGTH": self.length,
            "CLS": self.has_cls,
            "HEAD_DIM": q.shape[-1],
            "BLOCK_D": _block_d(q.shape[-1]),
            "HAS_DROPOUT": call.dropout_p > 0,
            "PRECISION": _precision(q),
        }
        for name, x in (("q", q), ("k", call.k), ("v", call.v)):
            arguments |= {f"{name}_batch": x.stride(0), f"{name}_token": x.stride(1), f"{name}_head": x.stride(2)}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return Launch(kernel, grid, {name: arguments[name] for name in kernel.arg_names}, options, work)


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _precision(x: Tensor) -> str:
    """How products of float32 are taken: as torch's own, by ``torch.set_float32_matmul_precision``."""
    if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
