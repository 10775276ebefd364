"""How error messages name what they were given: in a few words, whatever it is and however much it holds."""

from __future__ import annotations

from torch import Tensor

__all__ = ["describe", "shorten"]

_SHOWN = 4
_LENGTH = 80


def describe(value: object, depth: int = 2) -> str:
    """Name a value of an argument.

    Args:
        value: anything.
        depth: how many levels of tuples and lists are looked into.

    Returns:
        A number or a short text as it is, a tensor or an array by its type and shape, the rest cut short.

    Example:
        >>> import torch
        >>> describe((2, 0.5, "a")), describe([torch.zeros(2, 3), None]), describe(range)
        ("(2, 0.5, 'a')", 'list of 2: tensor (2, 3), None', "<class 'range'>")
    """
    if isinstance(value, Tensor):
        return "nested tensor" if value.is_nested else f"tensor {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        if len(value) <= 2 * _SHOWN and all(item is None or isinstance(item, (int, float, str)) for item in value):
            return shorten(_text(value))
        if depth == 0:
            return f"{type(value).__name__} of {len(value)}"
        items = [describe(item, depth - 1) for item in value[:_SHOWN]] + ["..."] * (len(value) > _SHOWN)
        return shorten(f"{type(value).__name__} of {len(value)}: " + ", ".join(items), 2 * _LENGTH)
    if isinstance(value, (dict, set, frozenset, bytes, bytearray)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "__array__"):
        # A number of NumPy is an array without dimensions that reads like a number.
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return f"{kind} of shape {value.shape}" if value.shape else f"{kind}({shorten(str(value))})"  # type: ignore[attr-defined]
    return shorten(_text(value))


def shorten(text: str, length: int = _LENGTH) -> str:
    """Cut the first line of a text to a length."""
    line = text.splitlines()[0] if text else text
    return line if len(line) <= length and line == text else line[: length - 3] + "..."


def _text(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # of an integer with thousands of digits, or of a class that does it wrongly
        return f"a {type(value).__qualname__}"
