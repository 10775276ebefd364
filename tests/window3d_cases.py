"""Cases of window attention: inputs, the three evaluations of each, and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from tolerance import assert_all_close
from torch import Tensor

import vidattn
from vidattn import reference
from vidattn.backends import TRITON_INTERPRETED
from vidattn.geometry import num_bias_rows
from vidattn.ops import _arguments as arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in vidattn.list_backends() if not vidattn.why_not("window3d_attention", backend=name)]


def device_of(backend: str) -> str:
    """Device that a backend's tests run on."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not TRITON_INTERPRETED) else "cpu"


def _runs(backend: str, dtype: torch.dtype) -> bool:
    probe = torch.zeros(1, 1, 1, 1, 3, 1, 8, dtype=dtype, device=device_of(backend))
    return not vidattn.why_not("window3d_attention", probe, window_size=1, backend=backend)


SUPPORTED = {backend: tuple(dtype for dtype in DTYPES if _runs(backend, dtype)) for backend in BACKENDS}
# Triton's interpreter takes a thousand times as long, so it gets fewer and shorter windows.
SHORT_WINDOWS = (1, 7, 15, 16, 17, 33, 64, 65) if TRITON_INTERPRETED else range(1, 68)
# The reference is what low precision is measured by; itself it is measured in float64.
BACKEND_DTYPES = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend in BACKENDS
    for dtype in (SUPPORTED[backend] if backend != "reference" else (torch.float64,))
]
BACKENDS_WITH_FLOAT64 = [backend for backend in BACKENDS if torch.float64 in SUPPORTED[backend]]


def half_precision(backend: str) -> torch.dtype:
    """A dtype of 16 bits that a backend runs."""
    return torch.bfloat16 if torch.bfloat16 in SUPPORTED[backend] else torch.float16


def full_precision(backend: str) -> torch.dtype:
    """The most exact dtype that a backend runs."""
    return torch.float64 if torch.float64 in SUPPORTED[backend] else torch.float32


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
            table = self.table_spread * draw(num_bias_rows(self.window), self.heads)
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
        }


Attend = Callable[..., Tensor]


def evaluate(attend: Attend, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor | None]:
    """Run an attention function forward and backward on inputs that all require gradients."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name != "grad_out"}
    out = attend(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs["grad_out"].to(out.dtype), allow_unused=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def to(inputs: dict[str, Tensor], *args: Any) -> dict[str, Tensor]:
    """Move or cast all tensors."""
    return {name: x.to(*args) for name, x in inputs.items()}


@contextmanager
def seeds_from_the_host() -> Iterator[None]:
    """Draw dropout seeds with the host's generator for every device: each device's own gives other numbers."""
    draw = arguments.draw_seed

    def draw_on_host(like: Tensor, dropout_p: float) -> Tensor | None:
        seed = draw(like.new_empty(0, device="cpu"), dropout_p)
        return None if seed is None else seed.to(like.device)

    with mock.patch.object(arguments, "draw_seed", draw_on_host):
        yield


def seed_of(manual_seed: int) -> Tensor:
    """Seed that the public functions draw after ``torch.manual_seed(manual_seed)``."""
    torch.manual_seed(manual_seed)
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)


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
    attend = separated(vidattn.window3d_attention) if separate else vidattn.window3d_attention
    torch.manual_seed(1)
    with seeds_from_the_host():
        actual = evaluate(attend, to(inputs, device_of(backend)), dict(options, backend=backend))
    assert actual["out"] is not None and actual["out"].is_contiguous()
    assert_all_close(on_cpu(actual), expected, exact, dtype)


def on_cpu(results: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Bring results to where they are compared."""
    return {name: None if x is None else x.cpu() for name, x in results.items()}


def separated(attend: Attend) -> Attend:
    """The same function, called with q, k and v apart."""

    def attend_separately(qkv: Tensor, *args: Any, **options: Any) -> Tensor:
        return attend(tuple(x.contiguous() for x in qkv.unbind(-3)), *args, **options)

    return attend_separately


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

    def moved(*args: Any) -> dict[str, Any]:
        return dict(options, mask=None if mask is None else mask.to(*args))

    torch.manual_seed(1)
    expected = evaluate(vidattn.window_attention, inputs, dict(options, mask=mask, backend="reference"))
    exact = evaluate(reference.window_attention, to(inputs, torch.float64), dict(moved(torch.float64), seed=seed_of(1)))
    device = device_of(backend)
    torch.manual_seed(1)
    with seeds_from_the_host():
        actual = evaluate(vidattn.window_attention, to(inputs, device), dict(moved(device), backend=backend))
    assert_all_close(on_cpu(actual), expected, exact, inputs["qkv"].dtype)


def subsets(values: Sequence[int], otherwise: Sequence[int]) -> list[tuple[int, int, int]]:
    """All ways to take each axis from the one or the other triple."""
    return [tuple((values if bits >> axis & 1 else otherwise)[axis] for axis in range(3)) for bits in range(8)]  # type: ignore[misc]
