"""Launches 3D window attention: ``window3d_attention`` and, on grids of one window, ``window_attention``.

A plan is a list of launches, in order; it can be run, compiled for another GPU, or only looked at. All that a plan
needs to be computed is in its launches: planning itself reads no values.

One program of the forward kernel attends with a tile of queries of one head in two windows of the same kind, which
share the tiles of what is added to their scores (see window3d_planes.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidattn import geometry as geo
from vidattn.calls import WindowCall
from vidattn.kernels import plans
from vidattn.kernels.configs import Config, architecture, padded_head_dim, product_precision, tuned
from vidattn.kernels.launch import INTERPRETED, Launch, Work, new_workspace
from vidattn.kernels.rows import Rows
from vidattn.kernels.softmax import dropout_of
from vidattn.kernels.sums import plan_sum, plan_zeros
from vidattn.kernels.window3d_backward import (
    Gradients,
    window3d_backward_bias,
    window3d_backward_keys,
    window3d_backward_queries,
)
from vidattn.kernels.window3d_bias import window3d_fold_bias
from vidattn.kernels.window3d_configs import ShapeClass, candidate_configs, default_config, padded_length
from vidattn.kernels.window3d_forward import window3d_forward
from vidattn.kernels.window3d_planes import PlannedPlanes, pitch_of, plan_planes
from vidattn.kernels.window3d_tables import BiasPositions, WindowTables, bias_positions, window_tables
from vidattn.kernels.window3d_tiles import Hiding, Kept, Windows
from vidattn.ops._tensors import keeps_lse

__all__ = ["backward", "forward", "plan_backward", "plan_forward"]

# Hidden tiles are left out only under masks so deep that ordinary scores cannot make up for them.
_DEEP_MASK = -80.0
# Programs of the bias gradient to aim at: enough for any GPU. It fixes the shares of the windows that are summed apart,
# by shapes alone, so that every GPU adds in the same order.
_BIAS_PROGRAMS = 8 if INTERPRETED else 1024
_FOLD_BLOCK = (16, 32)
# With fewer programs than this a window has a program of its own: filling the GPU is worth more than sharing tiles.
_FEW_PROGRAMS = 1024


# ---- Launch functions and plans ----


def forward(call: WindowCall, out: Tensor, lse: Tensor) -> None:
    """Run the forward pass; arguments as of ``plan_forward``, results in ``out`` and ``lse``."""
    plans.run(plan_forward, call, out, lse)


def backward(
    call: WindowCall,
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dpad: Tensor | None,
) -> None:
    """Run the backward pass; arguments as of ``plan_backward``, results in ``dq`` to ``dpad``."""
    plans.run(plan_backward, call, dout, out, lse, dq, dk, dv, dbias, dpad)


def plan_forward(call: WindowCall, out: Tensor, lse: Tensor, *, arch: str | None = None) -> list[Launch]:
    """Plan the forward pass.

    Args:
        call: inputs and options.
        out: (B, D, H, W, h * d), contiguous.
        lse: (B, D, H, W, h) float32, contiguous.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    problem = _describe(_addressable(call), arch)
    plan = partial(_plan_queries, window3d_forward, problem, {"out": out, "lse": lse}, _FORWARD)
    return [*problem.planned.launches, _tuned(window3d_forward, problem, plan)]


