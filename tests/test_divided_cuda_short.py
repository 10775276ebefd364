"""The CUDA kernels of short sequences on an emulated GPU, against the reference: both passes, and one mistake each.

Whoever changes a statement that a mistake spoils chooses another one here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import evaluate
from cuda_mistakes import Edits, chosen_mistakes, compile_all, spoil
from divided_cases import Case, check
from tolerance import OUTPUT_FACTOR, assert_close
from torch import Tensor

import tests.cuda_emulator as emulated
from tests.cuda_emulator import build
from vidattn.ops import _tensors as tensors
from vidattn.ops import divided

BF16, F16 = torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
LENGTHS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32)
HEAD_DIMS = (1, 7, 16, 32, 40, 64)


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    emulated.install()
    if mistakes := chosen_mistakes(request):
        compile_all([edits(None), *map(edits, mistakes)])
    yield
    emulated.uninstall()


def over(axis: str, length: int, **options: Any) -> Case:
    """Sequences of a length, more than fill the tiles."""
    if axis == "temporal":
        return Case(axis, length, 5, heads=3, **options)
    if axis == "spatial":
        return Case(axis, 5, length, heads=3, **options)
    return Case("factorized", length, 5, heads=2, num_temporal_heads=2, **options)  # all heads over time


# ---- Numbers ----

WAYS = list(itertools.product(("temporal", "spatial", "factorized"), ("thw", "hwt"), (BF16, F16)))


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int) -> None:
    """Each with two of the head dimensions, orders, axes and dtypes; all of them are slow."""
    number = LENGTHS.index(length)
    for head_dim, way in ((HEAD_DIMS[number % 6], 5 * number), (HEAD_DIMS[(number + 3) % 6], 5 * number + 6)):
        axis, order, dtype = WAYS[way % len(WAYS)]
        check(over(axis, length, token_order=order, head_dim=head_dim), dtype, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_all_lengths(length: int, head_dim: int) -> None:
    for axis, order, dtype in WAYS:
        for apart in (False, True):
            check(over(axis, length, token_order=order, head_dim=head_dim), dtype, "cuda", apart=apart)


@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, 33))
def test_every_length(length: int) -> None:
    check(Case("temporal", length, 21, "hwt", head_dim=32), BF16, "cuda")
    check(Case("factorized", length, 33 - length, heads=5, num_temporal_heads=3, head_dim=48), F16, "cuda")


@pytest.mark.parametrize("order", ["thw", "hwt"])
def test_heads_over_time_and_over_space(order: str) -> None:
    check(Case("factorized", 6, 9, order, heads=4, head_dim=24), F16, "cuda")
    check(Case("factorized", 20, 4, order, heads=3, head_dim=40, num_temporal_heads=1), BF16, "cuda", apart=True)


ADVERSARIAL = {
    "large scores": (Case("temporal", 8, 3, head_dim=16, spread=30.0), BF16, (1, 1, 1, 1)),
    "huge scores": (Case("temporal", 5, 7, head_dim=64, spread=1e4), BF16, (1, 1, 1, 1)),
    "scores past float16": (Case("temporal", 9, 3, head_dim=32, spread=1e3), F16, (1, 1, 1, 1)),
    "a scale of 0": (Case("temporal", 17, 3, scale=0.0, spread=1e3), BF16, (1, 1, 1, 1)),
    "a negative scale": (Case("spatial", 3, 12, scale=-0.4, spread=20.0), F16, (1, 1, 1, 1)),
    "a tiny scale": (Case("spatial", 3, 12, scale=1e-6, spread=1e3), BF16, (1, 1, 1, 1)),
    "gradients of scores past float16": (Case("temporal", 8, 3, head_dim=32), F16, (1e-2, 1e-2, 300, 300)),
    "gradients of scores below float16": (Case("temporal", 20, 3, head_dim=16), F16, (0.03, 0.03, 1e-3, 1e-3)),
    "hardly any gradients": (Case("temporal", 8, 3, head_dim=16), F16, (0.0, 1, 1e-7, 1e-7)),
    "values past the square root of float32": (Case("temporal", 8, 3), BF16, (1, 1, 1e30, 1e-30)),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_numbers_of_any_size(name: str) -> None:
    case, dtype, sizes = ADVERSARIAL[name]
    inputs = case.inputs(torch.float64)
    inputs["qkv"] *= torch.tensor(sizes[:3])[:, None, None]
    inputs["grad_out"] *= sizes[3]
    check(case, dtype, "cuda", inputs={key: x.to(dtype) for key, x in inputs.items()})


def same_kind(actual: Tensor, expected: Tensor) -> bool:
    """Whether infinities and NaN are in the same places."""
    return all(torch.equal(kind(actual), kind(expected)) for kind in (torch.isnan, torch.isposinf, torch.isneginf))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "gradient"])
def test_what_is_not_finite(value: float, which: int) -> None:
    """It goes where it goes in the reference, and its neighbours in a tile have the same bits as without it."""
    for case, dtype in ((Case("temporal", 4, 9, "hwt", batch=1), BF16), (Case("temporal", 9, 4, "hwt", batch=1), F16)):
        clean, inputs = (case.inputs(dtype) for _ in range(2))
        row, own = case.num_frames + 1, slice(case.num_frames, 2 * case.num_frames)
        if which < 3:
            inputs["qkv"][0, row, which, 1, 5] = value
        else:
            inputs["grad_out"][0, row, 8 + 5] = value
        found, without, plain = (
            evaluate(case.function(), given, dict(case.options(), backend=backend))
            for given, backend in ((inputs, "cuda"), (clean, "cuda"), (inputs, "reference"))
        )
        for name in ("out", "qkv"):
            actual, expected, neighbours = found[name], plain[name], without[name]
            assert actual is not None and expected is not None and neighbours is not None
            assert same_kind(actual, expected), name
            for others in (slice(0, own.start), slice(own.stop, None)):
                assert torch.equal(actual[:, others], neighbours[:, others]), name


@pytest.mark.parametrize("length", [5, 16, 20])
def test_rows_without_a_weight(length: int) -> None:
    """All scores of a row are -inf: the context is 0, and so is what follows from it."""
    case = Case("temporal", length, 3)
    for dtype in (BF16, F16):
        inputs = case.inputs(dtype)
        inputs["qkv"][:, :, 0, 0, 0], inputs["qkv"][:, :, 1, 0, 0] = 1.0, -INF
        found, plain = (
            evaluate(case.function(), inputs, dict(case.options(), backend=backend))
            for backend in ("cuda", "reference")
        )
        assert found["out"] is not None and bool((found["out"][..., : case.head_dim] == 0).all())
        for name in ("out", "qkv"):
            assert same_kind(found[name], plain[name])  # type: ignore[arg-type]


def test_the_log_sum_exp() -> None:
    """What a call that has long sequences too asks for; -inf for a row without a weight."""
    for length, dtype in ((5, BF16), (20, F16)):
        qkv = Case("temporal", length, 4, "hwt", head_dim=16).inputs(dtype)["qkv"]
        qkv[0, 0, 0, :, 0], qkv[0, :length, 1, :, 0] = 1.0, -INF
        options = divided.Options(length, "hwt", 2, None, 0.25, 0.0)
        call = divided._call(divided.Inputs(qkv, None, None), options, "cuda")
        lse = torch.empty(2, 4 * length, 2)
        divided.launch_functions("cuda")[0](call, qkv.new_empty(2, 4 * length, 32), None, None, lse)
        q, k = (x.unflatten(1, (4, length)) for x in qkv.unbind(-3)[:2])
        plain, exact = (
            (0.25 * torch.einsum("bnihd,bnjhd->bnijh", q.to(wide), k.to(wide))).logsumexp(3).flatten(1, 2)
            for wide in (torch.float32, torch.float64)
        )
        assert bool((lse[0, 0] == -INF).all())
        rows = exact.isfinite()
        assert torch.equal(rows, lse.isfinite())
        assert_close("log-sum-exp", lse[rows], plain[rows], exact[rows], torch.float32, OUTPUT_FACTOR)


def test_nothing_is_saved_that_short_sequences_do_not_need() -> None:
    header = (build.CSRC / "cuda" / "divided_short.h").read_text()
    assert f"kShortLength = {tensors.CUDA_WHOLE_ROW_KEYS};" in header

    def rows(heads_over_time: int, frames: int, sites: int, cls_token: str | None = None) -> int:
        qkv = torch.empty(1, frames * sites + (cls_token is not None), 3, 2, 8, dtype=BF16)
        options = divided.Options(frames, "thw", heads_over_time, cls_token, 1.0, 0.0)
        return divided._new_outputs(divided.Inputs(qkv, None, None), options, "cuda")[2].shape[1]

    assert rows(2, 32, 33) == rows(0, 33, 32) == rows(1, 32, 32) == 0
    assert rows(2, 33, 2) == 66 and rows(1, 33, 2) == 66 and rows(0, 3, 7, "mean") == 24


# ---- Memory ----


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "heads first":
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    more = {"rows of 2 bytes more": 1, "rows of 4 bytes more": 2, "rows of 16 bytes more": 8}.get(kind)
    if more:
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + more), NAN)
        wide[..., :-more] = x
        return wide[..., :-more]
    if kind == "behind a row":  # as a cls token leaves the patches
        wide = x.new_full((x.shape[0], 1 + x.shape[1], *x.shape[2:]), NAN)
        wide[:, 1:] = x
        return wide[:, 1:]
    wide = x.new_full((x.numel() + 1,), NAN)
    wide[1:] = x.flatten()
    return wide[1:].view(x.shape)


KINDS = ("heads first", "rows of 2 bytes more", "rows of 4 bytes more", "rows of 16 bytes more", "behind a row", "odd")


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: str) -> None:
    """Strided tensors give what contiguous ones give, packed or apart."""
    for case in (Case("temporal", 5, 4, head_dim=16), Case("spatial", 2, 17, head_dim=40)):
        inputs = case.inputs(BF16)
        expected = evaluate(case.function(), inputs, dict(case.options(), backend="cuda"))
        for apart in (False, True):
            qkv = inputs["qkv"].detach().clone().requires_grad_()
            given: Any = tuple(strided(x, kind) for x in qkv.unbind(-3)) if apart else strided(qkv, kind)
            out = case.function()(given, **case.options(), backend="cuda")
            (grad,) = torch.autograd.grad(out, qkv, strided(inputs["grad_out"], kind))
            assert torch.equal(out, expected["out"]) and torch.equal(grad, expected["qkv"])  # type: ignore[arg-type]


def test_tensors_without_a_batch_of_their_own() -> None:
    """Strides of 0: an expanded clip, and the gradient of a sum."""
    case = Case("temporal", 4, 6, batch=3, head_dim=16)
    qkv = case.inputs(F16)["qkv"][:1].expand(3, -1, -1, -1, -1).requires_grad_()
    found = []
    for given in (qkv, qkv.contiguous()):
        out = case.function()(given, **case.options(), backend="cuda")
        found.append((out, *torch.autograd.grad(out.float().sum(), qkv)))
    assert all(map(torch.equal, *found))


def test_empty_calls() -> None:
    for batch, frames, sites in ((0, 3, 2), (2, 3, 0)):
        case = Case("temporal", frames, sites, batch=batch)
        found = evaluate(case.function(), case.inputs(BF16), dict(case.options(), backend="cuda"))
        assert all(x is not None and x.numel() == 0 for x in found.values())


@pytest.mark.slow
def test_more_sites_than_65535() -> None:
    case = Case("temporal", 2, 70_000, "hwt", batch=1, heads=1)
    emulated.install(checked=False)
    try:
        check(case, BF16, "cuda")
    finally:
        emulated.install()


def test_orders_of_lanes_and_blocks_leave_the_bits() -> None:
    for case in (Case("temporal", 8, 9, head_dim=40), Case("factorized", 3, 20, heads=4, head_dim=7)):
        found = []
        for seed in (0, 3, 6):
            with emulated.controls(seed=seed):
                found.append(evaluate(case.function(), case.inputs(F16), dict(case.options(), backend="cuda")))
        for name, value in found[0].items():
            assert all(torch.equal(value, other[name]) for other in found[1:])  # type: ignore[arg-type]


def test_products_as_inexact_as_those_of_a_gpu() -> None:
    with emulated.controls(truncate=True, approximate=True):
        check(Case("temporal", 8, 9, head_dim=64), BF16, "cuda")
        check(Case("spatial", 3, 20, head_dim=32), F16, "cuda")


# ---- Mistakes ----

CUH, CU = "divided_short.cuh", "divided_short.cu"
# How it shows, and what is spoiled: the file, a pattern in it, and what stands in place of the first match.
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "sequences see each other": ("off by", CUH, r"visible_\[e\] = .*?;", "visible_[e] = ~0u;"),
    "the last key is hidden": ("off by", CUH, r"\(~0u >> \(32 - length\)\)", "(~0u >> (33 - length))"),
    "the keys of another lane": ("off by", CUH, r"<< \(n - place\) >> \(lane % 4 \* 2\)", "<< (n - place) >> 0"),
    "rows of the first clip": ("unwritten|race", CUH, r"clip_\[e\] = clip;", "clip_[e] = 0;"),
    "the first heads": ("unwritten|race", CUH, r"int\(a\.call\.first_head\) \+ ", ""),
    "rows between the steps": ("unwritten|race", CUH, r"place \* int\(a\.call\.position_step\)", "place"),
    "more sequences than there are": ("out of bounds", CUH, r"sequence < a\.sequences", "true"),
    "more sequences than fit": ("race", CUH, r"number < a\.per_tile && ", ""),
    "pairs of elements in another order": ("off by", CUH, r"y\[j\]\[part\]\[i\], y", "y[j][part][i + 1], y"),
    "weights in another order": ("off by", CUH, r"\{upper\[keys\], lower\[keys\]", "{lower[keys], upper[keys]"),
    "values are not turned": (
        "off by",
        CUH,
        r"low = gpu::transpose\(x\[keys\]\[part\]\[i\]\)",
        "low = x[keys][part][i]",
    ),
    "weights are not turned": ("off by", CUH, r"transpose\(weights\);(\s*write\(kDv)", r"\1"),
    "gradients of scores are not turned": ("off by", CUH, r"transpose\(weights\);(\s*write\(kDk)", r"\1"),
    "the maximum of one lane": ("off by", CUH, r"most = of_quad\(most", "most = std::max(most, most); of_quad(most"),
    "no scale of the gradient": ("off by", CUH, r"a\.scale \* size", "size"),
    "delta is not taken off": ("off by", CUH, r"\(gradient - delta\)", "gradient"),
    "gradients of scores leave float16": ("off by", CUH, r"!std::is_same_v<T, __half>", "true"),
    "their size is not undone": ("off by", CUH, r"a\.scale \* size", "a.scale"),
    "an empty row is divided by its sum": ("not finite", CUH, r"sum == 0\.0f \? 0\.0f : ", ""),
    "an empty row has no maximum": ("not finite", CUH, r"most == lowest \? 0\.0f : most", "most"),
    "nobody takes turns": ("not finite", CUH, r"!__any_sync\(~0u, bad\)", "true"),
    "the first sequence takes all turns": ("not finite", CUH, r"only == number\)", "number == 0)"),
    "elements behind the head are read": ("out of bounds|off by", CUH, r"&& first < dim\) piece", ") piece"),
    "what is no row is written": ("out of bounds", CUH, r"if \(token_\[e\] < 0\) continue;", ""),
    "one block too few": ("unwritten|none", CU, r"uint32_t\(ceil_div\(tiles, kWarps\)\)", "uint32_t(tiles / kWarps)"),
    "all rows are taken for aligned": ("misaligned", CU, r"bits % 16 == 0 \? 16", "true ? 16"),
}

# The others take as long again.
DEFAULT = (
    "sequences see each other",
    "gradients of scores are not turned",
    "gradients of scores leave float16",
    "nobody takes turns",
)
CHOICES = [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in MISTAKES]


def few_kernels(text: str) -> str:
    """Leave those that the case below runs, which compile in a fraction of the time."""
    text = re.sub(r"head_dim <= 32 \? (.*?) : kernel_for<T, 64>\(rows, backward\)", r"\1", text)
    return re.sub(
        r"(?s)call\.element == Element::float16\s*\? (.*?)\s*: kernel_for<__nv_bfloat16>\(.*?\);", r"\1;", text
    )


def edits(mistake: str | None) -> Edits:
    """Give what is done to the files."""
    if mistake is None:
        return {CU: few_kernels}
    _, file, pattern, spoiled = MISTAKES[mistake]
    edit = spoil(mistake, file, pattern, spoiled)
    return {CU: lambda text: few_kernels(edit(text))} if file == CU else {CU: few_kernels, file: edit}


def attend(mistake: str | None) -> None:
    """Run a case that all parts of the kernels have a share in: 6 and 7 rows, two clips, heads of 24 elements."""
    case = Case("factorized", 6, 7, heads=4, head_dim=24)
    usual, large, empty, poisoned = (case.inputs(F16) for _ in range(4))
    large["qkv"] *= torch.tensor([0.01, 0.01, 300.0], dtype=F16)[:, None, None]
    large["grad_out"] *= 300.0
    empty["qkv"][:, :, 0, :, 0], empty["qkv"][:, :, 1, :, 0] = 1.0, -INF
    poisoned["qkv"][0, 4, :, :, 0] = NAN
    with emulated.edited(edits(mistake)):
        check(case, F16, "cuda", inputs=usual)
        check(case, F16, "cuda", inputs=large)
        unaligned = replace(case, head_dim=23)
        check(unaligned, F16, "cuda")
        for inputs in (empty, poisoned):
            found, plain = (
                evaluate(case.function(), inputs, dict(case.options(), backend=backend))
                for backend in ("cuda", "reference")
            )
            for name in ("out", "qkv"):
                assert same_kind(found[name], plain[name]), "not finite elsewhere"  # type: ignore[arg-type]


def test_the_kernels_without_a_mistake_pass() -> None:
    attend(None)


@pytest.mark.parametrize("mistake", CHOICES)
def test_a_mistake_shows(mistake: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=MISTAKES[mistake][0]):
        attend(mistake)
