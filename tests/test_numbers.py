"""Numbers that the ops are given: of NumPy, out of range, and new ones to a compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import vidattn
from vidattn import reference
from vidattn.models.layers import DropPath

GRID, CLIP, FRAMES = torch.randn(1, 3, 4, 3, 3, 2, 4), torch.randn(2, 12, 3, 2, 4), torch.randn(6, 3, 3, 2, 4)
WINDOW = partial(vidattn.window3d_attention, GRID, window_size=(2, 2, 2), shift_size=1)
MIXING = partial(vidattn.space_time_mixing_attention, FRAMES)

ACCEPTED: list[tuple[Callable[[Any], Tensor], Any]] = [
    (lambda number: vidattn.temporal_attention(CLIP, number), np.int64(3)),
    (lambda number: vidattn.spatial_attention(CLIP, number), np.uint8(3)),
    (lambda number: vidattn.factorized_dot_product_attention(CLIP, 3, num_temporal_heads=number), np.int32(1)),
    (lambda number: MIXING(3, shift_div=number), np.int64(4)),
    (lambda number: MIXING(3, channel_shifts=[(0, number, 1)]), np.int16(3)),
    (lambda number: vidattn.temporal_shift(CLIP, 2, [(0, 1, number)], dim=2), np.int64(-1)),
    (lambda number: vidattn.temporal_shift(CLIP, 2, [(0, 1, 1)], dim=number), np.int64(2)),
    (lambda number: WINDOW(scale=number), np.float64(0.3)),
    (lambda number: WINDOW(scale=number), np.int64(2)),
    (lambda number: WINDOW(mask_value=number), np.float32(-7.5)),
    (lambda number: WINDOW(mask_value=number), np.float32(-np.inf)),
    (lambda number: vidattn.window_attention(FRAMES, scale=number), np.float16(0.25)),
    (lambda number: vidattn.temporal_attention(CLIP, 3, dropout_p=number), np.float32(0.25)),
]


@pytest.mark.parametrize(("call", "number"), ACCEPTED)
def test_numbers_of_numpy_are_those_of_python(call: Callable[[Any], Tensor], number: Any) -> None:
    torch.manual_seed(0)
    found = call(number)
    torch.manual_seed(0)
    assert torch.equal(found, call(number.item()))


SHIFT = partial(vidattn.temporal_shift, CLIP, 2, [(0, 1, 1)])
BIG = "expected an integer of 64 bits, got"
REFUSED: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "num_frames: expected an integer, got", lambda: vidattn.temporal_attention(CLIP, np.float64(3))),
    (TypeError, "num_frames: expected an integer, got", lambda: vidattn.temporal_attention(CLIP, np.True_)),
    (TypeError, "num_frames: expected an integer, got tensor", lambda: MIXING(torch.tensor(3))),
    (TypeError, "scale: expected a number, got", lambda: WINDOW(scale=np.True_)),
    (TypeError, "scale: expected a number, got tensor", lambda: WINDOW(scale=torch.tensor(0.5))),
    (TypeError, "scale: expected a number, got '1'", lambda: WINDOW(scale="1")),
    (ValueError, "scale: expected a finite number, got inf", lambda: WINDOW(scale=np.float32(np.inf))),
    (ValueError, "scale: expected a finite number, got -inf", lambda: WINDOW(scale=-np.inf)),
    (ValueError, "scale: expected a finite number, got 1000", lambda: WINDOW(scale=10**400)),
    (ValueError, "mask_value: expected a finite number or -inf, got inf", lambda: WINDOW(mask_value=np.inf)),
    (ValueError, "mask_value: expected a finite number or -inf, got nan", lambda: WINDOW(mask_value=np.nan)),
    (ValueError, f"num_frames: {BIG} 9223372036854775808", lambda: vidattn.temporal_attention(CLIP, 2**63)),
    (ValueError, f"channel_shifts: {BIG}", lambda: MIXING(3, channel_shifts=[(0, 1, -(2**63) - 1)])),
    (ValueError, f"shift_div: {BIG}", lambda: MIXING(3, shift_div=2**64)),
    (ValueError, f"dim: {BIG}", lambda: SHIFT(dim=2**63)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED)
def test_other_numbers_are_refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.fixture
def programs() -> Iterator[Callable[[], int]]:
    """Count the programs that torch.compile makes."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def _window3d(ops: Any, x: Tensor, number: float) -> Tensor:
    options = {"window_size": (2, 2, 2), "shift_size": (1, 1, 1)}
    return ops.window3d_attention(x, **options, scale=number, mask_value=-number)


