"""Numbers of attention over time and over space: every backend that runs here against the float64 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKEND_DTYPES,
    BACKENDS,
    BACKENDS_WITH_DROPOUT,
    BACKENDS_WITH_FLOAT32,
    BACKENDS_WITH_FLOAT64,
    DROPOUT_DTYPES,
    about,
    device_of,
    evaluate,
    full_precision,
    half_precision,
    single_precision,
    to,
    with_head_dims,
)
from divided_cases import OVER_TIME, SEES_ALL, Case, check, check_against_plain, for_kinds, runs
from torch import Tensor

import vidattn
from vidattn.backends import TRITON_INTERPRETED

backends = pytest.mark.parametrize("backend", BACKENDS)
backends_and_dtypes = pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
backends_and_kinds = for_kinds(BACKENDS)
backends_dtypes_and_kinds = for_kinds(BACKEND_DTYPES, ("backend", "dtype"))
orders = pytest.mark.parametrize("token_order", ["thw", "hwt"])
HEAD_DIMS = (1, 5, 8, 12, 15, 16, 18, 20, 24, 32, 40, 64, 96, 128)
# Around what fits a vector, a tile and a whole row; Triton's interpreter takes a thousand times as long.
LENGTHS = (1, 3, 7, 8, 15, 16, 17, 32, 33, 64, 65, 96, 197, 256, 300)
LENGTHS = (1, 3, 8, 17, 33, 96, 300) if TRITON_INTERPRETED else LENGTHS
EVERY_LENGTH = (2, 5, 7, 12, 16, 31, 64) if TRITON_INTERPRETED else range(1, 68)


@for_kinds(with_head_dims(HEAD_DIMS), ("backend", "dtype", "head_dim"))
def test_head_dims(backend: str, dtype: torch.dtype, kind: str, head_dim: int) -> None:
    check(Case(kind, head_dim=head_dim), dtype, backend)


@backends_dtypes_and_kinds
@orders
def test_token_orders(backend: str, dtype: torch.dtype, kind: str, token_order: str) -> None:
    check(Case(kind, 4, 6, token_order, heads=4), dtype, backend)


@for_kinds(BACKEND_DTYPES, ("backend", "dtype"), ("temporal", "temporal_all"))
@orders
@pytest.mark.parametrize("num_frames", LENGTHS)
def test_frames(backend: str, dtype: torch.dtype, kind: str, token_order: str, num_frames: int) -> None:
    check(Case(kind, num_frames, 3, token_order, head_dim=16), dtype, backend)


@for_kinds(BACKEND_DTYPES, ("backend", "dtype"), ("spatial", "mean", "per_frame", "spatial_all"))
@pytest.mark.parametrize("num_sites", LENGTHS)
def test_sites(backend: str, dtype: torch.dtype, kind: str, num_sites: int) -> None:
    token_order = "hwt" if num_sites % 2 else "thw"
    check(Case(kind, 2, num_sites, token_order, batch=1, head_dim=16), dtype, backend)


@backends_and_kinds
def test_every_short_sequence(backend: str, kind: str) -> None:
    """Lengths around every multiple of a vector or tile."""
    for length in EVERY_LENGTH if backend != "reference" else (5,):
        frames, sites = (length, 3) if kind in OVER_TIME else (2, length)
        for dtype in (single_precision(backend), half_precision(backend)):
            check(Case(kind, frames, sites, "hwt" if length % 2 else "thw", batch=1, head_dim=8), dtype, backend)


@for_kinds(BACKEND_DTYPES, ("backend", "dtype"), ("temporal", "temporal_all"))
@pytest.mark.parametrize("num_frames", [12, 13, 16])
def test_every_short_sequence_of_rows_far_apart(backend: str, dtype: torch.dtype, kind: str, num_frames: int) -> None:
    """Steps of 4 KB and more between its rows, which the CPU's cache has few places for."""
    check(Case(kind, num_frames, 128, "thw", batch=1, heads=1, head_dim=16), dtype, backend)


