"""The CUDA kernels of attention over time and over space on an emulated GPU: context and gradients.

Each case says what it is for. The rule is that of all kernels (tests/tolerance.py).
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from divided_cases import Case
from sequence_cases import BF16, F16, GRADIENT_VIEWS, KB, VIEWS, attend, differs, judge
from torch import Tensor

import tests.cuda_emulator as emulated
import vidattn
from tests.cuda_emulator import build

# More than the blocks of an emulated GPU: in the backward pass each has several, one after the other.
SMALL = Case("per_frame", 9, 19, heads=2, head_dim=16)
TIME = Case("temporal", 37, 7, heads=2, head_dim=16)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install()
    yield
    emulated.uninstall()


CASES: dict[str, tuple[Case, torch.dtype]] = {
    "TimeSformer, space": (Case("mean", 2, 196, "hwt", batch=1, heads=1, head_dim=64), BF16),
    "the same, float16": (Case("mean", 2, 196, "hwt", batch=1, heads=1, head_dim=64), F16),
    "ViViT, space": (Case("spatial", 2, 196, batch=1, heads=1, head_dim=64), BF16),
    "contexts of a cls token in each frame": (Case("per_frame", 2, 196, batch=1, heads=1, head_dim=64), F16),
    "ViViT, time and space": (Case("factorized", 33, 65, batch=1, heads=2, head_dim=64), BF16),
    "33 frames": (Case("temporal", 33, 3, "hwt", head_dim=64), BF16),
    "64 frames": (Case("temporal", 64, 3, "hwt", head_dim=64), BF16),
    "65 frames, whose delta is from a rounded context": (Case("temporal", 65, 3, head_dim=64), BF16),
    "96 frames": (Case("temporal", 96, 2, "hwt", head_dim=64), F16),
    "400 frames": (Case("temporal", 400, 1, batch=1, heads=1, head_dim=32), BF16),
    "a frame of 400 tokens": (Case("mean", 1, 399, batch=1, heads=1, head_dim=24), F16),
    "one frame": (Case("per_frame", 1, 40), BF16),
    "one frame over time": (Case("temporal", 1, 40), BF16),
    "one site": (Case("mean", 5, 1), F16),
    "one token": (Case("factorized", 1, 1), BF16),
    "time alone, of heads that may do both": (Case("factorized", 34, 3, heads=3, num_temporal_heads=3), BF16),
    "one head over time": (Case("factorized", 34, 35, heads=3, num_temporal_heads=1), F16),
    "long sequences, one after the other": (Case("mean", 4, 99, heads=2, head_dim=64), BF16),
    "a negative scale": (replace(SMALL, scale=-0.3), BF16),
    "a scale of 0": (replace(SMALL, scale=0.0), BF16),
    "a tiny scale": (replace(SMALL, scale=1e-6), BF16),
    "a large scale": (replace(SMALL, scale=2000.0), BF16),
    "large scores": (replace(SMALL, spread=30.0), F16),
    "huge scores": (replace(SMALL, spread=1e6), BF16),
    "huge scores over time": (replace(TIME, spread=1e6), BF16),
    "huge scores of long rows": (Case("mean", 2, 99, batch=1, spread=1e6), BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_sequences(name: str) -> None:
    judge(*CASES[name])


@pytest.mark.parametrize("first", range(1, 65, 8))
def test_every_head_dim(first: int) -> None:
    for head_dim in range(first, first + 8):
        judge(replace(SMALL, batch=1, head_dim=head_dim), F16)
        judge(replace(TIME, batch=1, num_sites=2, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [16, 14, 15])  # rows of 16, 4 and 2 bytes
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str, head_dim: int) -> None:
    for case in (SMALL, TIME, replace(SMALL, kind="mean", token_order="hwt")):
        judge(replace(case, head_dim=head_dim), view=VIEWS[name])


@pytest.mark.parametrize("name", GRADIENT_VIEWS)
def test_strides_of_the_gradient_that_comes_in(name: str) -> None:
    for case in (SMALL, TIME, replace(SMALL, kind="mean", num_sites=70)):
        judge(case, view_gradient=GRADIENT_VIEWS[name])


@pytest.mark.parametrize("used", ["patches", "cls"])
def test_one_result_of_two(used: str) -> None:
    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        qkv = SMALL.inputs(BF16)["qkv"].to(dtype).requires_grad_()
        patches, cls = vidattn.spatial_attention(qkv, SMALL.num_frames, cls_token="per_frame", backend=backend)
        return torch.autograd.grad((patches if used == "patches" else cls).sum(), qkv)[0]

    found, exact = gradient("cuda", BF16).double(), gradient("reference", torch.float64)
    assert (found - exact).abs().max() <= 0.01 * exact.abs().max()


LONG = Case("temporal", 400, 1, batch=1, heads=1, head_dim=64)
SPACE = CASES["TimeSformer, space"][0]


@pytest.mark.parametrize("limit", [99, pytest.param(163, marks=pytest.mark.slow), 227])
def test_every_size_of_shared_memory(limit: int) -> None:
    """400 keys of 64 elements come in blocks in the backward pass, and with 99 KB in the forward pass too."""
    with emulated.controls(shared_limit=limit * KB):
        judge(LONG)
        judge(replace(LONG, spread=1e5))
        judge(SPACE, F16)


@pytest.mark.parametrize(
    "limit", [34, pytest.param(36, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.slow)]
)
def test_many_blocks_of_keys(limit: int) -> None:
    with emulated.controls(shared_limit=limit * KB):
        judge(Case("mean", 2, 299, batch=1, heads=2, head_dim=24), F16)
        judge(Case("temporal", 300, 2, "hwt", batch=1, heads=1, head_dim=30, spread=1e5))


def test_short_sequences_in_blocks() -> None:
    """Short enough for statistics from all scores, if all keys were there at a time."""
    with emulated.controls(shared_limit=32 * KB):
        judge(Case("per_frame", 3, 40, batch=1, heads=1, head_dim=50))


@pytest.mark.parametrize("limit", [0, KB])  # 0: the device does not tell
def test_too_little_shared_memory_is_an_error(limit: int) -> None:
    inputs = SMALL.inputs(BF16)
    with emulated.controls(shared_limit=limit), pytest.raises(RuntimeError, match="too little shared memory"):
        attend(SMALL, **inputs)
    leaf = inputs["qkv"].requires_grad_()
    out = SMALL.function()(leaf, **SMALL.options(), backend="cuda")
    with emulated.controls(shared_limit=limit), pytest.raises(RuntimeError, match="too little shared memory"):
        torch.autograd.grad(out, leaf, inputs["grad_out"])


@pytest.mark.slow
def test_seventy_thousand_sites() -> None:
    try:
        emulated.install(checked=False)
        judge(Case("temporal", 2, 35_001, batch=2, heads=1, head_dim=2), F16)
        judge(Case("mean", 35_001, 2, batch=2, heads=1, head_dim=2), F16)
    finally:
        emulated.install()


@pytest.mark.slow
def test_rows_further_apart_than_31_bits_count() -> None:
    """In bytes: within a sequence, and between sequences. Untouched pages of the storage cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    step = 2**30 + 8
    storage = torch.empty(3 * step, dtype=F16)
    for case in (Case("temporal", 3, 1, batch=1, head_dim=8), Case("spatial", 3, 1, batch=1, head_dim=8)):
        compact = case.inputs(F16)["qkv"]
        far = storage.as_strided(compact.shape, (step, step, *compact.stride()[2:])).copy_(compact)
        options = dict(case.options(), backend="cuda")
        assert torch.equal(case.function()(far, **options), case.function()(compact, **options))