def plan_backward(
    call: WindowCall,
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dpad: Tensor | None,
    *,
    arch: str | None = None,
) -> list[Launch]:
    """Plan the backward pass.

    Args:
        call: inputs and options.
        dout: like ``out``, any strides.
        out: context of the forward pass; it and ``lse`` may be None where rows are seen whole.
        lse: its log-sum-exp.
        dq: (B, D, H, W, h, d), dense but for one stride from token to token, batch elements too, which all three share.
        dk: like ``dq``.
        dv: like ``dq``.
        dbias: float32, like the bias, contiguous; None if not needed.
        dpad: float32 (3, h, d), contiguous; None if not needed.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    dout = dout.contiguous()
    out, lse = (None if x is None else x.contiguous() for x in (out, lse))
    problem = _describe(_addressable(call), arch)
    token = dq.stride(0) // problem.grid_tokens
    launches, kept = [*problem.planned.launches], None
    if not problem.shape.whole:
        assert out is not None and lse is not None
        kept = Kept(lse, new_workspace(lse, lse.shape))
        given = {"out": out, "dout": dout, "kept": kept, "gradients": Gradients(dq, None, None, token)}
        plan = partial(_plan_queries, window3d_backward_queries, problem, given, _QUERIES)
        launches.append(_tuned(window3d_backward_queries, problem, plan))

    gradients = Gradients(dq if problem.shape.whole else None, dk, dv, token)
    needs_pad = dpad is not None and problem.tables.has_padding
    plan_keys = partial(_plan_keys, problem, {"dout": dout, "kept": kept, "gradients": gradients}, needs_pad)
    keys = _tuned(window3d_backward_keys, problem, plan_keys)
    launches.append(keys)
    if dpad is not None and needs_pad:
        size = dpad[1:].numel()
        launches.append(plan_zeros(dpad[0]))  # padding queries have no output
        launches.append(plan_sum(keys.arguments["pad_parts"], dpad[1:], 1, size, size))
    elif dpad is not None:
        launches.append(plan_zeros(dpad))

    if dbias is not None:
        plan_bias = partial(_plan_bias, problem, {"dout": dout, "kept": kept})
        shares = _tuned(window3d_backward_bias, problem, plan_bias)
        launches += [shares, _plan_bias_sum(problem, shares.arguments["parts"], dbias)]
    return launches


# ---- What the launches of a call share ----


@dataclass(frozen=True)
class _Problem:
    """A call and what its shapes say.

    Attributes:
        call: the call, as ``_addressable`` gives it.
        tables: tables of the grid and batch.
        positions: positions of the tokens in the bias table; None without a table.
        planned: what is added to the scores.
        shape: what the choice of a configuration depends on.
        num_windows: windows of a batch element.
    """

    call: WindowCall
    tables: WindowTables
    positions: BiasPositions | None
    planned: PlannedPlanes
    shape: ShapeClass
    num_windows: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a window."""
        return self.shape.num_tokens

    @property
    def grid_tokens(self) -> int:
        """Tokens of a batch element, without padding."""
        return math.prod(self.call.q.shape[1:4])

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.call.q.shape[-2]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.call.q.shape[-1]

    @property
    def num_groups(self) -> int:
        """Windows of the whole batch."""
        return self.call.q.shape[0] * self.num_windows


def _addressable(call: WindowCall) -> WindowCall:
    """Copy what the kernels cannot address: grids that take more than one stride to count through, strided biases."""
    assert call.k is not None and call.v is not None  # native ops alone take packed tensors
    q, k, v = (x if _token_stride(x) else x.contiguous() for x in (call.q, call.k, call.v))
    bias, mask = (None if x is None else x.contiguous() for x in (call.bias, call.mask))
    return call._replace(q=q, k=k, v=v, bias=bias, mask=mask)


def _describe(call: WindowCall, arch: str | None) -> _Problem:
    device = call.q.device
    wrap = tuple(bool(cyclic) for cyclic in call.wrap)
    # The window and shift are effective ones.
    geometry = geo.resolve_windows(tuple(call.q.shape[1:4]), tuple(call.window), tuple(call.shift), wrap, clip=False)
    tables = window_tables(geometry, call.q.shape[0], 0 if call.mask is None else call.mask.shape[0], device)
    positions = None
    if call.bias is not None and call.bias_window:
        depth, height, width, *extents = call.bias_window
        positions = bias_positions((depth, height, width), (extents[0], extents[1]), geometry.num_tokens, device)
    shape = ShapeClass(
        arch=arch or architecture(device),
        itemsize=call.q.itemsize,
        tensor_cores=call.q.dtype != torch.float32 or product_precision(call.q) != "ieee",
        block_d=padded_head_dim(call.q),
        num_tokens=geometry.num_tokens,
        lean=not tables.has_padding and call.dropout_p == 0,
        whole=not keeps_lse(geometry.num_tokens, "triton"),
    )
    planned = plan_planes(call, tables, positions)
    return _Problem(call, tables, positions, planned, shape, geometry.num_windows)


def _token_stride(x: Tensor) -> int:
    """Stride from one token of a grid (B, D, H, W, h, d) to the next; 0 if it takes more than one."""
    stride = expected = 0
    for size, step in zip(reversed(x.shape[1:4]), reversed(x.stride()[1:4]), strict=True):
        if size == 1:
            continue
        if stride == 0:
            stride = expected = step
        if step == 0 or step != expected:
            return 0
        expected *= size
    return stride or x.shape[-2] * x.shape[-1]  # one token: any stride will do