PUBLISHED = [
    Case("temporal", 8, 196, "hwt", batch=1, heads=3, head_dim=64),
    Case("temporal", 96, 4, "hwt", batch=1, heads=2, head_dim=64),
    Case("mean", 8, 196, "hwt", batch=1, heads=2, head_dim=64),
    Case("mean", 2, 784, "hwt", batch=1, heads=1, head_dim=64),
    Case("spatial", 2, 196, "thw", batch=2, heads=2, head_dim=64),
    Case("factorized", 16, 196, "thw", batch=1, heads=2, head_dim=64),
    Case("temporal_all", 4, 196, "thw", batch=1, heads=2, head_dim=64),
    Case("spatial_all", 4, 196, "thw", batch=1, heads=1, head_dim=64),
]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["temporal", "temporal_all"])
@pytest.mark.parametrize("num_frames", [8, 24])
def test_results_that_are_written_past_the_caches(dtype: torch.dtype, kind: str, num_frames: int) -> None:
    """Those of 4 to 32 MiB in rows of whole cache lines are, the gradients too."""
    check(Case(kind, num_frames, 8400 // num_frames, batch=1, heads=8, head_dim=32), dtype, "cpu")


@pytest.mark.parametrize(
    ("backend", "case"),
    [(backend, case) for backend in BACKENDS for case in PUBLISHED if runs(case, half_precision(backend), backend)],
    ids=str,
)
def test_published_models(backend: str, case: Case) -> None:
    """Sequences of full length, as TimeSformer, ViViT and Frozen in Time have them."""
    if TRITON_INTERPRETED:
        case = replace(
            case, num_sites=min(case.num_sites, 197 if case.kind == "mean" else 20), num_frames=min(case.num_frames, 16)
        )
    for dtype in (single_precision(backend), half_precision(backend)):
        check(case, dtype, backend)


@backends_and_dtypes
@orders
@pytest.mark.parametrize("num_temporal_heads", [None, 0, 1, 3, 4])
def test_heads_over_time(backend: str, dtype: torch.dtype, token_order: str, num_temporal_heads: int | None) -> None:
    """Any number of heads attends over time, the rest over space."""
    check(Case("factorized", 5, 7, token_order, heads=4, num_temporal_heads=num_temporal_heads), dtype, backend)


@backends
def test_heads_are_those_of_the_two_attentions(backend: str) -> None:
    """The first half is what temporal attention gives, the second what spatial attention gives."""
    qkv = torch.randn(2, 4 * 6, 3, 4, 8, dtype=single_precision(backend), device=device_of(backend))
    both = vidattn.factorized_dot_product_attention(qkv, 4, backend=backend)
    time = vidattn.temporal_attention(qkv[..., :2, :], 4, backend=backend)
    space = vidattn.spatial_attention(qkv[..., 2:, :], 4, backend=backend)
    torch.testing.assert_close(both, torch.cat((time, space), dim=-1), rtol=1e-6, atol=1e-6)


@backends_and_kinds
def test_one_head_and_one_site_or_frame(backend: str, kind: str) -> None:
    for frames, sites in ((1, 9), (9, 1), (1, 1)):
        case = Case(kind, frames, sites, heads=2 if kind == "factorized" else 1)
        for dtype in (full_precision(backend), half_precision(backend)):
            check(case, dtype, backend)


@backends_and_dtypes
def test_one_key_gives_its_value(backend: str, dtype: torch.dtype) -> None:
    """A softmax over one key is 1: the context is v, and q and k get no gradient."""
    qkv = torch.randn(2, 9, 3, 2, 8, device=device_of(backend)).to(dtype).requires_grad_()
    out = vidattn.temporal_attention(qkv, 1, backend=backend)
    assert torch.equal(out, qkv[:, :, 2].flatten(-2))
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(grad[:, :, 2], torch.ones_like(grad[:, :, 2])) and (grad[:, :, :2] == 0).all()


@backends_dtypes_and_kinds
def test_scale(backend: str, dtype: torch.dtype, kind: str) -> None:
    for scale in (0.05, 1.7, 0.0, -0.3):
        check(Case(kind, scale=scale), dtype, backend)


@for_kinds(DROPOUT_DTYPES, ("backend", "dtype"))
@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_dropout(backend: str, dtype: torch.dtype, kind: str, dropout_p: float) -> None:
    """The mask of the reference, in the forward and in the backward pass."""
    check(Case(kind, 5, 6, dropout_p=dropout_p), dtype, backend)
    check(Case(kind, 18, 3, "hwt", dropout_p=dropout_p, heads=4), dtype, backend, apart=True)
    check(Case(kind, 3, 37, "hwt", dropout_p=dropout_p), dtype, backend)


@for_kinds(BACKENDS_WITH_DROPOUT)
def test_dropout_keeps_the_expected_share(backend: str, kind: str) -> None:
    """With values of one every output is a share of kept weights: mean 1, and each mask is another."""
    case = Case(kind, 8, 24, batch=4, dropout_p=0.3)
    qkv = case.inputs(torch.float32)["qkv"].to(device_of(backend))
    qkv[:, :, 2] = 1.0
    outs = [case.function()(qkv, **case.options(), backend=backend) for _ in range(2)]
    assert not torch.equal(*outs)
    assert abs(torch.stack(outs).mean().item() - 1.0) < 0.02


@backends_dtypes_and_kinds
def test_adversarial_logits(backend: str, dtype: torch.dtype, kind: str) -> None:
    """Scores of -150, 0 and 150: products of one-hot vectors, exact in every dtype."""
    case = Case(kind, 9, 20, head_dim=16, scale=1.0)
    inputs = case.inputs(dtype)
    tokens = (*inputs["qkv"].shape[:2], case.heads)
    for which in range(2):
        sign = torch.randint(0, 2, tokens) * 2.0 - 1.0
        one_hot = torch.nn.functional.one_hot(torch.randint(0, 3, tokens), case.head_dim)
        inputs["qkv"][:, :, which] = (12.25 * sign[..., None] * one_hot).to(dtype)
    check(case, dtype, backend, inputs=inputs)


@for_kinds(BACKENDS_WITH_FLOAT32)
@pytest.mark.parametrize("spread", [2.0, 30.0])
def test_saturated_softmax(backend: str, kind: str, spread: float) -> None:
    """One key has nearly all the weight: the gradients of q and k are what rounding would hide first."""
    cases = [Case(kind, 5, 9, head_dim=16), Case(kind, 12, 6, head_dim=16, dropout_p=0.2)]
    if not TRITON_INTERPRETED:
        cases.append(Case(kind, 40, 50, head_dim=16))
    for case in cases:
        check_against_plain(replace(case, spread=spread), backend)


@backends_and_kinds
def test_large_logits(backend: str, kind: str) -> None:
    """Scores of thousands, where each row is all but one-hot.

    Many rows: in the few that are not, the order in which a product is summed decides, and no implementation's is best.
    """
    check(Case(kind, 9, 40, head_dim=16, spread=60.0), single_precision(backend), backend)


@backends_dtypes_and_kinds
def test_separate_tensors(backend: str, dtype: torch.dtype, kind: str) -> None:
    check(Case(kind, 4, 6), dtype, backend, apart=True)


def _strided(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "heads first":
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    if kind == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        wide[..., :-3] = x
        return wide[..., :-3]
    if kind == "behind a row":  # as a cls token leaves the patches, for more than one clip
        wide = x.new_full((x.shape[0], 1 + x.shape[1], *x.shape[2:]), float("nan"))
        wide[:, 1:] = x
        return wide[:, 1:]
    if kind == "channels first":  # the last dimension is strided, so it is copied
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    raise AssertionError(kind)


@backends_and_kinds
@pytest.mark.parametrize("stride", ["tokens first", "heads first", "sliced", "behind a row", "channels first"])
def test_strides(backend: str, kind: str, stride: str) -> None:
    """Strided inputs and gradients give what contiguous ones give."""
    case = Case(kind, 4, 6)
    attend = case.function()
    for dtype in (single_precision(backend), half_precision(backend)):
        inputs = to(case.inputs(dtype), device_of(backend))
        options = dict(case.options(), backend=backend)
        expected = evaluate(attend, inputs, options)
        for apart in (False, True):
            qkv = inputs["qkv"].detach().clone().requires_grad_()
            given: Any = tuple(_strided(x, stride) for x in qkv.unbind(-3)) if apart else _strided(qkv, stride)
            out = attend(given, **options)
            (grad,) = torch.autograd.grad(out, qkv, _strided(inputs["grad_out"], stride))
            assert torch.equal(out, expected["out"]), "out"  # type: ignore[arg-type]
            assert torch.equal(grad, expected["qkv"]), "gradient"  # type: ignore[arg-type]


@backends_and_kinds
def test_expanded_tensors(backend: str, kind: str) -> None:
    """A broadcast batch and the gradient of a sum, whose strides are zero."""
    case = Case(kind, 4, 6, batch=3)
    inputs = to(case.inputs(single_precision(backend)), device_of(backend))
    qkv = inputs["qkv"][:1].expand_as(inputs["qkv"]).requires_grad_()
    results = []
    for given, ones in ((qkv, None), (qkv.contiguous(), torch.ones_like(inputs["grad_out"]))):
        out = case.function()(given, **case.options(), backend=backend)
        loss = out.sum() if ones is None else (out * ones).sum()
        results.append((out, *torch.autograd.grad(loss, qkv)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@backends
@pytest.mark.parametrize("used", ["patches", "cls"])
def test_one_result_of_two(backend: str, used: str) -> None:
    """Per-frame contexts and patches go their own ways: a loss may use one of them alone."""
    case, dtype = Case("per_frame", 3, 5), single_precision(backend)
    qkv = case.inputs(dtype)["qkv"].to(device_of(backend)).requires_grad_()
    grads = []
    for chosen in (backend, "reference"):
        patches, cls = vidattn.spatial_attention(qkv, 3, cls_token="per_frame", backend=chosen)
        grads.append(torch.autograd.grad((patches if used == "patches" else cls).square().sum(), qkv)[0])
    torch.testing.assert_close(*grads, **about(dtype))


@backends
def test_the_mean_is_that_of_the_frames(backend: str) -> None:
    case, dtype = Case("mean", 7, 5, "hwt"), single_precision(backend)
    qkv = case.inputs(dtype)["qkv"].to(device_of(backend))
    mean = vidattn.spatial_attention(qkv, 7, token_order="hwt", cls_token="mean", backend=backend)
    patches, cls = vidattn.spatial_attention(qkv, 7, token_order="hwt", cls_token="per_frame", backend=backend)
    assert torch.equal(mean[:, 1:], patches)
    torch.testing.assert_close(mean[:, 0], cls.mean(1), **about(dtype, 1e-6, 1e-6))


@for_kinds([*BACKENDS, "auto"])
def test_empty_inputs(backend: str, kind: str) -> None:
    kind_of = {"dtype": single_precision(backend), "device": device_of(backend)}
    for batch, sites, heads in ((0, 3, 2), (2, 3, 0), (2, 0, 2)):
        case = Case(kind, 4, sites, batch=batch, heads=heads)
        if case.has_cls and sites == 0:  # refused: a cls token alone is no frame
            continue
        qkv = torch.randn(batch, 4 * sites + case.has_cls, 3, heads, 8, **kind_of, requires_grad=True)
        out = case.function()(qkv, **case.options(), backend=backend)
        assert out.numel() == 0 and out.shape[0] == batch
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.shape == qkv.shape and (grad == 0).all()


@for_kinds(BACKENDS, kinds=("temporal", "spatial", "mean", "factorized", *SEES_ALL))
def test_seventy_thousand_groups(backend: str, kind: str) -> None:
    """More groups than a 16-bit grid dimension counts."""
    frames, sites = (2, 35_000) if kind in ("temporal", "temporal_all") else (35_000, 2)
    if kind == "factorized":
        frames, sites = 70_000, 1
    case = Case(kind, frames, sites, batch=2, heads=1, head_dim=2)
    if kind == "factorized":
        case = replace(case, batch=1, num_temporal_heads=0)
    check(case, single_precision(backend), backend)


@backends_and_kinds
def test_offsets_beyond_two_to_the_31(backend: str, kind: str) -> None:
    """Clips further apart than an int32 counts elements; untouched pages of the storage cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = device_of(backend)
    step = 2**31 + 8
    dtype = half_precision(backend)
    storage = torch.empty(step + 4096, dtype=dtype, device=device)
    case = Case(kind, 2, 4)
    compact = case.inputs(dtype)["qkv"].to(device)
    far = storage.as_strided(compact.shape, (step, *compact.stride()[1:])).copy_(compact)
    attend, options = case.function(), dict(case.options(), backend=backend)
    assert torch.equal(attend(far, **options), attend(compact, **options))


@backends_and_kinds
def test_bitwise_repeatable(backend: str, kind: str) -> None:
    """Outputs and gradients, the cls token's too, repeat bit by bit, whatever the number of threads."""
    case = Case(kind, 9, 40, batch=3, heads=4, head_dim=16)
    if TRITON_INTERPRETED:
        case = replace(case, num_sites=10, batch=2, heads=2)
    for dtype in (single_precision(backend), half_precision(backend)):
        inputs = to(case.inputs(dtype), device_of(backend))
        options = dict(case.options(), backend=backend)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 3, 1, 2, 3):
                torch.set_num_threads(count if backend != "reference" else 1)
                results.append(evaluate(case.function(), inputs, options))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(result[name], results[0][name]) for name in result)  # type: ignore[arg-type]


@backends_and_dtypes
@pytest.mark.parametrize("sites", [6, 40])
def test_a_nan_stays_in_its_sequence_and_head(backend: str, dtype: torch.dtype, sites: int) -> None:
    """A NaN in q reaches its row, in v its channel, in k the rows of its sequence and head: no more, and no less."""
    frames, site, frame = 4, 3, 2
    for which in range(3):
        qkv = torch.randn(2, frames, sites, 3, 2, 8, device=device_of(backend)).to(dtype)
        qkv[1, frame, site, which, 1, 5] = float("nan")
        for over_time in (True, False):
            attend = vidattn.temporal_attention if over_time else vidattn.spatial_attention
            out: Any = attend(qkv.flatten(1, 2), frames, backend=backend)
            poisoned = torch.zeros_like(out, dtype=torch.bool).view(2, frames, sites, 2, 8)
            sequence = poisoned[1, :, site, 1] if over_time else poisoned[1, frame, :, 1]
            if which == 0:
                sequence[frame if over_time else site] = True
            elif which == 1:
                sequence[:] = True
            else:
                sequence[:, 5] = True
            assert torch.equal(out.isnan(), poisoned.view_as(out)), f"in {'qkv'[which]}, over time {over_time}"


@for_kinds(BACKENDS, kinds=SEES_ALL)
@pytest.mark.parametrize("sites", [6, 40])
def test_a_nan_reaches_a_cls_token_that_sees_all(backend: str, kind: str, sites: int) -> None:
    """Of a patch, in k and v: beside its sequence the cls token's row. Of the cls token in q: that row alone."""
    frames, frame, site = 5, 2, 3
    over_time = kind == "temporal_all"
    attend = vidattn.temporal_attention if over_time else vidattn.spatial_attention
    for place, which in itertools.product(("patch", "cls"), range(3)):
        qkv = torch.randn(2, 1 + frames * sites, 3, 2, 8, device=device_of(backend))
        token = 0 if place == "cls" else 1 + frame * sites + site
        qkv[1, token, which, 1, 5] = float("nan")
        out: Any = attend(qkv, frames, cls_query="all", backend=backend)
        poisoned = torch.zeros(2, 1 + frames * sites, 2, 8, dtype=torch.bool)
        patches = poisoned[1, 1:, 1].view(frames, sites, 8)
        reached = patches if place == "cls" else patches[:, site] if over_time else patches[frame]
        if which == 0:
            poisoned[1, token, 1] = True
        else:
            channels = slice(None) if which == 1 else 5
            reached[..., channels] = True
            poisoned[1, 0, 1, channels] = True
        assert torch.equal(out.isnan(), poisoned.flatten(2)), f"of the {place} in {'qkv'[which]}"


@for_kinds(BACKENDS, kinds=SEES_ALL)
def test_a_cls_token_that_sees_all_is_in_each_sequence_once(backend: str, kind: str) -> None:
    """What patches and the cls token get, from the other functions and from plain attention."""
    case = Case(kind, 3, 4, head_dim=16)
    qkv = case.inputs(torch.float32)["qkv"].to(device_of(backend))
    out = case.function()(qkv, **case.options(), backend=backend)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    whole = torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)
    torch.testing.assert_close(out[:, 0], whole.flatten(1))
    if kind == "spatial_all":
        patches, _ = vidattn.spatial_attention(qkv, 3, cls_token="per_frame", backend=backend)
        torch.testing.assert_close(out[:, 1:], patches)


@backends
def test_a_nan_of_a_gradient_stays_in_its_sequence_and_head(backend: str) -> None:
    """The same in the backward pass, for sequences that may share a tile."""
    for frames, sites in ((3, 8), (33, 2)):
        kind = {"dtype": single_precision(backend), "device": device_of(backend)}
        qkv = torch.randn(1, sites * frames, 3, 2, 8, **kind, requires_grad=True)
        out = vidattn.temporal_attention(qkv, frames, token_order="hwt", backend=backend)
        grad_out = torch.zeros_like(out)
        grad_out[0, frames + 1, 3] = float("nan")  # frame 1 of site 1, head 0
        (grad,) = torch.autograd.grad(out, qkv, grad_out)
        touched = grad[0, :, :, 0].isnan().flatten(1).any(1)  # by token
        expected = torch.zeros_like(touched)
        expected[frames : 2 * frames] = True
        assert torch.equal(touched, expected) and not grad[..., 1, :].isnan().any()


@for_kinds(BACKENDS_WITH_FLOAT64)
def test_float64_gradcheck(backend: str, kind: str) -> None:
    """Gradients of the op itself by finite differences, with and without dropout."""
    for dropout_p in (0.0, 0.4):
        case = Case(kind, 2, 3, "hwt", batch=1, head_dim=2, dropout_p=dropout_p)
        qkv = case.inputs(torch.float64)["qkv"].to(device_of(backend)).requires_grad_()

        def attend(qkv: Tensor, case: Case = case) -> Tensor:
            torch.manual_seed(5)
            return case.function()(qkv, **case.options(), backend=backend)

        assert torch.autograd.gradcheck(attend, (qkv,))
