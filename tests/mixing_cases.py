"""Cases of space-time mixing attention: inputs, the three evaluations of each, and their comparison."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from attention_cases import BACKENDS, Attend, device_of, evaluate, on_cpu, seed_of, seeds_from_the_host, separated, to
from tolerance import assert_all_close, assert_as_exact_as_plain
from torch import Tensor

import vidattn
from vidattn import reference

# Those that have temporal_shift too, which moves data of any dtype.
BACKENDS_THAT_SHIFT = [name for name in BACKENDS if not vidattn.why_not("temporal_shift", backend=name)]


@dataclass(frozen=True)
class Case:
    """A call of ``space_time_mixing_attention``."""

    num_frames: int = 4
    num_tokens: int = 5
    shift_div: int = 4
    channel_shifts: tuple[tuple[int, int, int], ...] | None = None
    clips: int = 2
    heads: int = 4
    head_dim: int = 8
    scale: float | None = None
    dropout_p: float = 0.0
    spread: float = 1.0  # of q and k

    def __str__(self) -> str:
        shifts = f"div{self.shift_div}" if self.channel_shifts is None else str(self.channel_shifts).replace(" ", "")
        return f"T{self.num_frames}N{self.num_tokens}b{self.clips}h{self.heads}d{self.head_dim}-{shifts}"

    def function(self, module: ModuleType = vidattn) -> Attend:
        """The function of qkv and options."""

        def attend(qkv: Any, **options: Any) -> Tensor:
            return module.space_time_mixing_attention(qkv, self.num_frames, **options)

        return attend

    def options(self) -> dict[str, Any]:
        """Arguments besides the tensors and the number of frames."""
        return {
            "shift_div": self.shift_div,
            "channel_shifts": self.channel_shifts,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
        }

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random tensors, rounded to the dtype."""
        generator = torch.Generator().manual_seed(self.num_frames * 1000 + self.num_tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        frames = self.clips * self.num_frames
        qkv = draw(frames, self.num_tokens, 3, self.heads, self.head_dim)
        qkv[..., :2, :, :] *= self.spread
        return {"qkv": qkv.to(dtype), "grad_out": draw(frames, self.num_tokens, self.heads * self.head_dim).to(dtype)}


def expected_and_exact(
    case: Case, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Evaluate the reference backend in the dtype of the inputs, and autograd through the reference in float64."""
    torch.manual_seed(1)
    expected = evaluate(case.function(), inputs, dict(case.options(), backend="reference"))
    wide = to(inputs, torch.float64)
    return expected, evaluate(case.function(reference), wide, dict(case.options(), seed=seed_of(1)))


def check(
    case: Case, dtype: torch.dtype, backend: str, *, apart: bool = False, inputs: dict[str, Tensor] | None = None
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