# ---- Arguments ----


def _shared_arguments(problem: _Problem) -> dict[str, Any]:
    """Arguments that all attending kernels take, the same for all of a call."""
    call = problem.call
    qkv: Any = (call.q, call.k, call.v)  # three tensors
    rows = {name: Rows(x, x.stride(0), _token_stride(x), x.stride(-2)) for name, x in zip("qkv", qkv)}
    return {
        **rows,
        "pad_qkv": call.pad_qkv if problem.tables.has_padding else None,
        "planes": problem.planned.planes,
        "dropout": dropout_of(call.seed, call.dropout_p),
        "heads": problem.heads,
        "num_windows": problem.num_windows,
        "grid_tokens": problem.grid_tokens,
        "scale": call.scale,
        "NUM_TOKENS": problem.num_tokens,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_D": problem.shape.block_d,
        "HAS_PADDING": problem.tables.has_padding,
        "PRECISION": product_precision(call.q),
    }


def _hiding(problem: _Problem, rows: int, step: int) -> tuple[Hiding, float]:
    """Which tiles of ``step`` tokens a tile of ``rows`` tokens may leave out, and how many it sees on average."""
    mask_value = problem.call.mask_value
    visible, steps = problem.tables.visible(rows, step)
    if visible is None or mask_value > _DEEP_MASK:
        return Hiding(None, None, None), problem.num_tokens // step
    if mask_value == -math.inf:  # needs no proof
        return Hiding(visible, None, None), steps
    return Hiding(visible, mask_value, problem.planned.bias_max), steps


# ---- Launches ----


