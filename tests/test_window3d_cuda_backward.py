"""The CUDA kernels of the window family on an emulated GPU, against the reference: the gradients.

The cases are those of the forward pass. Gradients go through the public functions and autograd, so that what the
forward pass saves is part of it.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from test_window3d_cuda import BF16, CASES, F16, INF, KB, LOWEST, VIEWS, WINDOW
from tolerance import GRADIENT_FACTOR, assert_close
from torch import Tensor

import tests.cuda_emulator as emulated
import vidattn
from tests.cuda_emulator import build
from vidattn import geometry as geo

WHOLE_ROWS = 64  # keys of a row that is read twice, so that its delta is exact
MORE_CASES: dict[str, dict[str, Any]] = {
    "196 tokens": {"grid": (4, 7, 7), "window_size": (4, 7, 7), "heads": 1},
    "196 tokens, shifted, padded, 64 elements": {
        "grid": (6, 12, 5),
        "window_size": (4, 7, 7),
        "shift": (2, 3, 3),
        "heads": 1,
        "pad": True,
        "head_dim": 64,
        "dtype": F16,
    },
    "7 deep, shifted in all axes": {"grid": (10, 3, 9), "window_size": (7, 2, 7), "shift": (3, 1, 2), "dtype": F16},
    "7 high and 8 wide, padded": {"grid": (3, 9, 10), "window_size": (2, 7, 8), "shift": (1, 3, 4), "pad": True},
    "7 deep and high, -inf": {"grid": (9, 7, 2), "window_size": (7, 7, 1), "shift": (3, 0, 0), "mask_value": -INF},
    "49 tokens, padded": {
        "grid": (2, 10, 9),
        "window_size": (1, 7, 7),
        "shift": (0, 3, 3),
        "pad": True,
        "head_dim": 24,
        "batch": 2,
    },
    "49 tokens, huge logits": {"grid": (1, 9, 7), "window_size": (1, 7, 7), "size": 1e6, "pad": True},
    "343 tokens": {"grid": (7, 7, 7), "window_size": (7, 7, 7), "heads": 1},
    "392 tokens, shifted in all axes, padded": {
        "grid": (13, 9, 10),
        "window_size": (8, 7, 7),
        "shift": (3, 2, 3),
        "heads": 1,
        "head_dim": 24,
        "pad": True,
        "dtype": F16,
    },
    "392 tokens, a mask that hides little": {
        "grid": (16, 9, 14),
        "window_size": (8, 7, 7),
        "shift": (4, 2, 3),
        "heads": 1,
        "mask_value": -1.5,
    },
    "392 tokens, -inf": {
        "grid": (8, 14, 14),
        "window_size": (8, 7, 7),
        "shift": (0, 3, 3),
        "heads": 1,
        "mask_value": -INF,
    },
    "392 tokens, clipped to 8 of 16, no table": {
        "grid": (8, 7, 7),
        "window_size": (16, 7, 7),
        "heads": 1,
        "dtype": F16,
        "table": False,
    },
    "392 tokens, a table of a larger window": {
        "grid": (8, 7, 7),
        "window_size": (9, 8, 9),
        "heads": 1,
        "bias_index": "geometric",
    },
    "392 tokens, huge logits": {
        "grid": (8, 7, 7),
        "window_size": (8, 7, 7),
        "heads": 1,
        "size": 1e6,
    },
    "392 tokens, rows of 12 bytes": {"grid": (8, 7, 7), "window_size": (8, 7, 7), "heads": 1, "head_dim": 6},
    "144 tokens": {"grid": (1, 12, 24), "window_size": (1, 12, 12), "shift": (0, 6, 6), "heads": 1},
    "8 frames of 16, the others padding": {
        "grid": (4, 7, 7),
        "window_size": (4, 8, 8),
        "shift": (2, 0, 4),
        "heads": 1,
        "pad": True,
    },
}
SLOW = ("343 tokens", "depth fastest, shifted in all axes, padded", "depth fastest, two times 8, -inf")


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install()
    yield
    emulated.uninstall()


def judge(
    attend: Callable[..., Tensor],
    given: dict[str, Tensor],
    dout: Tensor,
    whole_rows: bool,
    bits: list[Tensor] | None = None,
) -> None:
    """Compare the gradients of a function of tensors with those of the reference, in this dtype and in float64."""

    def gradients(backend: str, wide: bool) -> tuple[Tensor, ...]:
        leaves = {name: (x.double() if wide else x).detach().requires_grad_() for name, x in given.items()}
        out = attend(backend, **leaves)
        return torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))

    before = emulated.blocks_run()
    found = gradients("cuda", False)
    assert emulated.blocks_run() > before
    expected, exact = gradients("reference", False), gradients("reference", True)
    for name, actual, plain, true in zip(given, found, expected, exact, strict=True):
        strict = name == "table" and whole_rows
        dtype = torch.float32 if strict else dout.dtype
        parts = {name: (actual, plain, true)}
        if name == "qkv":
            parts = {f"d{x}": tuple(y[..., i, :, :] for y in parts["qkv"]) for i, x in enumerate("qkv")}  # type: ignore[misc]
        for part, results in parts.items():
            assert_close(part, *results, dtype, GRADIENT_FACTOR)
    if bits is not None:
        bits.extend(found)


def check(
    grid: tuple[int, int, int],
    window_size: tuple[int, int, int],
    shift: tuple[int, int, int] = (0, 0, 0),
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = BF16,
    table: bool = True,
    spread: float = 1.0,
    pad: bool = False,
    size: float = 1.0,
    scale: float | None = None,
    mask_value: float = -100.0,
    bias_index: str = "prefix",
    wrap: tuple[bool, bool, bool] = (False, False, False),
    view: Callable[[Tensor], Any] = lambda qkv: qkv,
    view_dout: Callable[[Tensor], Tensor] = lambda dout: dout,
    needs_table: bool = True,
    bits: list[Tensor] | None = None,
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(batch, *grid, 3, heads, head_dim)
    qkv[..., :2, :, :] *= size
    viewed = view(qkv.to(dtype))
    given = dict(zip("qkv", viewed, strict=True)) if isinstance(viewed, tuple) else {"qkv": viewed}
    constant = torch.randn(geo.num_bias_rows(window_size), heads) * spread if table else None
    if constant is not None and needs_table:
        given["table"] = constant
    if pad:
        given["pad"] = torch.randn(3, heads, head_dim).to(dtype)
    dout = view_dout(torch.randn(batch, *grid, heads * head_dim).to(dtype))
    options = {"window_size": window_size, "shift_size": shift, "wrap": wrap, "bias_index": bias_index}

    def attend(backend: str, **x: Tensor) -> Tensor:
        tokens: Any = x["qkv"] if "qkv" in x else (x["q"], x["k"], x["v"])
        wide = constant.double() if constant is not None and dout.dtype != tokens[0].dtype else constant
        return vidattn.window3d_attention(
            tokens,
            x.get("table", wide),
            pad_qkv=x.get("pad"),
            mask_value=mask_value,
            scale=scale,
            backend=backend,
            **options,  # type: ignore[arg-type]
        )

    windows = geo.resolve_windows(grid, window_size, shift, wrap)
    judge(attend, given, dout, windows.num_tokens <= WHOLE_ROWS, bits)


def check_dense(
    groups: int, tokens: int, *, head_dim: int = 32, dtype: torch.dtype = BF16, bias: bool = True, mask: Any = None
) -> None:
    torch.manual_seed(0)
    added = torch.randn(2, tokens, tokens).to(dtype) if bias else None
    made = None
    if mask is not None:
        made = torch.zeros(2, tokens, tokens)
        made[0, :, 3:9] = made[1, 4] = mask
    given = {"qkv": torch.randn(groups, tokens, 3, 2, head_dim).to(dtype)}
    dout = torch.randn(groups, tokens, 2 * head_dim).to(dtype)
    judge(
        lambda backend, qkv: vidattn.window_attention(qkv, added, made, backend=backend),
        given,
        dout,
        tokens <= WHOLE_ROWS,
    )


# ---- Windows of a grid ----


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in (*CASES, *MORE_CASES)]
)
def test_windows(name: str) -> None:
    check(**{**CASES, **MORE_CASES}[name])


@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 24, 30, 40, 48, 64])
def test_head_dims(head_dim: int) -> None:
    check((2, 8, 6), WINDOW, (0, 2, 1), head_dim=head_dim, pad=True)


@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str) -> None:
    check((2, 8, 6), WINDOW, (0, 2, 1), batch=2, view=VIEWS[name])


DOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row for all": lambda dout: dout[:1, :1, :1, :1].expand_as(dout),
    "of a transposed grid": lambda dout: dout.transpose(1, 3).contiguous().transpose(1, 3),
    "at an odd element": lambda dout: torch.cat([dout[..., :1], dout], -1)[..., 1:],
}


@pytest.mark.parametrize("name", DOUTS)
def test_strides_of_the_gradient_that_comes_in(name: str) -> None:
    check((4, 4, 6), WINDOW, (1, 2, 1), view_dout=DOUTS[name])
    check((2, 7, 5), (2, 7, 5), heads=1, view_dout=DOUTS[name])


def test_gradients_that_nobody_wants() -> None:
    check((2, 8, 6), WINDOW, (0, 2, 1), needs_table=False)
    check((2, 7, 5), (2, 7, 5), needs_table=False)
    check((8, 7, 7), (8, 7, 7), heads=1, needs_table=False)


def test_several_windows_a_share() -> None:
    """Tables of this size leave room for 4 shares of the windows of a head."""
    check((1, 2, 3), (16, 15, 15), batch=9, heads=40, head_dim=8, pad=True, bias_index="geometric")


@pytest.mark.slow
def test_many_windows() -> None:
    try:
        emulated.install(checked=False)
        check((1, 1, 7_000), (1, 1, 1), heads=1, head_dim=8)
        check((1, 1, 6_200 * 4), (1, 1, 4), (0, 0, 2), heads=1, head_dim=8, pad=True)
    finally:
        emulated.install()


def check_many(bits: list[Tensor] | None = None) -> None:
    check((4, 7, 10), (4, 5, 5), (0, 2, 2), pad=True, dtype=F16, bits=bits)
    check((2, 8, 6), WINDOW, (0, 2, 1), bits=bits)
    check((8, 9, 7), (8, 7, 7), (0, 3, 0), heads=1, pad=True, bits=bits)


@pytest.mark.parametrize("seed", [5, 7])
def test_any_order_gives_the_same_bits(seed: int) -> None:
    plain: list[Tensor] = []
    other: list[Tensor] = []
    check_many(plain)
    with emulated.controls(seed=seed):
        check_many(other)
    assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


@pytest.mark.parametrize("seed", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_the_worst_rounding_that_is_allowed(seed: int) -> None:
    with emulated.controls(seed=seed, truncate=True, approximate=True):
        check((8, 2, 14), (8, 2, 7), (0, 0, 3))
        check((8, 7, 14), (8, 7, 7), (0, 0, 3), heads=1)
        check((5, 7, 6), WINDOW, (1, 2, 1), pad=True, dtype=F16)


@pytest.mark.parametrize("limit", [99, pytest.param(163, marks=pytest.mark.slow), pytest.param(227)])
def test_every_size_of_shared_memory(limit: int) -> None:
    with emulated.controls(shared_limit=limit * KB):
        check((8, 7, 7), (8, 7, 7), heads=1)
        check((4, 7, 7), (4, 7, 7), heads=1, head_dim=64, pad=True)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [99, 163, 227])
def test_long_windows(limit: int) -> None:
    with emulated.controls(shared_limit=limit * KB):
        check((8, 7, 7), (8, 7, 7), heads=1, head_dim=64, dtype=F16)
        check((16, 7, 7), (16, 7, 7), heads=1)
        check((12, 10, 10), (12, 10, 10), heads=1, dtype=F16)
        check((13, 10, 10), (12, 10, 10), (5, 0, 0), heads=1, size=100.0, pad=True)
        check_dense(1, 1200, head_dim=64, bias=False)


# ---- Windows that came partitioned ----


def test_dense_bias() -> None:
    check_dense(4, 49)
    check_dense(1, 144, dtype=F16)
    check_dense(2, 64, head_dim=64, bias=False)


@pytest.mark.parametrize("mask", [-3.0, -INF, LOWEST])
def test_masks(mask: float) -> None:
    """One mask excludes some keys, the other all keys of a query."""
    check_dense(4, 33, mask=mask)
    check_dense(2, 70, mask=mask, bias=False)


def test_the_gradient_of_a_dense_bias_is_refused() -> None:
    qkv, bias = torch.randn(1, 9, 3, 2, 8).to(BF16), torch.randn(2, 9, 9, requires_grad=True)
    with pytest.raises((RuntimeError, ValueError), match="dense bias"):
        vidattn.window_attention(qkv, bias, backend="cuda").sum().backward()


# ---- What is not finite ----


@pytest.mark.parametrize("window", [(8, 7, 7), (2, 7, 7)])
def test_a_value_that_is_not_finite_stays_in_its_window_and_head(window: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    qkv, dout = torch.randn(1, 8, 7, 14, 3, 2, 32).to(BF16), torch.randn(1, 8, 7, 14, 64).to(BF16)
    spoiled = qkv.clone()
    spoiled[0, 1, 1, 2, 1, 0, 5] = float("nan")

    def gradient(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(vidattn.window3d_attention(x, window_size=window, backend="cuda"), x, dout)[0]

    clean, found = gradient(qkv), gradient(spoiled)
    changed = (clean != found)[0].any(3).any(-1)  # (8, 7, 14, heads)
    inside = torch.zeros(8, 7, 14, 2, dtype=torch.bool)
    inside[: window[0], :, :7, 0] = True
    assert torch.equal(changed, inside)
    assert bool(found[0, : window[0], :, :7, :, 0].isnan().all())


def test_matrices_meet_no_bank_twice() -> None:
    before = emulated.counts()["ldmatrix_conflicts"]
    check((4, 7, 7), (4, 7, 7), heads=1)
    check((1, 7, 7), (1, 7, 7), heads=1, head_dim=64)
    check((8, 7, 7), (8, 7, 7), heads=1)
    assert emulated.counts()["ldmatrix_conflicts"] == before


# ---- How a block's shared memory is used, and how windows are shared out ----

NAMES = [
    "dim",
    "threads",
    "warp_keys",
    "query_tile",
    "blocks",
    "depth_fastest",
    "bias_floats",
    "table_floats",
    "table_is_shared",
    "score_tiles",
    "shared_bytes",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("plan")
    fields = ", ".join(f"int64_t(p.{name})" for name in NAMES)
    (folder / "plan.cpp").write_text(
        f"""#include "cuda/plan.h"
        using namespace vidattn::cuda;
        extern "C" void plan(const int64_t* n, int64_t* out) {{
          const WindowShape w{{{{n[0], n[1], n[2]}}, n[3], n[4], true, n[5], 0, {{n[0], n[1], n[2]}}, {{n[1], n[2]}}}};
          const BackwardShape s{{w, n[6] != 0, n[7] != 0, true}};
          const auto p = plan_backward(s, n[8]);
          const int64_t all[] = {{{fields}}};
          for (int i = 0; i < {len(NAMES)}; ++i) out[i] = all[i];
        }}
        extern "C" int64_t shares(const int64_t* n) {{
          BackwardPlan p{{}};
          p.threads = int(n[2]);
          return backward_shares(n[0], n[1], p, n[3]);
        }}"""
    )
    compiled = folder / "plan.so"
    command = [build.COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{build.CSRC}", str(folder / "plan.cpp")]
    subprocess.run([*command, "-o", str(compiled)], check=True)
    found = ctypes.CDLL(str(compiled))
    found.shares.restype = ctypes.c_int64
    return found


def numbers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def plan(library: ctypes.CDLL, *values: int) -> dict[str, int]:
    out = (ctypes.c_int64 * len(NAMES))()
    library.plan(numbers(values), out)
    return dict(zip(NAMES, out, strict=True))


def test_every_length_has_a_plan(library: ctypes.CDLL) -> None:
    for tokens, head_dim, limit, table in itertools.product(
        range(1, 1201), (8, 32, 33, 64), (99, 163, 227), (False, True)
    ):
        for shape in {(1, 1, tokens), (tokens, 1, 1), (tokens // 7, 1, 7) if tokens % 7 == 0 else (1, tokens, 1)}:
            rows = geo.num_bias_rows(shape)
            p = plan(library, *shape, head_dim, rows if table else 0, 4, table, True, limit * KB)
            assert head_dim <= p["dim"] in (32, 64)
            assert p["shared_bytes"] <= limit * KB
            assert 32 <= p["threads"] <= 384 and p["threads"] % 32 == 0
            block_keys = p["threads"] // 32 * p["warp_keys"]
            assert (p["blocks"] - 1) * block_keys < tokens <= p["blocks"] * block_keys
            assert p["score_tiles"] in (1, 2)
            assert bool(p["table_floats"]) == table
            assert table or not p["table_is_shared"]


def test_common_windows_come_in_one_block(library: ctypes.CDLL) -> None:
    for window, head_dim, limit in (
        ((1, 7, 7), 32, 99),
        ((1, 8, 8), 32, 99),
        ((1, 12, 12), 32, 99),
        ((4, 7, 7), 32, 99),
        ((7, 7, 7), 32, 227),
        ((1, 12, 12), 64, 163),
    ):
        p = plan(library, *window, head_dim, geo.num_bias_rows(window), 0, True, True, limit * KB)
        assert p["blocks"] == 1 and p["table_is_shared"] and p["bias_floats"] > 0, (window, p)


@pytest.mark.parametrize(("limit", "warps", "blocks"), [(99, 5, 3), (163, 7, 2), (227, 7, 1)])
def test_warps_and_blocks_of_keys_of_392_tokens(library: ctypes.CDLL, limit: int, warps: int, blocks: int) -> None:
    """On sm_86, sm_80 and sm_90. Where all keys are in one block, a warp has 56 of them, else 32."""
    window = (8, 7, 7)
    for stride_sets, pad_gradient in itertools.product((0, 8), (False, True)):
        rows = geo.num_bias_rows(window)
        p = plan(library, *window, 32, rows, stride_sets, True, pad_gradient, limit * KB)
        assert (p["threads"] // 32, p["blocks"]) == (warps, blocks)
        assert p["depth_fastest"] == (blocks == 1) and p["bias_floats"] > 0


def test_shares_depend_on_shapes_alone(library: ctypes.CDLL) -> None:
    for groups, heads, threads, rows in itertools.product(
        (1, 3, 64, 1000, 70_000), (1, 3, 24), (32, 384), (0, 169, 2535, 26_071)
    ):
        shares = library.shares(numbers((groups, heads, threads, rows)))
        assert 1 <= shares <= groups
        assert 4 * shares * heads * rows <= 16 * KB * KB or shares == 1
        if 4 * heads * rows * -(-groups // 64) <= 16 * KB * KB:
            assert -(-groups // shares) <= 64