SCALED: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "window3d": (_window3d, GRID),
    "window": (lambda ops, x, number: ops.window_attention(x, scale=number), FRAMES),
    "temporal": (lambda ops, x, number: ops.temporal_attention(x, 3, scale=number), CLIP),
    "mixing": (lambda ops, x, number: ops.space_time_mixing_attention(x, 3, scale=number), FRAMES),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SCALED)
def test_ten_scales_of_a_compiled_function(name: str, dynamic: bool | None, programs: Callable[[], int]) -> None:
    attend, x = SCALED[name]
    compiled = torch.compile(partial(attend, vidattn), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for number in range(10):
        results = []
        for function in (compiled, partial(attend, reference)):
            leaf = x.clone().requires_grad_()
            out = function(leaf, 0.1 + number / 8)
            results.append((out, torch.autograd.grad(out.square().sum(), leaf)[0]))
        torch.testing.assert_close(*results)
    assert programs() <= 2


def test_ten_rates_of_dropout_of_a_compiled_function(programs: Callable[[], int]) -> None:
    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        return vidattn.temporal_attention(qkv, 4, dropout_p=dropout_p)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    qkv = torch.zeros(16, 64, 3, 4, 4)  # all weights are 1/4
    qkv[..., 2, :, :] = 1.0
    for number in range(10):
        rate = number / 12
        out = compiled(qkv, rate)
        kept = (1 - rate) * out * 4
        torch.testing.assert_close(kept, kept.round())
        assert abs(float(out.mean()) - 1) < 0.06 and bool((out == 1).all()) == (rate == 0)
    assert programs() <= 3


def test_the_number_of_frames_of_a_compiled_function(programs: Callable[[], int]) -> None:
    compiled = torch.compile(vidattn.temporal_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for frames in (2, 3, 4, 6):
        torch.testing.assert_close(compiled(CLIP, frames), reference.temporal_attention(CLIP, frames))
    assert programs() == 1


def test_channel_shifts_of_a_compiled_function(programs: Callable[[], int]) -> None:
    compiled = torch.compile(vidattn.space_time_mixing_attention, backend="aot_eager", fullgraph=True)
    for divisor in (2, 3, 4):
        expected = reference.space_time_mixing_attention(FRAMES, 3, shift_div=divisor)
        torch.testing.assert_close(compiled(FRAMES, 3, shift_div=divisor), expected)


def test_blocks_with_rates_of_their_own_are_one_compiled_program(programs: Callable[[], int]) -> None:
    blocks = [DropPath(number / 12) for number in range(10)]
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    x = torch.ones(4096, 2)
    for block in blocks:
        out = block(x)
        assert torch.equal(out[:, 0], out[:, 1]) and abs(float(out.mean()) - 1) < 0.1
    assert programs() <= 3


def test_opcheck_of_ops_with_their_numbers_in_a_tensor() -> None:
    numbers = torch.tensor([0.3, 0.0], dtype=torch.float64)
    args = (CLIP.clone().requires_grad_(), None, None, None, 3, "thw", 2, None, 0.0, 0.0, "reference", numbers)
    op = torch.ops.vidattn.divided_attention_with_numbers
    checks = torch.library.opcheck(op.default, args)
    assert set(checks.values()) == {"SUCCESS"}
    torch.testing.assert_close(op(*args)[0], reference.temporal_attention(CLIP, 3, scale=0.3))