def check_many(bits: list[Tensor] | None = None) -> None:
    judge(SMALL, F16, bits=bits)
    judge(Case("mean", 9, 70, "hwt", batch=1, heads=2, head_dim=40), bits=bits)
    judge(TIME, bits=bits)
    judge(Case("factorized", 35, 34, batch=1, head_dim=12), F16, bits=bits)


@pytest.mark.parametrize("seed", [5, 7])
def test_any_order_gives_the_same_bits(seed: int) -> None:
    plain: list[Tensor] = []
    other: list[Tensor] = []
    check_many(plain)
    with emulated.controls(seed=seed):
        check_many(other)
    assert len(plain) == len(other) == 16
    assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


@pytest.mark.parametrize("seed", [5, 7])
def test_the_worst_rounding_that_is_allowed(seed: int) -> None:
    with emulated.controls(seed=seed, truncate=True, approximate=True):
        check_many()
        judge(SPACE)


def test_longer_sequences_are_refused() -> None:
    qkv = torch.randn(1, 401, 3, 1, 8).to(BF16)
    assert vidattn.why_not(vidattn.spatial_attention, qkv, 1, backend="cuda") == [
        "runs groups of up to 400 tokens, got 401"
    ]
    with pytest.raises(ValueError, match="up to 400 tokens, got 401"):
        vidattn.temporal_attention(qkv, 401, backend="cuda")
    expected = vidattn.temporal_attention(qkv, 401, backend="reference")
    torch.testing.assert_close(vidattn.temporal_attention(qkv, 401), expected, rtol=0.02, atol=0.02)
    judge(Case("factorized", 401, 1, batch=1, num_temporal_heads=0))  # no head attends over these frames


