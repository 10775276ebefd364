"""Cases of window attention: inputs, the three evaluations of each, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from attention_cases import (
    BACKENDS_THAT_LEARN_A_DENSE_BIAS,
    device_of,
    evaluate,
    has_dense_bias,
    on_cpu,
    seed_of,
    seeds_from_the_host,
    separated,
    to,
)
from tolerance import assert_all_close
from torch import Tensor

import vidattn
from vidattn import reference
from vidattn.backends import TRITON_INTERPRETED
from vidattn.geometry import WindowGeometry, num_bias_rows, resolve_windows
from vidattn.ops._tensors import keeps_lse

# Triton's interpreter takes a thousand times as long, so it gets fewer and shorter windows.
SHORT_WINDOWS = (1, 7, 15, 16, 17, 33, 64, 65) if TRITON_INTERPRETED else range(1, 68)


@dataclass(frozen=True)
class Case:
    """A call of ``window3d_attention``."""

    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    shift: tuple[int, int, int] = (0, 0, 0)
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    bias_index: str | None = "prefix"
    pad: bool = True
    wrap: tuple[bool, bool, bool] = (False, False, False)
    mask_value: float = -100.0
    scale: float | None = None
    dropout_p: float = 0.0
    spread: float = 1.0  # of q and k
    table_spread: float = 1.0
    table_rows: int = 0  # of a table whose rows a tensor chooses; 0 for the usual table
    types: int = 0  # of windows; 0 where there is one table
    clip_window: bool = True
    padding: tuple[tuple[int, int], ...] | None = None
    padding_order: str = "before_shift"
    regions: int = 0  # numbers of regions that the call draws; 0 for those of the shift

    def __str__(self) -> str:
        parts = ["x".join(map(str, part)) for part in (self.grid, self.window, self.shift)]
        return f"{parts[0]}-w{parts[1]}-s{parts[2]}-h{self.heads}d{self.head_dim}-{self.bias_index}"

    def inputs(self, dtype: torch.dtype, table_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Random tensors, rounded to the dtype."""
        generator = torch.Generator().manual_seed(hash(self.grid + self.window) % 1000)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        qkv = draw(self.batch, *self.grid, 3, self.heads, self.head_dim)
        qkv[..., :2, :, :] *= self.spread
        made = {"qkv": qkv.to(dtype)}
        if self.bias_index is not None:
            rows = self.table_rows or num_bias_rows(self.window)
            table = self.table_spread * draw(*((self.types,) if self.types else ()), rows, self.heads)
            made["bias_table"] = table.to(table_dtype or dtype)
        if self.pad:
            made["pad_qkv"] = draw(3, self.heads, self.head_dim).to(dtype)
        made["grad_out"] = draw(self.batch, *self.grid, self.heads * self.head_dim).to(dtype)
        return made

    def options(self) -> dict[str, Any]:
        """Arguments besides the tensors."""
        return {
            "window_size": self.window,
            "shift_size": self.shift,
            "bias_index": self.bias_index or "prefix",
            "mask_value": self.mask_value,
            "wrap": self.wrap,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            **self.special_options(),
        }

    @property
    def geometry(self) -> WindowGeometry:
        """The effective windows."""
        return resolve_windows(
            self.grid,
            self.window,
            self.shift,
            self.wrap,
            clip=self.clip_window,
            padding=self.padding,
            shift_first=self.padding_order == "after_shift",
        )

    def special_options(self) -> dict[str, Any]:
        """Those of few models, with numbers drawn at random."""
        generator = torch.Generator().manual_seed(hash(self.grid + self.window) % 1000)
        windows, made = self.geometry, {}
        if self.table_rows:
            shape = (windows.num_tokens, windows.num_tokens)
            made["bias_index"] = torch.randint(self.table_rows, shape, generator=generator)
        if self.types:
            types = torch.randint(self.types, (windows.num_windows,), generator=generator, dtype=torch.int32)
            made["window_types"] = types
        if self.regions:
            made["regions"] = torch.randint(self.regions, windows.padded, generator=generator)
        if not self.clip_window:
            made["clip_window"] = False  # type: ignore[assignment]
        if self.padding is not None or self.padding_order != "before_shift":
            made |= {"padding": self.padding, "padding_order": self.padding_order}  # type: ignore[dict-item]
        return made

    def has_whole_rows(self, backend: str) -> bool:
        """Whether a backend's backward pass sees the rows of its scores as a whole."""
        return not keeps_lse(self.geometry.num_tokens, backend)