def _plan_queries(kernel: Any, problem: _Problem, given: dict[str, Any], cost: _Cost, config: Config) -> Launch:
    """Plan a kernel whose programs own a tile of queries and go over the keys: forward, or dq."""
    if problem.call.window_types is not None:  # windows of different types share no tiles
        config = config._replace(windows=1)
    groups, kinds = problem.tables.groups(config.windows)
    hiding, steps = _hiding(problem, config.block_m, config.block_n)
    full, tail = padded_length(problem.num_tokens, config.block_n)
    arguments = {
        **_shared_arguments(problem),
        **given,
        "hiding": hiding,
        "windows": Windows(problem.tables.tokens, groups, kinds),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TAIL": tail,
        "WINDOWS": config.windows,
    }
    if kernel is window3d_forward:
        arguments["full_tiles"] = full
    grid = kinds.shape[0] * problem.heads * -(-problem.num_tokens // config.block_m)
    rows = config.windows * config.block_m
    work = _looped_work(problem, cost, grid, rows, config.block_n, steps, tail)
    return _launch(kernel, grid, arguments, config, work)


def _plan_keys(problem: _Problem, given: dict[str, Any], needs_pad: bool, config: Config) -> Launch:
    """Plan dk and dv, whose programs own a tile of keys and go over the queries, and their share of padding keys.

    Programs whose tile is all keys find dq as well.
    """
    tables, tiles = problem.tables, -(-problem.num_tokens // config.block_n)
    hiding, steps = _hiding(problem, config.block_n, config.block_m)
    _, tail = padded_length(problem.num_tokens, config.block_m)
    pad_parts = None
    if needs_pad:
        pad_parts = new_workspace(problem.call.q, (problem.num_groups * tiles, 2, problem.heads, problem.head_dim))
    arguments = {
        **_shared_arguments(problem),
        **given,
        "hiding": hiding,
        "pad_parts": pad_parts,
        "windows": Windows(tables.tokens, tables.windows, tables.kinds),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TAIL": tail,
    }
    grid = problem.num_groups * problem.heads * tiles
    cost = _KEYS_AND_QUERIES if problem.shape.whole else _KEYS
    work = _looped_work(problem, cost, grid, config.block_n, config.block_m, steps, tail)
    return _launch(window3d_backward_keys, grid, arguments, config, work)


def _plan_bias(problem: _Problem, given: dict[str, Any], config: Config) -> Launch:
    """Plan the gradient of the dense bias, in parts (shares of the windows, h, N, pitch)."""
    tables, count = problem.tables, problem.num_tokens
    tiles = problem.heads * -(-count // config.block_m) * -(-count // config.block_n)
    types = 1 if problem.call.window_types is None else problem.call.bias.shape[0]  # type: ignore[union-attr]
    shares = min(problem.num_groups, -(-_BIAS_PROGRAMS // (tiles * types)))
    share = -(-problem.num_groups // shares)
    shares = -(-problem.num_groups // share)
    parts = new_workspace(problem.call.q, (shares, types * problem.heads, count, pitch_of(count)))
    arguments = {
        **_shared_arguments(problem),
        **given,
        "parts": parts,
        "windows": Windows(tables.tokens, tables.windows, tables.kinds),
        "kind_starts": tables.kind_starts,
        "num_kinds": tables.num_kinds,
        "share": share,
        "ONE_KIND": tables.num_kinds == 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    scores = problem.num_groups * tiles * config.block_m * config.block_n
    work = Work(
        steps=share,
        scores_per_step=config.block_m * config.block_n,
        scores=scores,
        flops=scores * 2 * 2 * problem.head_dim,
        bytes=4 * _tensor_bytes(problem) + 4 * parts.numel(),
    )
    return _launch(window3d_backward_bias, tiles * types * shares, arguments, config, work)


def _plan_bias_sum(problem: _Problem, parts: Tensor, dbias: Tensor) -> Launch:
    """Plan the sum of the parts of the bias gradient, folded into the table if there is one."""
    count, positions = problem.num_tokens, problem.positions
    if positions is None:
        return plan_sum(parts, dbias, parts.shape[1] * count, count, pitch_of(count))
    block_r, block_m = _FOLD_BLOCK
    arguments = {
        "parts": parts,
        "positions": positions.positions,
        "tokens_at": positions.tokens_at,
        "grad_table": dbias,
        "heads": problem.heads,
        "num_rows": dbias.shape[0],
        "num_parts": parts.shape[0],
        "num_positions": positions.tokens_at.shape[0],
        "origin": positions.origin,
        "NUM_TOKENS": count,
        "BLOCK_R": block_r,
        "BLOCK_M": block_m,
    }
    work = Work(bytes=4 * (parts.numel() + dbias.numel()))
    return Launch(window3d_fold_bias, -(-dbias.shape[0] // block_r) * problem.heads, arguments, work=work)


def _launch(kernel: Any, grid: int, arguments: dict[str, Any], config: Config, work: Work) -> Launch:
    return Launch(kernel, grid, arguments, {"num_warps": config.num_warps, "num_stages": config.num_stages}, work)


# ---- Tuning ----


def _tuned(kernel: Any, problem: _Problem, plan: Callable[[Config], Launch]) -> Launch:
    """Plan a launch with the configuration of its shape class."""
    name, shape = kernel.__name__, problem.shape
    default = default_config(name, shape)
    programs = problem.num_groups * problem.heads * -(-problem.num_tokens // default.block_m)
    if programs < _FEW_PROGRAMS and not INTERPRETED:
        default = default._replace(windows=1)
    candidates = partial(candidate_configs, name, shape)
    return plan(tuned(name, shape, default, candidates, plan, problem.call.q.device))


# ---- Cost ----


class _Cost(NamedTuple):
    """What a kernel does at least.

    Attributes:
        products: matrix products of each tile of scores.
        tensors: tensors of the size of q that it reads or writes.
    """

    products: int
    tensors: int


_FORWARD = _Cost(products=2, tensors=4)  # q, k, v; out
_QUERIES = _Cost(products=3, tensors=6)  # q, k, v, dout, out; dq
_KEYS = _Cost(products=4, tensors=6)  # q, k, v, dout; dk, dv
_KEYS_AND_QUERIES = _Cost(products=5, tensors=7)  # and dq


def _looped_work(problem: _Problem, cost: _Cost, grid: int, rows: int, step: int, steps: float, tail: int) -> Work:
    """Count what programs do that own ``rows`` rows of scores and go over tiles of ``step`` tokens, and the tail."""
    scores = round(grid * rows * (steps * step + tail))
    row_numbers = problem.call.q.numel() // problem.head_dim  # log-sum-exps
    return Work(
        steps=steps,
        scores_per_step=rows * step,
        scores=scores,
        flops=scores * cost.products * 2 * problem.head_dim,
        bytes=cost.tensors * _tensor_bytes(problem) + 4 * (row_numbers + problem.planned.size),
    )


def _tensor_bytes(problem: _Problem) -> int:
    return problem.call.q.numel() * problem.call.q.itemsize