def test_a_cls_token_that_sees_all_is_refused() -> None:
    """By the public function with the reason; below it, where nobody asks, by the native op."""
    qkv = torch.zeros(1, 1 + 3 * 4, 3, 2, 16, dtype=BF16)
    with pytest.raises(ValueError, match="backend 'cuda' cannot run this call: runs cls_query 'own', got 'all'"):
        vidattn.temporal_attention(qkv, 3, cls_query="all", backend="cuda")
    options = (3, "thw", 2, "all", 0.25, 0.0, "cuda")
    with pytest.raises(RuntimeError, match="a cls token whose query sees the whole clip is not implemented"):
        torch.ops.vidattn.divided_attention(qkv, None, None, None, *options)


@pytest.mark.parametrize("case", [SMALL, TIME, replace(SMALL, kind="mean", num_sites=70)], ids=str)
def test_sequences_with_huge_scores_among_others(case: Case) -> None:
    """A block takes them another way, between those that it takes as usual."""
    inputs = case.inputs(BF16)
    patches = inputs["qkv"][:, case.has_cls :].unflatten(1, (case.num_frames, case.num_sites))
    for sequence in (1, 2, 5):
        (patches[0, :, sequence] if case.kind == "temporal" else patches[0, sequence])[..., :2, :, :] *= 1e4
    judge(case, inputs=inputs)


# ---- What is not finite ----


