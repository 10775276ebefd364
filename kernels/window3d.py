"""Launches 3D window attention: ``window3d_attention`` and, on grids of one window, ``window_attention``.

The functions take what the native ops ``_window3d_attention_forward / _backward`` take. A plan is a list of launches,
in order; it can be run, compiled for another GPU, or only looked at.

One program of the forward kernel attends with a tile of queries of one head in two windows of the same kind, which
share the tiles of what is added to their scores (see window3d_planes.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import triton
from torch import Tensor

from vidattn import geometry as geo
from vidattn.kernels import plans
from vidattn.kernels.configs import Config, architecture, tuned
from vidattn.kernels.launch import INTERPRETED, Computation, Launch, Step, Work, new_workspace
from vidattn.kernels.sums import plan_sum
from vidattn.kernels.window3d_backward import (
    window3d_backward_bias,
    window3d_backward_keys,
    window3d_backward_queries,
)
from vidattn.kernels.window3d_bias import window3d_fold_bias
from vidattn.kernels.window3d_configs import ShapeClass, candidate_configs, default_config, padded_length
from vidattn.kernels.window3d_forward import window3d_forward
from vidattn.kernels.window3d_planes import Planes, pitch_of, plan_planes
from vidattn.kernels.window3d_tables import BiasPositions, WindowTables, bias_positions, window_tables
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


def forward(*arguments: Any) -> None:
    """Run the forward pass; arguments as of :func:`plan_forward`, results in ``out`` and ``lse``."""
    plans.run(plan_forward, *arguments)


def backward(*arguments: Any) -> None:
    """Run the backward pass; arguments as of :func:`plan_backward`, results in ``dq`` to ``dpad``."""
    plans.run(plan_backward, *arguments)


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_window: Sequence[int],
    mask: Tensor | None,
    pad_qkv: Tensor | None,
    seed: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    wrap: Sequence[bool],
    scale: float,
    mask_value: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    *,
    arch: str | None = None,
) -> list[Step]:
    """Plan the forward pass.

    Args:
        q: (B, D, H, W, h, d), last dimension dense; so are ``k`` and ``v``.
        k: like ``q``.
        v: like ``q``.
        bias: table (rows, h) if ``bias_window`` is not empty, else dense (h, N, N); None without.
        bias_window: configured window and the extents that unravel a token number.
        mask: (nW, N, N), added to window g as ``mask[g % nW]``; None without.
        pad_qkv: (3, h, d) contiguous, what padding holds; None for zeros.
        seed: int64 (1,), needed when ``dropout_p > 0``.
        window: effective window.
        shift: effective shift.
        wrap: cyclic axes.
        scale: factor of q k^T.
        mask_value: added between regions.
        dropout_p: dropout probability.
        out: (B, D, H, W, h * d), contiguous.
        lse: (B, D, H, W, h) float32, contiguous.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    call = _Call(
        q, k, v, bias, bias_window, mask, pad_qkv, seed, window, shift, wrap, scale, mask_value, dropout_p, arch
    )
    planes = call.planes()

    def plan(config: Config) -> Launch:
        return call.queries(window3d_forward, config, planes, 2, out=out, lse=lse)

    return [*planes.launches, call.tuned(window3d_forward, plan)]


