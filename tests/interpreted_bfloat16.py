"""bfloat16 in Triton's interpreter, which keeps its bits as uint16 and computes with those, without an error.

Here an operation on bfloat16 is one on float32 whose result is rounded to the nearest, ties to even, as on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vidattn.ops import _library

__all__ = ["ORIGINAL", "mend"]

# The interpreter's own methods, by name.
ORIGINAL = {
    name: getattr(InterpreterBuilder, name)
    for name in ("binary_op", "cast_impl", "create_dot", "create_fma", "create_fp_to_fp", "ternary_op", "unary_op")
}


def mend() -> None:
    """Mend the interpreter of this process, and let the backend "triton" take bfloat16 there."""
    for name in ORIGINAL:
        setattr(InterpreterBuilder, name, globals()[f"_{name}"])
    InterpreterBuilder.get_bf16 = lambda self, value: _rounded(np.array([value], np.float32))
    check_tensor = interpreter.ReduceScanOpInterface.check_tensor

    def refuse(self: Any, inputs: tuple[Any, ...]) -> None:
        if any(x.dtype == tl.bfloat16 for x in inputs):
            raise NotImplementedError("a reduction of bfloat16: expected float32")
        check_tensor(self, inputs)

    interpreter.ReduceScanOpInterface.check_tensor = refuse
    _library.MISINTERPRETED.clear()


def _is_bfloat16(x: TensorHandle) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _wide(x: TensorHandle) -> TensorHandle:
    """The same numbers in float32."""
    if not _is_bfloat16(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(x: np.ndarray) -> TensorHandle:
    bits = x.astype(np.float32, copy=False).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # rounding could make an infinity of a NaN
    return TensorHandle(np.where(np.isnan(x), quiet, nearest).astype(np.uint16), tl.bfloat16)


def _computed(name: str, builder: Any, handles: tuple[TensorHandle, ...], *rest: Any) -> TensorHandle:
    """Run an operation of the interpreter on numbers that may be bfloat16, and round its result if they are."""
    if not any(map(_is_bfloat16, handles)):
        return ORIGINAL[name](builder, *handles, *rest)
    found = ORIGINAL[name](builder, *map(_wide, handles), *rest).data
    return TensorHandle(found, tl.int1) if found.dtype == bool else _rounded(found)


def _binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
    return _computed("binary_op", self, (lhs, rhs), op)


def _unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
    return _computed("unary_op", self, (arg,), op)


def _ternary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
    return _computed("ternary_op", self, (lhs, rhs, other), op)


def _create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    return _computed("create_fma", self, (x, y, z))


def _create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
    return ORIGINAL["create_dot"](self, _wide(a), _wide(b), d, *rest)


def _cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    if dst_type.scalar != tl.bfloat16:
        return ORIGINAL["cast_impl"](self, _wide(src), dst_type)
    return src if _is_bfloat16(src) else _rounded(src.data)


def _create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
    if not _is_bfloat16(src) and dst_type.scalar != tl.bfloat16:
        return ORIGINAL["create_fp_to_fp"](self, src, dst_type, rounding_mode)
    if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"a cast of bfloat16: expected to round to the nearest, got {rounding_mode}")
    return _cast_impl(self, src, dst_type)