def spoiled_tokens(kind: str, frame: int | None, site: int) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Give the row of a token of SMALL or TIME, and of a mask (tokens, ...) the part that its sequences have.

    The tokens of a mask are a cls token, if there is one, and the patches.
    """
    frames, sites = (TIME.num_frames, TIME.num_sites) if kind == "temporal" else (SMALL.num_frames, SMALL.num_sites)
    cls = int(kind != "temporal")
    if frame is None:
        return 0, lambda mask: mask
    rows = slice(site, None, sites) if kind == "temporal" else slice(cls + frame * sites, cls + (frame + 1) * sites)
    assert frames > frame
    return cls + frame * sites + site, lambda mask: mask[rows]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("which", ["q", "k", "v", "gradient"])
@pytest.mark.parametrize(("kind", "frame"), [("mean", 1), ("mean", None), ("temporal", 20)])
def test_what_is_not_finite_stays_in_its_sequence_and_head(
    kind: str, frame: int | None, which: str, value: float
) -> None:
    """That of a cls token reaches its clip; the cls token gets what a frame has for it, other frames nothing."""
    case = TIME if kind == "temporal" else replace(SMALL, kind="mean")
    inputs = case.inputs(BF16)
    clean = attend(case, **inputs)
    row, part_of = spoiled_tokens(kind, frame, 2)
    if which == "gradient":
        inputs["grad_out"].unflatten(-1, (2, 16))[1, row, 1, 5] = value
    else:
        inputs["qkv"][1, row, "qkv".index(which), 1, 5] = value
    found = attend(case, **inputs)
    tokens = (2, inputs["qkv"].shape[1], 2)
    allowed = torch.zeros(tokens, dtype=torch.bool)
    part_of(allowed[1, :, 1])[:] = True
    if kind == "mean":
        allowed[1, 0, 1] = True
    changed = {name: differs(x.view(*tokens, 16), clean[name].view(*tokens, 16)).any(-1) for name, x in found.items()}
    for name, where in changed.items():
        assert not (where & ~allowed).any(), name
    assert any(bool(where.any()) for where in changed.values())
    assert not all(bool(x.isfinite().all()) for x in found.values())
    expected = case.function()(inputs["qkv"], **case.options(), backend="reference")
    assert torch.equal(found["out"].isfinite(), expected.isfinite())


# ---- How a block's shared memory is used ----


FORWARD = ("dim", "threads", "tiles", "splits", "block_keys", "resident", "shared_bytes")
BACKWARD = (
    *("dim", "threads", "warps", "warp_keys", "query_tile", "block_keys", "blocks", "rows", "score_tiles"),
    *("tokens", "shared_bytes", "walks", "helps", "key_warp", *(f"job_warps[{job}]" for job in range(2))),
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, int]]:
    folder = tmp_path_factory.mktemp("plan")
    passes = {
        "forward": (FORWARD, "plan_sequence_forward(keys, head_dim, 1000, limit)"),
        "backward": (BACKWARD, "plan_sequence_backward(keys, head_dim, limit)"),
    }
    functions = "".join(
        f"""extern "C" void {name}(int64_t keys, int64_t head_dim, int64_t limit, int64_t* out) {{
          const auto p = {call};
          const int64_t all[] = {{{", ".join(f"int64_t(p.{field})" for field in fields)}}};
          for (int64_t value : all) *out++ = value;
        }}
        """
        for name, (fields, call) in passes.items()
    )
    (folder / "plan.cpp").write_text(f'#include "cuda/plan.h"\nusing namespace vidattn::cuda;\n{functions}')
    compiled = folder / "plan.so"
    command = [build.COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{build.CSRC}", str(folder / "plan.cpp")]
    subprocess.run([*command, "-o", str(compiled)], check=True)
    library = ctypes.CDLL(str(compiled))

    def call(name: str, *numbers: int) -> dict[str, int]:
        fields = passes[name][0]
        out = (ctypes.c_int64 * len(fields))()
        getattr(library, name)(*map(ctypes.c_int64, numbers), out)
        return dict(zip(fields, out, strict=True))

    return call


def test_every_length_has_a_plan(plan: Callable[..., dict[str, int]]) -> None:
    for keys, head_dim, limit in itertools.product(range(1, 401), (1, 32, 33, 64), (99, 163, 227)):
        p = plan("forward", keys, head_dim, limit * KB)
        assert head_dim <= p["dim"] in (32, 64)
        assert p["shared_bytes"] <= limit * KB
        assert 32 <= p["threads"] <= (384 if p["dim"] == 32 else 256) and p["threads"] % 32 == 0
        assert p["tiles"] == -(-keys // 16) and p["splits"] == 1
        padded = -(-keys // 16) * 16
        assert p["block_keys"] == padded if p["resident"] else 48 <= p["block_keys"] < padded
        assert p["resident"] or (p["block_keys"] % 48 == 0 and limit == 99 and p["dim"] == 64)
        p = plan("backward", keys, head_dim, limit * KB)
        assert head_dim <= p["dim"] in (32, 64)
        assert p["shared_bytes"] <= limit * KB and p["tokens"] % 16 == 0
        assert p["threads"] == 32 * p["warps"] <= (384 if p["dim"] == 32 else 256)
        assert p["block_keys"] == (p["warps"] - p["helps"]) * p["warp_keys"] == p["rows"]
        assert (p["blocks"] - 1) * p["block_keys"] < keys <= p["blocks"] * p["block_keys"]
        assert p["query_tile"] == 32 and p["score_tiles"] == 1 + p["walks"]
        assert p["blocks"] == 1 or not p["walks"]
        assert all(0 <= p[name] < p["warps"] for name in ("key_warp", "job_warps[0]", "job_warps[1]"))


def test_a_frame_of_197_tokens_comes_in_one_block(plan: Callable[..., dict[str, int]]) -> None:
    for head_dim, limit in itertools.product((32, 64), (99, 163, 227)):
        assert plan("forward", 197, head_dim, limit * KB)["resident"]
        p = plan("backward", 197, head_dim, limit * KB)
        assert p["blocks"] == 1 and p["walks"] == (limit > (99 if head_dim == 32 else 163))