def plan_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_window: Sequence[int],
    mask: Tensor | None,
    pad_qkv: Tensor | None,
    seed: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    wrap: Sequence[bool],
    scale: float,
    mask_value: float,
    dropout_p: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dpad: Tensor | None,
    *,
    arch: str | None = None,
) -> list[Step]:
    """Plan the backward pass.

    Args:
        dout: like ``out``, any strides.
        q: as in :func:`plan_forward`, and so are all arguments up to ``dropout_p``.
        k: like ``q``.
        v: like ``q``.
        bias: table or dense bias.
        bias_window: how a table is laid out.
        mask: masks of the caller.
        pad_qkv: what padding holds.
        seed: key of the dropout mask.
        out: context of the forward pass, contiguous; it and ``lse`` may be None where rows are seen whole.
        lse: its log-sum-exp, contiguous.
        window: effective window.
        shift: effective shift.
        wrap: cyclic axes.
        scale: factor of q k^T.
        mask_value: added between regions.
        dropout_p: dropout probability.
        dq: (B, D, H, W, h, d), dense but for one stride from token to token, batch elements too, which all three share.
        dk: like ``dq``.
        dv: like ``dq``.
        dbias: float32, like ``bias``; None if not needed.
        dpad: float32 (3, h, d); None if not needed.
        arch: architecture to plan for; that of the device when None.

    Returns:
        The launches.
    """
    call = _Call(
        q, k, v, bias, bias_window, mask, pad_qkv, seed, window, shift, wrap, scale, mask_value, dropout_p, arch
    )
    planes = call.planes()
    given: dict[str, Any] = {"dout": dout.contiguous(), "grad_token": dq.stride(0) // call.num_grid_tokens}
    launches: list[Step] = [*planes.launches]
    if call.shape_class.whole:
        given |= {"lse": None, "delta": None}
    else:
        assert out is not None and lse is not None
        given |= {"lse": lse.contiguous(), "delta": new_workspace(lse, lse.shape)}
        found = {"out": out.contiguous(), "dq": dq}
        launches.append(
            call.tuned(
                window3d_backward_queries,
                lambda config: call.queries(window3d_backward_queries, config, planes, 3, **found, **given),
            )
        )
    launches += call.keys(planes, given, dq, dk, dv, dpad)
    if dbias is not None:
        launches += call.bias_gradient(planes, given, dbias)
    return launches


@dataclass(frozen=True)
class _Call:
    """One call: its inputs as the kernels take them, its geometry, and the launches that need nothing else."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    bias_window: Sequence[int]
    mask: Tensor | None
    pad_qkv: Tensor | None
    seed: Tensor | None
    window: Sequence[int]
    shift: Sequence[int]
    wrap: Sequence[bool]
    scale: float
    mask_value: float
    dropout_p: float
    arch: str | None = None

    @cached_property
    def geometry(self) -> geo.WindowGeometry:
        """Geometry of the grid; resolving an effective window and shift again changes nothing."""
        wrap = tuple(bool(cyclic) for cyclic in self.wrap)
        return geo.resolve_windows(tuple(self.q.shape[1:4]), tuple(self.window), tuple(self.shift), wrap)

    @cached_property
    def tables(self) -> WindowTables:
        """Tables of the grid and batch."""
        num_masks = 0 if self.mask is None else self.mask.shape[0]
        return window_tables(self.geometry, self.q.shape[0], num_masks, self.q.device)

    @cached_property
    def positions(self) -> BiasPositions | None:
        """Positions of the tokens in the bias table."""
        if self.bias is None or not self.bias_window:
            return None
        depth, height, width, *extents = self.bias_window
        return bias_positions((depth, height, width), (extents[0], extents[1]), self.num_tokens, self.q.device)

    @property
    def num_tokens(self) -> int:
        """Tokens of a window."""
        return self.geometry.num_tokens

    @property
    def num_grid_tokens(self) -> int:
        """Tokens of a batch element, without padding."""
        return math.prod(self.geometry.grid)

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.q.shape[-2]

    @property
    def num_groups(self) -> int:
        """Windows of the whole batch."""
        return self.q.shape[0] * self.geometry.num_windows

    @cached_property
    def shape_class(self) -> ShapeClass:
        """What the choice of a configuration depends on."""
        arch = self.arch or architecture(self.q.device)
        return ShapeClass(
            arch=arch,
            itemsize=self.q.itemsize,
            tensor_cores=self.q.dtype != torch.float32 or _precision(self.q) != "ieee",
            block_d=_block_d(self.q.shape[-1]),
            num_tokens=self.num_tokens,
            lean=not self.tables.has_padding and self.dropout_p == 0,
            whole=not keeps_lse(self.num_tokens, "triton"),
        )

    def planes(self) -> Planes:
        """What is added to the scores."""
        return plan_planes(self.bias, self.positions, self.mask, self.tables, self.num_tokens, self.mask_value)

    def tuned(self, kernel: Any, launch: Callable[[Config], Launch]) -> Launch:
        """Plan a launch with the configuration of its shape class."""
        default = default_config(kernel.__name__, self.shape_class)
        programs = self.num_groups * self.heads * -(-self.num_tokens // default.block_m)
        if programs < _FEW_PROGRAMS and not INTERPRETED:
            default = default._replace(windows=1)
        candidates = partial(candidate_configs, kernel.__name__, self.shape_class)
        return launch(tuned(kernel.__name__, self.shape_class, default, candidates, launch, self.q.device))

    def queries(self, kernel: Any, config: Config, planes: Planes, products: int, **more: Any) -> Launch:
        """Plan a kernel whose programs own a tile of queries and go over the keys: forward, or dq."""
        groups, kinds = self.tables.groups(config.windows)
        arguments = self._arguments(planes) | self._hiding(planes, config.block_m, config.block_n) | more
        arguments |= {"groups": groups, "kinds": kinds, **_tiles(config, self.num_tokens, config.block_n)}
        grid = kinds.shape[0] * self.heads * -(-self.num_tokens // config.block_m)
        return self._launch(kernel, grid, arguments, config, config.block_n, products)

    def keys(
        self,
        planes: Planes,
        given: dict[str, Any],
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dpad: Tensor | None,
    ) -> list[Step]:
        """Plan dk and dv, whose programs own a tile of keys, and the gradient of the padding's values.

        Programs whose tile is all keys find dq as well.
        """
        kernel, whole = window3d_backward_keys, self.shape_class.whole
        needs_pad = dpad is not None and self.tables.has_padding
        parts: list[Tensor] = []

        def plan(config: Config) -> Launch:
            tiles = -(-self.num_tokens // config.block_n)
            arguments = self._arguments(planes) | self._hiding(planes, config.block_n, config.block_m) | given
            pad_parts = None
            if needs_pad:
                size = (self.num_groups * tiles, 2, self.heads, self.q.shape[-1])
                pad_parts = new_workspace(self.q, size)
                parts[:] = [pad_parts]
            arguments |= {
                "dq": dq if whole else None,
                "dk": dk,
                "dv": dv,
                "WHOLE": whole,
                "pad_parts": pad_parts,
                "NEEDS_PAD": needs_pad,
                "windows": self.tables.windows,
                "kinds": self.tables.kinds,
                **_tiles(config, self.num_tokens, config.block_m),
            }
            grid, products = self.num_groups * self.heads * tiles, 5 if whole else 4
            return self._launch(kernel, grid, arguments, config, config.block_m, products)

        launches: list[Step] = [self.tuned(kernel, plan)]
        if dpad is not None:
            # Padding queries have no output.
            launches.append(Computation(Tensor.zero_, (dpad[0] if needs_pad else dpad,)))
            if needs_pad:
                size = dpad[1:].numel()
                launches.append(plan_sum(parts[0], dpad[1:], 1, size, size))
        return launches

    def bias_gradient(self, planes: Planes, given: dict[str, Any], dbias: Tensor) -> list[Step]:
        """Plan the gradient of the bias: shares of the windows apart, then their sum, folded into the table."""
        kernel = window3d_backward_bias
        count, pitch = self.num_tokens, pitch_of(self.num_tokens)
        parts: list[Tensor] = []

        def plan(config: Config) -> Launch:
            tiles = self.heads * -(-count // config.block_m) * -(-count // config.block_n)
            shares = min(self.num_groups, -(-_BIAS_PROGRAMS // tiles))
            share = -(-self.num_groups // shares)
            shares = -(-self.num_groups // share)
            parts[:] = [new_workspace(self.q, (shares, self.heads, count, pitch))]
            arguments = self._arguments(planes) | given
            arguments |= {
                "parts": parts[0],
                "windows": self.tables.windows,
                "kind_starts": self.tables.kind_starts,
                "num_kinds": self.tables.num_kinds,
                "ONE_KIND": self.tables.num_kinds == 1,
                "num_ranks": self.num_groups,
                "share": share,
                "WHOLE": self.shape_class.whole,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
            }
            scores = self.num_groups * tiles * config.block_m * config.block_n
            work = Work(
                steps=share,
                scores_per_step=config.block_m * config.block_n,
                scores=scores,
                flops=scores * 2 * 2 * self.q.shape[-1],
                bytes=4 * self._tensor_bytes() + 4 * parts[0].numel(),
            )
            return self._pick(kernel, tiles * shares, arguments, config, work)

        launches: list[Step] = [self.tuned(kernel, plan)]
        if self.positions is None:
            return [*launches, plan_sum(parts[0], dbias, self.heads * count, count, pitch)]
        block_r, block_m = _FOLD_BLOCK
        fold = {
            "parts": parts[0],
            "positions": self.positions.positions,
            "tokens_at": self.positions.tokens_at,
            "grad_table": dbias,
            "heads": self.heads,
            "num_rows": dbias.shape[0],
            "num_parts": parts[0].shape[0],
            "num_positions": self.positions.tokens_at.shape[0],
            "origin": self.positions.origin,
            "NUM_TOKENS": count,
            "BLOCK_R": block_r,
            "BLOCK_M": block_m,
        }
        work = Work(bytes=4 * (parts[0].numel() + dbias.numel()))
        return [*launches, Launch(window3d_fold_bias, -(-dbias.shape[0] // block_r) * self.heads, fold, work=work)]

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, copied where their grids cannot be counted through with one stride."""
        return tuple(x if _token_stride(x) else x.contiguous() for x in (self.q, self.k, self.v))  # type: ignore[return-value]

    def _arguments(self, planes: Planes) -> dict[str, Any]:
        q, k, v = self._inputs
        arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "pad_qkv": q if self.pad_qkv is None else self.pad_qkv,
            "bias": planes.bias,
            "bias_kind": planes.bias_kind,
            "bias_head": planes.bias_head,
            "mask": planes.mask,
            "seed": self.seed,
            "tokens": self.tables.tokens,
            "heads": self.heads,
            "num_windows": self.geometry.num_windows,
            "grid_tokens": self.num_grid_tokens,
            "scale": self.scale,
            "mask_value": self.mask_value,
            "threshold": math.ceil(self.dropout_p * 2**24),
            "kept": 1.0 / (1.0 - self.dropout_p),
            "NUM_TOKENS": self.num_tokens,
            "HEAD_DIM": q.shape[-1],
            "BLOCK_D": _block_d(q.shape[-1]),
            "HAS_BIAS": planes.bias is not None,
            "HAS_MASK": planes.mask is not None,
            "HAS_PADDING": self.tables.has_padding,
            "HAS_PAD": self.tables.has_padding and self.pad_qkv is not None,
            "HAS_DROPOUT": self.dropout_p > 0,
            "PRECISION": _precision(q),
        }
        for name, x in (("q", q), ("k", k), ("v", v)):
            arguments |= {f"{name}_batch": x.stride(0), f"{name}_token": _token_stride(x), f"{name}_head": x.stride(-2)}
        return arguments

    def _hiding(self, planes: Planes, rows: int, columns: int) -> dict[str, Any]:
        """Which tiles of ``columns`` tokens a tile of ``rows`` tokens may leave out: HIDES 1 surely, 2 if proven."""
        visible, steps = self.tables.visible(rows, columns)
        if self.mask_value > _DEEP_MASK:
            visible, steps = None, self.num_tokens // columns
        hides = 0 if visible is None else 1 if self.mask_value == -math.inf else 2
        return {"visible": visible, "HIDES": hides, "bias_max": planes.bias_max if hides == 2 else None, "steps": steps}

    def _tensor_bytes(self) -> int:
        return self.q.numel() * self.q.itemsize

    def _launch(
        self, kernel: Any, grid: int, arguments: dict[str, Any], config: Config, step: int, products: int
    ) -> Launch:
        """Plan a kernel whose main loop goes over tiles of ``step`` tokens."""
        rows = config.block_m if step == config.block_n else config.block_n
        windows = config.windows if "groups" in arguments else 1
        scores = round(grid * windows * rows * (arguments["steps"] * step + arguments["TAIL"]))
        # q, k, v, and per kernel: out; or dout, out, dq; or dout, dk, dv; or these and dq.
        tensors = {2: 4, 5: 7}.get(products, 6)
        added = sum(arguments[name].numel() for name in ("bias", "mask") if arguments[name] is not None)
        work = Work(
            steps=arguments["steps"],
            scores_per_step=windows * rows * step,
            scores=scores,
            flops=scores * products * 2 * self.q.shape[-1],
            bytes=tensors * self._tensor_bytes() + 4 * (self.q.numel() // self.q.shape[-1] + added),
        )
        return self._pick(kernel, grid, arguments | {"WINDOWS": windows}, config, work)

    def _pick(self, kernel: Any, grid: int, arguments: dict[str, Any], config: Config, work: Work) -> Launch:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return Launch(kernel, grid, {name: arguments[name] for name in kernel.arg_names}, options, work)


def _tiles(config: Config, num_tokens: int, step: int) -> dict[str, int]:
    """Cut ``num_tokens`` into full tiles of ``step`` and a shorter tail."""
    full, tail = padded_length(num_tokens, step)
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TAIL": tail, "full_tiles": full}


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


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


def _precision(x: Tensor) -> str:
    """How products of float32 are taken: as torch's own, by ``torch.set_float32_matmul_precision``."""
    if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
