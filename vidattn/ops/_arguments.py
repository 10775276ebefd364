"""Checks and conversions of arguments that the attention functions share.

Everything here runs in the public functions, in front of the ops, and is traced by ``torch.compile``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from vidattn.messages import describe as _describe
from vidattn.ops._tensors import last_dim_dense

__all__ = [
    "DTYPES",
    "check_choice",
    "check_companion",
    "check_dense",
    "check_dropout",
    "check_numbers",
    "check_range",
    "check_scale",
    "draw_seed",
    "split_qkv",
]

_INT64 = 2**63
_LARGEST = sys.float_info.max
_INFINITY = float("inf")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def split_qkv(
    function: str, qkv: Tensor | Sequence[Tensor], packed: str, separate: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check ``qkv``, apply autocast and give (packed, None, None) or (q, k, v), each dense in its last dimension.

    Args:
        function: name for error messages.
        qkv: one tensor with a dimension of 3 in front of the heads, or three tensors without it.
        packed: layout of the packed tensor, as in ``"(B, D, H, W, 3, h, d)"``.
        separate: layout of each of three tensors.

    Returns:
        The tensors the op takes.
    """
    if isinstance(qkv, Tensor):
        check_dense(function, "qkv", qkv)
        ndim = packed.count(",") + 1
        if qkv.dim() != ndim or qkv.shape[-3] != 3:
            raise ValueError(f"{function}: qkv: expected shape {packed}, got {tuple(qkv.shape)}")
        _check_values(function, "qkv", qkv)
        return last_dim_dense(_autocast(qkv)), None, None
    if not isinstance(qkv, (tuple, list)) or len(qkv) != 3 or not all(isinstance(x, Tensor) for x in qkv):
        raise TypeError(
            f"{function}: qkv: expected a tensor {packed} or three tensors {separate}, got {_describe(qkv)}"
        )
    for name, x in zip("qkv", qkv, strict=True):
        check_dense(function, name, x)
    q, k, v = qkv
    if q.dim() != separate.count(",") + 1 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in qkv)
        raise ValueError(f"{function}: qkv: expected three tensors of equal shape {separate}, got {shapes}")
    _check_values(function, "q", q)
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"{function}: qkv: expected one device, got {q.device}, {k.device}, {v.device}")
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"{function}: qkv: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    return last_dim_dense(q), last_dim_dense(k), last_dim_dense(v)


def check_companion(function: str, name: str, value: Tensor, like: Tensor, shape: Sequence[int], layout: str) -> None:
    """Check a tensor that goes with q, k and v: its type, shape and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name}: expected a tensor {layout} or None, got {_describe(value)}")
    check_dense(function, name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{function}: {name}: expected shape {layout} = {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{function}: {name}: expected a floating dtype, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{function}: {name}: expected device {like.device} like qkv, got {value.device}")


def check_numbers(function: str, name: str, value: Any, like: Tensor, shape: Sequence[int], layout: str) -> None:
    """Check a tensor of integers that goes with q, k and v: its type, dtype, shape and device, not what it holds."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name}: expected a tensor {layout} or None, got {_describe(value)}")
    check_dense(function, name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: {name}: expected dtype int32 or int64, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{function}: {name}: expected shape {layout} = {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{function}: {name}: expected device {like.device} like qkv, got {value.device}")


def check_range(function: str, name: str, value: Tensor, count: int) -> None:
    """Refuse numbers that are not 0 to ``count - 1``, where they can be read at once: in the memory of the host."""
    if value.device.type != "cpu" or value.numel() == 0:
        return
    if type(value) is not Tensor or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return
    least, most = (int(number) for number in value.aminmax())
    if least < 0 or most >= count:
        raise ValueError(f"{function}: {name}: expected numbers from 0 to {count - 1}, got {least} to {most}")


def check_dense(function: str, name: str, value: object) -> None:
    """Refuse a tensor whose elements do not lie at strides, before its shape is looked at; what is no tensor passes."""
    if not isinstance(value, Tensor):
        return
    if value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantised"
        raise TypeError(f"{function}: {name}: expected a dense tensor, got a {kind} tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{function}: {name}: expected a dense tensor, got layout {value.layout}")


def check_choice(function: str, name: str, value: str | None, choices: Sequence[str | None]) -> None:
    """Refuse what is none of the words that an option may be."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{function}: {name}: expected one of {tuple(choices)}, got {_describe(value)}")


def check_scale(function: str, scale: float | None, head_dim: int) -> float:
    """Return the factor of q k^T."""
    if scale is None:
        return head_dim**-0.5
    return finite_number(function, "scale", scale)


def check_dropout(function: str, dropout_p: float) -> float:
    """Return the dropout probability."""
    value = finite_number(function, "dropout_p", dropout_p)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{function}: dropout_p: expected 0 <= dropout_p < 1, got {value}")
    return value


def integer(function: str, name: str, value: Any) -> int:
    """Return ``value`` as an int, which may be one of NumPy or of ``torch.compile``, or raise."""
    if type(value) is not int:  # the rest is slow to tell
        if isinstance(value, torch.SymInt):
            return value  # type: ignore[return-value]
        if torch.jit.is_tracing() and isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64:
            return int(value)  # there, sizes are tensors
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{function}: {name}: expected an integer, got {_describe(value)}")
    number = int(value)
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"{function}: {name}: expected an integer of 64 bits, got {number}")
    return number


def finite_number(function: str, name: str, value: Any, *, minus_infinity: bool = False) -> float:
    """Return ``value`` as a float, which may be one of NumPy or of ``torch.compile``, or raise.

    Args:
        function: name for error messages.
        name: the argument's.
        value: what was given.
        minus_infinity: -inf will do.

    Returns:
        The number.

    Raises:
        TypeError: it is none.
        ValueError: it is not finite.
    """
    if type(value) is float and -_LARGEST <= value <= _LARGEST:  # the rest is slow to tell
        return value
    if isinstance(value, bool) or not isinstance(value, (float, int, Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{function}: {name}: expected a number, got {_describe(value)}")
    number = value if isinstance(value, (int, torch.SymFloat)) else float(value)
    # Compared, because a compiler may not know it yet; false for NaN too.
    if not (-_INFINITY if minus_infinity else -_LARGEST) <= number <= _LARGEST:
        expected = "a finite number or -inf" if minus_infinity else "a finite number"
        raise ValueError(f"{function}: {name}: expected {expected}, got {number}")
    return number if isinstance(number, torch.SymFloat) else float(number)  # type: ignore[return-value]


def draw_seed(like: Tensor, dropout_p: float) -> Tensor | None:
    """Draw the key of the dropout mask from torch's generator of the device; None without dropout."""
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


def _check_values(function: str, name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{function}: {name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.shape[-1] < 1:
        raise ValueError(f"{function}: {name}: expected a head dimension of at least 1, got shape {tuple(x.shape)}")


def _autocast(x: Tensor) -> Tensor:
    """Cast as autocast does for matrix products: float64 stays."""
    if not torch._C._is_any_autocast_enabled():  # the rest is slow to tell
        return x
    device_type = x.device.type
    if device_type == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))
