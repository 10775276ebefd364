"""Fingerprints of source code: the same for code that does the same, whatever its comments, layout and annotations."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import Any

from vidattn.twins import Watched

__all__ = ["fingerprint", "resolve"]

# Long enough that no two versions of a function are taken for each other, short enough to be read.
_DIGITS = 16
# Fields of a syntax tree that change nothing, or that only some versions of Python have.
_LEFT_OUT = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns", "type_ignores"}


def resolve(kind: type, name: str, code: tuple[str, ...]) -> tuple[Watched, ...] | None:
    """Find the functions that a twin does the work of.

    Args:
        kind: class of the module.
        name: name of the class that is known, ``kind`` or one of its bases.
        code: as in ``vidattn.integrations.Counterpart``; the first is a method of the class.

    Returns:
        The functions, in this order; None if one is missing.
    """
    found: list[Watched] = []
    scopes: list[dict[str, Any]] = []  # what the methods of the class see, and then the functions that they call
    for entry in code:
        owner, _, function = entry.rpartition(".")
        seen = next((scope for scope in scopes if (owner or function) in scope), {})
        namespace = kind if owner == name else seen.get(owner) if owner else seen
        value = _get(namespace, function)
        if value is None:
            return None
        scopes.append(getattr(inspect.unwrap(value), "__globals__", {}))
        found.append(Watched(namespace, function, value))
    return tuple(found)


def _get(namespace: Any, name: str) -> Any:
    return namespace.get(name) if isinstance(namespace, dict) else getattr(namespace, name, None)


def fingerprint(watched: tuple[Watched, ...]) -> str | None:
    """Hash the source of functions, without comments, docstrings and annotations.

    Args:
        watched: the functions.

    Returns:
        16 hexadecimal digits; None where a source cannot be read.
    """
    return _fingerprint(tuple(row.function for row in watched))


@functools.lru_cache(maxsize=1024)
def _fingerprint(functions: tuple[Any, ...]) -> str | None:
    digest = hashlib.sha256()
    for function in functions:
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
            tree = ast.parse(source)
        except (OSError, TypeError, SyntaxError):
            return None
        digest.update(_normal(tree).encode())
    return digest.hexdigest()[:_DIGITS]


def _normal(node: Any) -> str:
    """Write a syntax tree as text that is the same in all versions of Python."""
    if isinstance(node, ast.AST):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            return _normal(ast.Assign(targets=[node.target], value=node.value))
        fields: list[tuple[str, Any]] = [
            (name, getattr(node, name, None)) for name in node._fields if name not in _LEFT_OUT
        ]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            fields = [(name, _without_docstring(value) if name == "body" else value) for name, value in fields]
        parts = [f"{name}={_normal(value)}" for name, value in fields if value not in (None, [])]
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(map(_normal, node))}]"
    return repr(node)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_text else body
