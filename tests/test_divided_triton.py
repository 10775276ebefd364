"""What surrounds the Triton kernels of divided attention: plans, tiles, and what is around the buffers.

Their numbers are tested with those of all backends; test_triton_interpreter.py runs those tests, and the ones here that
need to run a kernel, where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from attention_cases import device_of, evaluate, seed_of, to
from divided_cases import Case, check
from torch import Tensor
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.gpu_plans import plan_divided, plan_mixing
from benchmarks.shapes import GPU_DIVIDED_CASES, GPU_MIXING_CASES, DividedCase
from vidattn import reference
from vidattn.calls import DividedCall
from vidattn.kernels import divided
from vidattn.kernels.divided_configs import (
    ShapeClass,
    candidate_configs,
    default_config,
    packed_config,
    padded_length,
)
from vidattn.kernels.launch import INTERPRETED, TARGETS
from vidattn.ops import _tensors as tensors

needs_triton = pytest.mark.needs_triton
KERNELS = ("divided_forward_packed", "divided_backward_packed")
STREAMS = ("divided_forward_stream", "divided_backward_queries", "divided_backward_keys")


def names(case: DividedCase, direction: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    return [launch.name for launch in plan_divided(case, direction, dtype, "sm_90")]


# ---- Plans ----


def test_short_sequences_take_one_launch_and_nothing_of_the_forward_pass() -> None:
    for name in ("timesformer_b_time", "timesformer_hr_time", "timesformer_32_frames_time", "timesformer_l_time"):
        assert names(GPU_DIVIDED_CASES[name], "forward") == ["divided_forward_packed"]
        assert names(GPU_DIVIDED_CASES[name], "backward") == ["divided_backward_packed"]
        (launch,) = plan_divided(GPU_DIVIDED_CASES[name], "backward", torch.bfloat16, "sm_90")
        assert {"lse", "out", "cls"}.isdisjoint(launch.arguments)


def test_long_sequences_are_streamed_and_the_cls_token_is_summed_apart() -> None:
    assert names(GPU_DIVIDED_CASES["timesformer_b_space"], "forward") == ["divided_forward_stream", "sum_frames"]
    backward = ["divided_backward_queries", "divided_backward_keys"]
    assert names(GPU_DIVIDED_CASES["timesformer_b_space"], "backward") == [*backward, "sum_frames"]
    assert names(GPU_DIVIDED_CASES["vivit_b_model3_space"], "backward") == backward
    packed = replace(GPU_DIVIDED_CASES["timesformer_b_space"], num_sites=49)
    assert names(packed, "backward") == ["divided_backward_packed", "sum_frames"]


def test_heads_over_time_and_over_space_are_launches_of_their_own() -> None:
    time, space = plan_divided(GPU_DIVIDED_CASES["vivit_b_model4"], "forward", torch.bfloat16, "sm_90")
    assert (time.name, space.name) == ("divided_forward_packed", "divided_forward_stream")
    assert (time.arguments["first_head"], time.arguments["heads"]) == (0, 6)
    assert (space.arguments["first_head"], space.arguments["heads"]) == (6, 6)
    assert all(launch.arguments["all_heads"] == 12 for launch in (time, space))


def test_where_only_the_keys_fit_into_a_tile_one_kernel_gives_all_gradients() -> None:
    """Products of float32 are multiply-adds, for which large tiles have no registers."""
    found = names(GPU_DIVIDED_CASES["timesformer_l_time"], "backward", torch.float32)
    assert found == ["divided_backward_keys"]


@pytest.mark.parametrize("batch", [1, 400])
def test_grids_cover_every_sequence_once(batch: int) -> None:
    """All along axis x, which alone is long enough: more than 65,535 programs."""
    case = replace(GPU_DIVIDED_CASES["timesformer_hr_time"], batch=batch)
    (launch,) = plan_divided(case, "forward", torch.bfloat16, "sm_90")
    per_tile = launch.arguments["BLOCK"] // 16
    assert launch.grid == 12 * -(-784 * batch // per_tile) and launch.arguments["num_groups"] == 784 * batch
    space = replace(GPU_DIVIDED_CASES["timesformer_b_space"], batch=batch)
    launch = plan_divided(space, "forward", torch.bfloat16, "sm_90")[0]
    assert launch.grid == 12 * 8 * batch * -(-197 // launch.arguments["BLOCK_M"])


@pytest.mark.parametrize("name", GPU_DIVIDED_CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_predictions_count_every_score_and_byte(name: str, direction: str) -> None:
    case = GPU_DIVIDED_CASES[name]
    launches = plan_divided(case, direction, torch.bfloat16, "sm_90")
    needed = case.flops("forward") // (4 * case.head_dim)
    moved = case.bytes_moved("forward", torch.bfloat16)
    if direction == "backward":
        moved = case.bytes_moved("forward_backward", torch.bfloat16) - moved
    queries = [launch for launch in launches if launch.work.scores and not launch.name.endswith("keys")]
    shorter_than_a_tile = case.kind == "temporal" and case.num_frames < 16
    scores = sum(launch.work.scores for launch in queries)
    assert needed <= scores <= (2 if shorter_than_a_tile else 1.78) * needed
    assert sum(launch.work.bytes for launch in launches) >= 0.998 * moved


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_launch_is_specialised_alike_whether_it_is_run_or_compiled_ahead(dropout_p: float) -> None:
    """By type, alignment and divisibility of each argument and each part of one, as Triton itself looks at them."""
    backend = make_backend(TARGETS["sm_90"])
    for case in (
        replace(GPU_DIVIDED_CASES["timesformer_b_time"], heads=3, head_dim=20),
        GPU_DIVIDED_CASES["timesformer_b_space"],
        GPU_MIXING_CASES["xvit_b_16_frames_div8"],
    ):
        plan = plan_divided if isinstance(case, DividedCase) else plan_mixing
        launches = [*plan(case, "forward", torch.bfloat16, "sm_90", dropout_p=dropout_p)]
        launches += plan(case, "backward", torch.bfloat16, "sm_90", dropout_p=dropout_p)
        for launch in launches:
            source, kernel = launch.source(), launch.kernel
            binder = create_function_from_signature(kernel.signature, kernel.params, backend)
            bound, specialisation, _ = binder(**launch.arguments)
            _, signature, constants, attributes = kernel._pack_args(backend, {}, bound, specialisation, {})
            assert source.signature == signature and source.constants == constants
            assert [type(kind) for kind in source.signature.values()] == [type(kind) for kind in signature.values()]
            assert source.attrs == {place: found for place, found in attributes.items() if found}


# ---- Tiles ----


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 16, 17, 33, 50, 64, 96, 128, 129, 196, 197, 256, 785, 1569])
def test_tiles_fit_the_sequence(length: int) -> None:
    for arch in (*TARGETS, "interpreter"):
        for block_d in (16, 32, 64, 128):
            for tensor_cores, itemsize in ((True, 2), (True, 4), (False, 4)):
                for dropout in (False, True):
                    shape = ShapeClass(arch, itemsize, tensor_cores, block_d, length, dropout)
                    for kernel in KERNELS:
                        packed = packed_config(kernel, shape)
                        if packed is not None:
                            assert packed.block_m >= length and packed.block_m in (16, 32, 64, 128)
                    for kernel in STREAMS:
                        for config in (default_config(kernel, shape), *candidate_configs(kernel, shape)):
                            for block in (config.block_m, config.block_n):
                                assert 16 <= block <= 128 and block & (block - 1) == 0
                                assert block < 2 * max(16, length)


def test_a_tail_holds_the_cls_token_and_little_else() -> None:
    """Full tiles never do: only the tail looks for it."""
    assert padded_length(197, True, 64) == (3, 16)
    assert padded_length(193, True, 64) == (3, 16)
    assert padded_length(192, True, 64) == (2, 64)
    assert padded_length(192, False, 64) == (3, 0)
    assert padded_length(785, True, 128) == (6, 32)


def test_a_wide_tile_is_not_taken_where_it_wastes() -> None:
    def block_n(length: int) -> int:
        return default_config("divided_forward_stream", ShapeClass("sm_90", 2, True, 64, length, False)).block_n

    assert block_n(785) == 128
    assert block_n(197) == 64  # 208 keys rather than 256


# ---- Memory: nothing beside the buffers is read or written ----


def _guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous tensor between two stretches of NaN, and a check that they still are."""
    guard = 4096
    storage = torch.full((math.prod(shape) + 2 * guard,), math.nan, dtype=dtype, device=device)

    def check_guards() -> None:
        assert storage[:guard].isnan().all() and storage[-guard:].isnan().all()

    return storage[guard:-guard].view(shape), check_guards


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case("temporal", 3, 7, "thw", head_dim=5),
        Case("mean", 3, 9, "hwt", head_dim=20),
        Case("mean", 2, 140, "hwt", batch=1),
        Case("temporal", 150, 2, "hwt", batch=1, head_dim=20, dropout_p=0.3),
        Case("factorized", 5, 33, dropout_p=0.3),
    ],
    ids=str,
)
def test_guards_around_every_buffer(case: Case, dtype: torch.dtype) -> None:
    device, seed = device_of("triton"), torch.tensor([11], device=device_of("triton"))
    inputs = to(case.inputs(dtype), device)
    checks: list[Callable[[], None]] = []

    def guarded(shape: Any, kind: torch.dtype, value: Tensor | None = None) -> Tensor:
        buffer, check_guards = _guarded(tuple(shape), kind, device)
        checks.append(check_guards)
        return buffer if value is None else buffer.copy_(value)

    batch, _, _, heads, head_dim = inputs["qkv"].shape
    patches = case.num_frames * case.num_sites
    q, k, v = (guarded(x.shape, dtype, x) for x in inputs["qkv"].unbind(-3))
    out, dout = (guarded((batch, patches, heads * head_dim), dtype) for _ in range(2))
    dout.copy_(inputs["grad_out"][:, -patches:])
    cls = dcls = mean = lse = None
    if case.has_cls:
        cls, dcls = (guarded((batch, case.num_frames, heads * head_dim), torch.float32) for _ in range(2))
        mean = guarded((batch, heads * head_dim), dtype)
        dcls.copy_((inputs["grad_out"][:, :1].float() / case.num_frames).expand_as(dcls))
    if max(case.num_frames, case.num_sites) > tensors.WHOLE_ROW_KEYS:
        lse = guarded((batch, patches + case.num_frames * case.has_cls, heads), torch.float32)
    temporal_heads = {"temporal": heads, "factorized": heads // 2}.get(case.kind, 0)
    call = DividedCall(
        q, k, v, seed if case.dropout_p else None,
        case.num_frames, case.token_order == "hwt", temporal_heads, head_dim**-0.5, case.dropout_p,
    )  # fmt: skip
    divided.forward(call, out, cls, mean, lse)
    grads = [guarded(q.shape, dtype) for _ in range(3)]
    kept = (None, None, None) if lse is None else (out, cls, lse)
    divided.backward(call, dout, dcls, *kept, *grads)
    for check_guards in checks:
        check_guards()
    wanted = evaluate(case.function(reference), to(inputs, torch.float64), dict(case.options(), seed=seed))
    found = {"out": out if mean is None else torch.cat((mean[:, None], out), 1), "qkv": torch.stack(grads, -3)}
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    for name, value in found.items():
        expected = wanted[name]
        assert expected is not None
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@needs_triton
def test_a_cls_token_that_sees_all_is_refused() -> None:
    """Below the public functions too, where nobody asks."""
    qkv = torch.zeros(1, 1 + 3 * 4, 3, 2, 16)
    options = (3, "thw", 2, "all", 0.25, 0.0, "triton")
    with pytest.raises(NotImplementedError, match="a cls token whose query sees the whole clip"):
        torch.ops.vidattn.divided_attention(qkv, None, None, None, *options)


# ---- Both ways through the same sequences ----


@needs_triton
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("kind", ["temporal", "mean", "per_frame", "factorized"])
def test_streamed_like_packed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Short sequences can be streamed too; without a log-sum-exp, the backward pass attends again."""
    monkeypatch.setattr(divided, "packed_config", lambda kernel, shape: None)
    for dropout_p in (0.0, 0.3):
        check(Case(kind, 5, 18, "hwt", batch=1, dropout_p=dropout_p), torch.float32, "triton")


@needs_triton
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("kind", ["temporal", "mean", "factorized"])
def test_whole_rows_need_no_log_sum_exp_and_may_have_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where the boundary between the two lies is nobody's business but that of speed."""
    for whole_row_keys in (4, 1000):
        monkeypatch.setattr(tensors, "WHOLE_ROW_KEYS", whole_row_keys)
        check(Case(kind, 5, 20, head_dim=16), torch.float32, "triton")
        check(Case(kind, 2, 150, batch=1, head_dim=16), torch.float32, "triton")


@needs_triton
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(4))
def test_neighbours_in_a_tile_do_not_see_what_is_not_finite(value: float, which: int) -> None:
    """Of q, k, v or the gradient of one of the sequences that are packed into one tile: all others as without it."""
    case = Case("temporal", 4, 9, "hwt", batch=1)
    inputs = to(case.inputs(torch.float32), device_of("triton"))
    options = dict(case.options(), backend="triton")
    clean = evaluate(case.function(), inputs, options)
    spoilt = {name: x.clone() for name, x in inputs.items()}
    if which < 3:
        spoilt["qkv"][0, 4 * 3 + 1, which, 1, 5] = value
    else:
        spoilt["grad_out"][0, 4 * 3 + 1, 8 + 5] = value
    found = evaluate(case.function(), spoilt, options)
    for name in ("out", "qkv"):
        ours, expected = found[name], clean[name]
        assert ours is not None and expected is not None
        for sequences in (slice(0, 12), slice(16, None)):
            assert torch.equal(ours[:, sequences], expected[:, sequences])


@needs_triton
def test_dropout_of_packed_sequences_is_that_of_each_alone() -> None:
    """The mask is counted by the sequence and the position in it, wherever a tile holds them."""
    seed = seed_of(3).to(device_of("triton"))
    qkv = torch.randn(1, 5 * 7, 3, 2, 8, device=device_of("triton"))
    out = torch.empty(1, 5 * 7, 16, device=qkv.device)
    call = DividedCall(
        *qkv.unbind(2), seed, num_frames=5, time_fastest=True, temporal_heads=2, scale=0.3, dropout_p=0.4
    )
    divided.forward(call, out, None, None, None)
    expected = reference.temporal_attention(qkv, 5, token_order="hwt", scale=0.3, dropout_p=0.4, seed=seed)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# ---- Configurations ----


def test_autotuning_tries_cuts_of_every_architecture() -> None:
    shape = ShapeClass("sm_90", 2, True, 64, 785, False)
    for kernel in STREAMS:
        tried = candidate_configs(kernel, shape)
        assert default_config(kernel, shape) in tried and len(tried) > 3
        assert len(set(tried)) == len(tried)
