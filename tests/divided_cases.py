"""Cases of attention over time and over space: inputs, the three evaluations of each, and their comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKENDS,
    Attend,
    device_of,
    evaluate,
    half_precision,
    on_cpu,
    seed_of,
    seeds_from_the_host,
    separated,
    to,
)
from tolerance import assert_all_close, assert_as_exact_as_plain
from torch import Tensor

import vidattn
from vidattn import reference

# By kind: the function, and the option that makes it this kind.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "temporal": ("temporal_attention", {}),
    "spatial": ("spatial_attention", {}),
    "mean": ("spatial_attention", {"cls_token": "mean"}),
    "per_frame": ("spatial_attention", {"cls_token": "per_frame"}),
    "factorized": ("factorized_dot_product_attention", {}),
    "temporal_all": ("temporal_attention", {"cls_query": "all"}),
    "spatial_all": ("spatial_attention", {"cls_query": "all"}),
}
OVER_TIME = ("temporal", "factorized", "temporal_all")
SEES_ALL = ("temporal_all", "spatial_all")


@dataclass(frozen=True)
class Case:
    """A call of one of the three functions; what it returns as a pair is compared as one tensor."""

    kind: str
    num_frames: int = 3
    num_sites: int = 5
    token_order: str = "thw"
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    scale: float | None = None
    dropout_p: float = 0.0
    num_temporal_heads: int | None = None
    spread: float = 1.0  # of q and k

    def __str__(self) -> str:
        sizes = f"T{self.num_frames}N{self.num_sites}b{self.batch}h{self.heads}d{self.head_dim}"
        return f"{self.kind}-{sizes}-{self.token_order}"

    @property
    def has_cls(self) -> bool:
        """Whether row 0 is a cls token."""
        return self.kind in ("mean", "per_frame", *SEES_ALL)

    @property
    def name(self) -> str:
        """Name of the public function."""
        return KINDS[self.kind][0]

    def function(self, module: ModuleType = vidattn) -> Attend:
        """The function, its two results joined to one tensor where there are two."""
        attend = getattr(module, self.name)

        def attend_joined(qkv: Any, **options: Any) -> Tensor:
            out = attend(qkv, self.num_frames, **options)
            return torch.cat((out[1], out[0]), dim=1) if isinstance(out, tuple) else out

        return attend_joined

    def options(self) -> dict[str, Any]:
        """Arguments besides the tensors and the number of frames."""
        options = {"token_order": self.token_order, "scale": self.scale, "dropout_p": self.dropout_p}
        if self.num_temporal_heads is not None:
            options["num_temporal_heads"] = self.num_temporal_heads
        return options | KINDS[self.kind][1]

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random tensors, rounded to the dtype."""
        generator = torch.Generator().manual_seed(self.num_frames * 1000 + self.num_sites)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        patches = self.num_frames * self.num_sites
        qkv = draw(self.batch, patches + self.has_cls, 3, self.heads, self.head_dim)
        qkv[..., :2, :, :] *= self.spread
        rows = patches + (self.num_frames if self.kind == "per_frame" else self.has_cls)
        grad_out = draw(self.batch, rows, self.heads * self.head_dim)
        return {"qkv": qkv.to(dtype), "grad_out": grad_out.to(dtype)}


def expected_and_exact(
    case: Case, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Evaluate the reference backend in the dtype of the inputs, and autograd through the reference in float64."""
    torch.manual_seed(1)
    expected = evaluate(case.function(), inputs, dict(case.options(), backend="reference"))
    wide = to(inputs, torch.float64)
    return expected, evaluate(case.function(reference), wide, dict(case.options(), seed=seed_of(1)))


def runs(case: Case, dtype: torch.dtype, backend: str) -> bool:
    """Whether a backend runs a case."""
    qkv = case.inputs(dtype)["qkv"].to(device_of(backend))
    return not vidattn.why_not(case.name, qkv, case.num_frames, **case.options(), backend=backend)


def _kinds_of(backend: str) -> list[str]:
    dtype, backend = half_precision(backend), "reference" if backend == "auto" else backend
    return [kind for kind in KINDS if runs(Case(kind), dtype, backend)]


# By backend: the kinds that it runs.
KINDS_OF = {backend: _kinds_of(backend) for backend in (*BACKENDS, "auto")}


def for_kinds(
    parameters: Iterable[Any], names: Sequence[str] = ("backend",), kinds: Sequence[str] = tuple(KINDS)
) -> pytest.MarkDecorator:
    """Parametrise a test with values that begin with a backend, each with those of the kinds that it runs."""
    known = [given if hasattr(given, "values") else pytest.param(given, id=given) for given in parameters]
    return pytest.mark.parametrize(
        (*names, "kind"),
        [
            pytest.param(*given.values, kind, id=f"{kind}-{given.id}", marks=given.marks)
            for given in known
            for kind in kinds
            if kind in KINDS_OF[given.values[0]]
        ],
    )


def check(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    *,
    apart: bool = False,
    inputs: dict[str, Tensor] | None = None,
) -> None:
    """Compare a backend with the reference on a case, forward and backward."""
    inputs = case.inputs(dtype) if inputs is None else inputs
    expected, exact = expected_and_exact(case, inputs)
    attend = separated(case.function()) if apart else case.function()
    torch.manual_seed(1)
    with seeds_from_the_host():
        actual = evaluate(attend, to(inputs, device_of(backend)), dict(case.options(), backend=backend))
    assert_all_close(on_cpu(actual), expected, exact, dtype)


def check_against_plain(case: Case, backend: str) -> None:
    """Compare a backend, the reference too, with autograd through plain PyTorch in float32.

    The products of q and k are exact: what is compared is what follows them.
    """
    inputs = case.inputs(torch.float32)
    inputs["qkv"][:, :, :2].round_()
    inputs["grad_out"] *= 100.0
    plain = evaluate(case.function(reference), inputs, dict(case.options(), seed=seed_of(1)))
    exact = evaluate(case.function(reference), to(inputs, torch.float64), dict(case.options(), seed=seed_of(1)))
    torch.manual_seed(1)
    with seeds_from_the_host():
        actual = evaluate(case.function(), to(inputs, device_of(backend)), dict(case.options(), backend=backend))
    assert_as_exact_as_plain(on_cpu(actual), plain, exact)