def expected_and_exact(
    inputs: dict[str, Tensor], options: dict[str, Any], seed: int = 1
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Evaluate the reference backend in the dtype of the inputs, and autograd through the reference in float64.

    A gradient that autograd does not connect (``pad_qkv`` where nothing is padded) is zero.
    """
    torch.manual_seed(seed)
    expected = evaluate(vidattn.window3d_attention, inputs, dict(options, backend="reference"))
    wide = to(inputs, torch.float64)
    exact = evaluate(reference.window3d_attention, wide, dict(options, seed=seed_of(seed)))
    return expected, {name: torch.zeros_like(wide[name]) if x is None else x for name, x in exact.items()}


def check(
    case: Case, dtype: torch.dtype, backend: str, *, table_dtype: torch.dtype | None = None, separate: bool = False
) -> None:
    """Compare a backend with the reference on a case, forward and backward."""
    inputs, options = case.inputs(dtype, table_dtype), case.options()
    expected, exact = expected_and_exact(inputs, options)
    device = device_of(backend)
    attend = separated(vidattn.window3d_attention) if separate else vidattn.window3d_attention
    torch.manual_seed(1)
    with seeds_from_the_host():
        actual = evaluate(attend, to(inputs, device), dict(options_on(device, options), backend=backend))
    if backend not in BACKENDS_THAT_LEARN_A_DENSE_BIAS and has_dense_bias(options):
        expected, exact = (
            {name: x for name, x in found.items() if name != "bias_table"} for found in (expected, exact)
        )
    assert actual["out"] is not None and actual["out"].is_contiguous()
    assert_all_close(on_cpu(actual), expected, exact, dtype, whole_rows=case.has_whole_rows(backend))


def options_on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Move the tensors among options."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def window_inputs(
    groups: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, bias: bool = True
) -> dict[str, Tensor]:
    """Inputs of ``window_attention``."""
    made = {"qkv": torch.randn(groups, tokens, 3, heads, head_dim, dtype=torch.float64).to(dtype)}
    if bias:
        made["bias"] = torch.randn(heads, tokens, tokens, dtype=torch.float64).to(dtype)
    made["grad_out"] = torch.randn(groups, tokens, heads * head_dim, dtype=torch.float64).to(dtype)
    return made


def check_window(inputs: dict[str, Tensor], backend: str, mask: Tensor | None = None, **options: Any) -> None:
    """Compare a backend with the reference on already partitioned windows, forward and backward."""

    def moved(to: str | torch.dtype) -> dict[str, Any]:
        placed = options if isinstance(to, torch.dtype) else options_on(to, options)
        return dict(placed, mask=None if mask is None else mask.to(to))

    torch.manual_seed(1)
    expected = evaluate(vidattn.window_attention, inputs, dict(options, mask=mask, backend="reference"))
    exact = evaluate(reference.window_attention, to(inputs, torch.float64), dict(moved(torch.float64), seed=seed_of(1)))
    device = device_of(backend)
    torch.manual_seed(1)
    with seeds_from_the_host():
        actual = evaluate(vidattn.window_attention, to(inputs, device), dict(moved(device), backend=backend))
    whole_rows = not keeps_lse(inputs["qkv"].shape[1], backend)
    if backend not in BACKENDS_THAT_LEARN_A_DENSE_BIAS:
        expected, exact = ({name: x for name, x in found.items() if name != "bias"} for found in (expected, exact))
    assert_all_close(on_cpu(actual), expected, exact, inputs["qkv"].dtype, whole_rows=whole_rows)


def subsets(values: Sequence[int], otherwise: Sequence[int]) -> list[tuple[int, int, int]]:
    """All ways to take each axis from the one or the other triple."""
    return [tuple((values if bits >> axis & 1 else otherwise)[axis] for axis in range(3)) for bits in range(8)]  # type: ignore[misc]
