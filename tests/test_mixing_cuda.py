"""The CUDA kernels of space-time mixing attention on an emulated GPU: context and gradients.

An element of the gradient of k or v that no frame writes, or that two frames write, is a finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from mixing_cases import Case
from sequence_cases import BF16, F16, GRADIENT_VIEWS, KB, VIEWS, attend, differs, judge
from torch import Tensor

import tests.cuda_emulator as emulated
import vidattn

# More frames than the blocks of an emulated GPU: in the backward pass each has several, one after the other.
SMALL = Case(3, 19, clips=5, heads=2, head_dim=16)
ODD = replace(SMALL, channel_shifts=((1, 6, 1), (6, 7, -1), (9, 21, 2), (27, 32, -2)))
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install()
    yield
    emulated.uninstall()


def singles(count: int) -> tuple[tuple[int, int, int], ...]:
    """Ranges of one channel each, a channel apart."""
    return tuple((2 * i, 2 * i + 1, (1, -1, 2)[i % 3]) for i in range(count))


CASES: dict[str, tuple[Case, torch.dtype]] = {
    "X-ViT": (Case(3, 197, 8, clips=1, heads=2, head_dim=64), BF16),
    "X-ViT, float16": (Case(2, 197, 4, clips=1, heads=2, head_dim=64), F16),
    "without a cls token": (Case(2, 196, 4, clips=1, heads=1, head_dim=64), BF16),
    "400 tokens": (Case(2, 400, 3, clips=1, heads=1, head_dim=32), BF16),
    "ranges of whole pieces": (replace(SMALL, channel_shifts=((0, 8, 1), (8, 24, -1))), BF16),
    "ranges across heads": (replace(SMALL, channel_shifts=((9, 25, 1), (25, 31, -1))), F16),
    "ranges that begin and end at odd channels": (ODD, BF16),
    "heads of an odd size": (Case(4, 17, heads=3, head_dim=9, channel_shifts=((9, 18, 1), (18, 20, -2))), F16),
    "whole heads of 12 channels": (Case(4, 17, heads=3, head_dim=12, channel_shifts=((0, 12, 1), (12, 24, -1))), BF16),
    "64 ranges": (replace(SMALL, heads=4, head_dim=32, channel_shifts=singles(64)), BF16),
    "everything from the frame before": (replace(SMALL, channel_shifts=((0, 32, -1),)), F16),
    "as far as a segment reaches": (replace(SMALL, channel_shifts=((0, 9, 2), (9, 20, -2))), BF16),
    "just further": (replace(SMALL, channel_shifts=((0, 9, 3), (9, 20, -3))), BF16),
    "much further": (replace(SMALL, channel_shifts=((0, 8, 7), (8, 16, -(2**50)), (16, 21, 2**50))), BF16),
    "a segment of one frame": (replace(ODD, num_frames=1), BF16),
    "a segment of two frames": (replace(ODD, num_frames=2, clips=3), F16),
    "nothing moves": (replace(SMALL, channel_shifts=()), BF16),
    "one token": (replace(ODD, num_tokens=1), BF16),
    "a negative scale": (replace(ODD, scale=-0.3), BF16),
    "a scale of 0": (replace(ODD, scale=0.0), BF16),
    "large scores": (replace(ODD, spread=30.0), F16),
    "huge scores": (replace(SMALL, spread=1e6), BF16),
    "huge scores of long rows": (replace(ODD, num_tokens=99, clips=1, spread=1e6), BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_sequences(name: str) -> None:
    judge(*CASES[name])


@pytest.mark.parametrize("first", range(1, 65, 8))
def test_every_head_dim(first: int) -> None:
    for head_dim in range(first, first + 8):
        judge(Case(3, 18, 3, clips=1, heads=2, head_dim=head_dim), F16 if head_dim % 2 else BF16)
        judge(Case(3, 18, 1, clips=1, heads=2, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [16, 14, 15])  # rows of 16, 4 and 2 bytes
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str, head_dim: int) -> None:
    for case in (ODD, SMALL):
        shifts = case.channel_shifts and tuple(one for one in case.channel_shifts if one[1] <= 2 * head_dim)
        judge(replace(case, head_dim=head_dim, channel_shifts=shifts), view=VIEWS[name])


@pytest.mark.parametrize("name", GRADIENT_VIEWS)
def test_strides_of_the_gradient_that_comes_in(name: str) -> None:
    for case in (ODD, replace(SMALL, num_tokens=70)):
        judge(case, view_gradient=GRADIENT_VIEWS[name])


@pytest.mark.parametrize("limit", [99, pytest.param(163, marks=pytest.mark.slow), 227])
def test_every_size_of_shared_memory(limit: int) -> None:
    """400 keys of 64 elements come in blocks in the backward pass, and with 99 KB in the forward pass too."""
    with emulated.controls(shared_limit=limit * KB):
        judge(Case(2, 400, 8, clips=1, heads=1, head_dim=64))
        judge(Case(2, 300, clips=1, heads=1, head_dim=64, channel_shifts=((3, 10, 1), (17, 64, -1)), spread=1e5))


@pytest.mark.slow
def test_many_blocks_of_keys() -> None:
    with emulated.controls(shared_limit=34 * KB):
        judge(Case(2, 299, 3, clips=1, heads=2, head_dim=24), F16)
        judge(Case(2, 300, 3, clips=1, heads=1, head_dim=32, spread=1e5))


def test_too_many_ranges_are_refused() -> None:
    qkv = torch.randn(2, 3, 3, 2, 65).to(BF16)
    call = {"channel_shifts": singles(65), "backend": "cuda"}
    assert vidattn.why_not(vidattn.space_time_mixing_attention, qkv, 2, **call) == [
        "runs head dimensions up to 64, got 65",
        "runs up to 64 ranges of channels, got 65",
    ]
    with pytest.raises(ValueError, match="up to 64 ranges of channels, got 65"):
        vidattn.space_time_mixing_attention(qkv.view(2, 3, 3, 10, 13), 2, **call)
    judge(replace(SMALL, heads=10, head_dim=13, channel_shifts=singles(64)))


def test_frames_with_huge_scores_among_others() -> None:
    """A block takes them another way, between those that it takes as usual."""
    for case in (ODD, replace(ODD, num_tokens=70)):
        inputs = case.inputs(BF16)
        for frame in (1, 2, 9):
            inputs["qkv"][frame, :, :2] *= 1e4
        judge(case, inputs=inputs)


def check_many(bits: list[Tensor] | None = None) -> None:
    judge(replace(ODD, num_frames=5), F16, bits=bits)
    judge(Case(4, 70, 4, clips=2, heads=2, head_dim=40), bits=bits)
    judge(replace(SMALL, channel_shifts=((0, 9, 4), (9, 20, -7))), bits=bits)


@pytest.mark.parametrize("seed", [5, 7])
def test_any_order_gives_the_same_bits(seed: int) -> None:
    plain: list[Tensor] = []
    other: list[Tensor] = []
    check_many(plain)
    with emulated.controls(seed=seed):
        check_many(other)
    assert len(plain) == len(other) == 12
    assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


@pytest.mark.parametrize("seed", [5, 7])
def test_the_worst_rounding_that_is_allowed(seed: int) -> None:
    with emulated.controls(seed=seed, truncate=True, approximate=True):
        check_many()
        judge(*CASES["X-ViT"])


def test_channels_that_nobody_reads_get_zero() -> None:
    """Of the first frame those that the others have from the next one, of the last those from the one before."""
    grads = attend(replace(SMALL, clips=1, channel_shifts=((0, 5, 1), (5, 16, -1))), **inputs_of(SMALL, clips=1))
    for name in ("dk", "dv"):
        grad = grads[name]
        assert (grad[0, :, 0, :5] == 0).all() and (grad[2, :, 0, 5:] == 0).all()
        assert (grad[1:, :, 0, :5] != 0).all() and (grad[:2, :, 0, 5:] != 0).all() and (grad[:, :, 1] != 0).all()


def inputs_of(case: Case, **changes: int) -> dict[str, Tensor]:
    return replace(case, **changes).inputs(BF16)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("which", ["q", "k", "v", "gradient"])
@pytest.mark.parametrize("channel", [3, 12])
def test_what_is_not_finite_stays_in_the_frame_that_reads_it(channel: int, which: str, value: float) -> None:
    """Channels 0 to 7 of head 1 are those of the next frame: what is in frame 2 there belongs to frame 1."""
    case = Case(4, 19, heads=2, head_dim=16, channel_shifts=((16, 24, 1),))
    inputs = case.inputs(BF16)
    clean = attend(case, **inputs)
    if which == "gradient":
        inputs["grad_out"].unflatten(-1, (2, 16))[2, 7, 1, channel] = value
    else:
        inputs["qkv"][2, 7, "qkv".index(which), 1, channel] = value
    reader = 1 if channel < 8 and which in "kv" else 2
    found = attend(case, **inputs)
    for name, x in found.items():
        allowed = torch.zeros(8, 19, 2, 16, dtype=torch.bool)
        allowed[reader, :, 1] = True
        if name in ("dk", "dv"):  # what the reader has for its keys goes to where they are from
            allowed[reader, :, 1, :8] = False
            allowed[reader + 1, :, 1, :8] = True
        changed = differs(x.view(8, 19, 2, 16), clean[name].view(8, 19, 2, 16))
        assert not (changed & ~allowed).any(), name
    assert not all(bool(x.isfinite().all()) for x in found.values())
    expected = case.function()(inputs["qkv"], **case.options(), backend="reference")
    assert torch.equal(found["out"].isfinite(), expected.isfinite())
