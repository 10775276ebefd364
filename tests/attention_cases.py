"""What the cases of all families share: which backends and dtypes run here, and how a function is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import vidattn
from vidattn import backends
from vidattn.backends import TRITON_INTERPRETED
from vidattn.ops import _arguments as arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in vidattn.list_backends() if not vidattn.why_not("window3d_attention", backend=name)]


def device_of(backend: str) -> str:
    """Device that a backend's tests run on: the CPU where it takes its tensors, emulated or interpreted if need be."""
    known = backends._BACKENDS.get(backend)
    device_types = () if known is None else (*(known.device_types or ()), *known.when_named)
    return "cuda" if "cuda" in device_types and "cpu" not in device_types else "cpu"


def _runs(backend: str, dtype: torch.dtype | None = None, head_dim: int = 8, dropout_p: float = 0.0) -> bool:
    dtype = dtype or half_precision(backend)
    probe = torch.zeros(1, 1, 1, 1, 3, 1, head_dim, dtype=dtype, device=device_of(backend))
    return not vidattn.why_not("window3d_attention", probe, window_size=1, dropout_p=dropout_p, backend=backend)


SUPPORTED = {backend: tuple(dtype for dtype in DTYPES if _runs(backend, dtype)) for backend in BACKENDS}


def _parameters(*values: Any) -> Any:
    words = (str(value).removeprefix("torch.") for value in values)
    return pytest.param(*values, id="-".join(words))


# The reference is what low precision is measured by; itself it is measured in float64.
BACKEND_DTYPES = [
    _parameters(backend, dtype)
    for backend in BACKENDS
    for dtype in (SUPPORTED[backend] if backend != "reference" else (torch.float64,))
]
# For tests in which the dtype matters little: all but the first of a backend are slow.
_FIRST = {parameters.values[0]: parameters for parameters in reversed(BACKEND_DTYPES)}
FIRST_DTYPES = [
    parameters
    if parameters is _FIRST[parameters.values[0]]
    else pytest.param(*parameters.values, id=parameters.id, marks=pytest.mark.slow)
    for parameters in BACKEND_DTYPES
]
BACKENDS_WITH_FLOAT64 = [backend for backend in BACKENDS if torch.float64 in SUPPORTED[backend]]
BACKENDS_WITH_FLOAT32 = [backend for backend in BACKENDS if torch.float32 in SUPPORTED[backend]]


def half_precision(backend: str) -> torch.dtype:
    """A dtype of 16 bits that a backend runs."""
    return torch.bfloat16 if torch.bfloat16 in SUPPORTED.get(backend, DTYPES) else torch.float16


def single_precision(backend: str) -> torch.dtype:
    """float32, or what comes next to it if a backend does not run that."""
    return torch.float32 if torch.float32 in SUPPORTED.get(backend, DTYPES) else torch.float16


def full_precision(backend: str) -> torch.dtype:
    """The most exact dtype that a backend runs."""
    return torch.float64 if torch.float64 in SUPPORTED[backend] else single_precision(backend)


def about(dtype: torch.dtype, atol: float = 1e-5, rtol: float = 1e-5) -> dict[str, float]:
    """How close two results must be where only a blunder is looked for; in 16 bits a hundredth."""
    return {"rtol": rtol, "atol": atol} if dtype.itemsize > 2 else {"rtol": 1e-2, "atol": 1e-2}


HAS_DROPOUT = {backend: _runs(backend, dropout_p=0.5) for backend in BACKENDS}
BACKENDS_WITH_DROPOUT = [backend for backend in BACKENDS if HAS_DROPOUT[backend]]
DROPOUT_DTYPES = [parameters for parameters in BACKEND_DTYPES if HAS_DROPOUT[parameters.values[0]]]  # type: ignore[index]
MAX_HEAD_DIM = {backend: max(size for size in (64, 128) if _runs(backend, head_dim=size)) for backend in BACKENDS}


def with_head_dims(head_dims: Iterable[int]) -> list[Any]:
    """Give backends, their dtypes and those of the head dimensions that they run."""
    return [
        _parameters(backend, dtype, head_dim)
        for backend, dtype in (parameters.values for parameters in BACKEND_DTYPES)
        for head_dim in head_dims
        if head_dim <= MAX_HEAD_DIM[backend]  # type: ignore[index]
    ]


def _learns_dense_bias(backend: str) -> bool:
    windows = torch.zeros(1, 1, 3, 1, 8, dtype=half_precision(backend), device=device_of(backend))
    bias = torch.zeros(1, 1, 1, device=windows.device, requires_grad=True)
    return not vidattn.why_not("window_attention", windows, bias, backend=backend)


BACKENDS_THAT_LEARN_A_DENSE_BIAS = [backend for backend in BACKENDS if _learns_dense_bias(backend)]


def assert_same(backend: str, actual: Tensor, expected: Tensor) -> None:
    """Compare what a backend gives for the same sequences in another batch: bit for bit.

    Short sequences share a tile, and other neighbours put them on other rows of it. Triton's interpreter has the
    products of a tile from numpy, which on some processors rounds rows differently.
    """
    if backend == "triton" and TRITON_INTERPRETED:
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


Attend = Callable[..., Tensor]


def has_dense_bias(options: dict[str, Any]) -> bool:
    """Whether a bias table is expanded before kernels see it."""
    return isinstance(options.get("bias_index"), Tensor) or options.get("window_types") is not None


def evaluate(attend: Attend, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor | None]:
    """Run an attention function forward and backward on inputs that require gradients, if the backend gives them."""
    tensors = {name: x.detach().clone() for name, x in inputs.items() if name != "grad_out"}
    constant: tuple[str, ...] = ()
    if options.get("backend", "auto") not in ("auto", *BACKENDS_THAT_LEARN_A_DENSE_BIAS):
        constant = ("bias", "bias_table") if has_dense_bias(options) else ("bias",)
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if name not in constant}
    out = attend(**tensors, **options)
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


def on_cpu(results: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Bring results to where they are compared."""
    return {name: None if x is None else x.cpu() for name, x in results.items()}


def separated(attend: Attend) -> Attend:
    """The same function, called with q, k and v apart."""

    def attend_separately(qkv: Tensor, *args: Any, **options: Any) -> Tensor:
        return attend(tuple(x.contiguous() for x in qkv.unbind(-3)), *args, **options)

    return attend_separately
