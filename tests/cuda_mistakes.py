"""What tests of kernels with one mistake share: sources are changed, compiled and run on the emulated GPU."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from tolerance import GRADIENT_FACTOR, assert_close
from torch import Tensor

import tests.cuda_emulator as emulated
import vidattn
from tests.cuda_emulator import build

Edits = dict[str, Callable[[str], str]]  # what is done to the text of a file in csrc/cuda


def spoil(mistake: str, file: str, pattern: str, spoiled: str) -> Callable[[str], str]:
    """Give the edit that puts a text in place of the first match of a pattern, which has to be there."""

    def edit(text: str) -> str:
        changed, found = re.subn(pattern, spoiled, text, count=1)
        if not found:
            raise ValueError(f"{mistake}: {file} no longer has {pattern!r}")
        return changed

    return edit


def one_kernel(kernel: str, function: str = "kernel_for") -> Callable[[str], str]:
    """Give the edit that leaves the one instance that a case runs, which compiles in a fraction of the time."""

    def edit(text: str) -> str:
        text, found = re.subn(rf"(?s)(\b{function}\([^)]*\) \{{).*?\n\}}", rf"\1\n  return {kernel};\n}}", text)
        if not found:
            raise ValueError(f"one_kernel: expected {function}, got none")
        return text.replace(f"{function}<__half>", f"{function}<__nv_bfloat16>")

    return edit


def without(*families: str) -> Edits:
    """Leave out files of csrc/cuda by how their names begin: who changes what families share compiles all anew."""
    names = (path.name for path in (build.CSRC / "cuda").iterdir() if path.suffix in (".cu", ".cpp"))
    return {name: lambda text: "" for name in names if name.startswith(families)}


def together(*each: Edits) -> Edits:
    """Put edits together: of one file they are done one after the other."""
    found: Edits = {}
    for name, edit in (item for edits in each for item in edits.items()):
        found[name] = functools.partial(_both, found[name], edit) if name in found else edit
    return found


def _both(first: Callable[[str], str], second: Callable[[str], str], text: str) -> str:
    return second(first(text))


WINDOWS_ALONE: Edits = without("divided", "mixing", "sequences")
SEQUENCES_ALONE: Edits = without("window3d")


def chosen_mistakes(request: pytest.FixtureRequest) -> list[str]:
    """Name the mistakes that the tests of this file are about to make."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [item.callspec.params["mistake"] for item in tests if "mistake" in item.callspec.params]


def compile_all(wanted: Iterable[Edits]) -> None:
    """Compile changed sources, as many at a time as there are cores. What goes wrong, the test of the mistake says."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wait([pool.submit(build.backend_library, True, edits) for edits in wanted])


def check_gradients(
    edits: Edits, given: Sequence[Tensor], dout: Tensor, *, controls: dict[str, Any] | None = None, **options: Any
) -> None:
    """Compare gradients for qkv, table and padding of changed kernels with those of the reference."""

    def gradients(backend: str, wide: bool) -> tuple[Tensor, ...]:
        qkv, table, pad = leaves = [(x.double() if wide else x).detach().requires_grad_() for x in given]
        out = vidattn.window3d_attention(qkv, table, pad_qkv=pad, backend=backend, **options)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))

    with emulated.edited(edits), emulated.controls(**(controls or {})):
        found = gradients("cuda", False)
    for actual, plain, exact in zip(found, gradients("reference", False), gradients("reference", True), strict=True):
        assert_close("gradient", actual, plain, exact, torch.bfloat16, GRADIENT_FACTOR)
