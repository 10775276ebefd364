"""The CUDA kernels of the window family on an emulated GPU, against the reference: the forward pass.

Each case says what it is for. The rule is that of all kernels (tests/tolerance.py).
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerance import OUTPUT_FACTOR, assert_close
from torch import Tensor

import tests.cuda_emulator as emulated
from tests.cuda_emulator import build
from vidattn import geometry as geo
from vidattn import reference
from vidattn.ops import window, window3d

BF16, F16 = torch.bfloat16, torch.float16
INF, LOWEST = float("inf"), torch.finfo(torch.float32).min
KB = 1024


@pytest.fixture(autouse=True, scope="module")
def emulated_gpu() -> Iterator[None]:
    emulated.install()
    yield
    emulated.uninstall()


def judge(inputs: Any, attend: Callable[[Any], Any], launch: Callable[[Any], Any], blocks: int) -> None:
    """Compare context and log-sum-exp of the kernel with those of the reference, in this dtype and in float64."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) else x

    before = emulated.blocks_run()
    out, lse = launch(inputs)
    split = (emulated.blocks_run() - before) / blocks  # blocks that share a group and head
    assert split >= 1 and split.is_integer()
    plain_out, plain_lse = attend(inputs)
    exact_out, exact_lse = attend(type(inputs)(*map(wide, inputs)))
    assert_close("context", out, plain_out, exact_out, out.dtype, OUTPUT_FACTOR)
    finite = exact_lse.isfinite()
    assert torch.equal(lse[~finite].double(), exact_lse[~finite])
    assert_close("log-sum-exp", lse[finite], plain_lse[finite], exact_lse[finite], torch.float32, OUTPUT_FACTOR)


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
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(batch, *grid, 3, heads, head_dim)
    qkv[..., :2, :, :] *= size
    given = view(qkv.to(dtype))
    qkv3 = given if isinstance(given, tuple) else (given, None, None)
    rows = geo.num_bias_rows(window_size)
    inputs = window3d.Inputs(
        *qkv3,
        bias_table=torch.randn(rows, heads) * spread if table else None,
        pad_qkv=torch.randn(3, heads, head_dim).to(dtype) if pad else None,
    )
    options = window3d.Options(
        window_size, shift, wrap, bias_index, mask_value, head_dim**-0.5 if scale is None else scale, 0.0
    )

    def attend(inputs: Any) -> Any:
        qkv = inputs.q if inputs.k is None else tuple(inputs[:3])
        return reference.window3d_attention(
            qkv, inputs.bias_table, pad_qkv=inputs.pad_qkv, return_lse=True, **options._asdict()
        )

    windows = geo.resolve_windows(grid, window_size, shift, wrap)
    judge(
        inputs,
        attend,
        lambda inputs: window3d._forward(inputs, options, "cuda"),
        batch * windows.num_windows * heads,
    )


def check_dense(
    groups: int, tokens: int, *, head_dim: int = 32, dtype: torch.dtype = BF16, bias: bool = True, mask: Any = None
) -> None:
    torch.manual_seed(0)
    made = None
    if mask is not None:
        made = torch.zeros(2, tokens, tokens)
        made[0, :, 3:9] = made[1, 4] = mask
    inputs = window.Inputs(
        torch.randn(groups, tokens, 3, 2, head_dim).to(dtype),
        None,
        None,
        torch.randn(2, tokens, tokens).to(dtype) if bias else None,
        made,
        None,
    )
    options = window.Options(head_dim**-0.5, 0.0)
    judge(
        inputs,
        lambda inputs: reference.window_attention(
            inputs.q, inputs.bias, inputs.mask, return_lse=True, **options._asdict()
        ),
        lambda inputs: window._forward(inputs, options, "cuda"),
        groups * 2,
    )


# ---- Windows of a grid ----

SMALL, WINDOW = (4, 8, 6), (2, 4, 3)
CASES: dict[str, dict[str, Any]] = {
    "depth fastest": {"grid": (8, 7, 7), "window_size": (8, 7, 7)},
    "depth fastest, shifted in all axes, padded": {
        "grid": (13, 3, 9),
        "window_size": (8, 2, 7),
        "shift": (3, 1, 3),
        "pad": True,
    },
    "depth fastest, two times 8, -inf": {
        "grid": (16, 4, 14),
        "window_size": (16, 2, 7),
        "shift": (0, 1, 3),
        "heads": 1,
        "mask_value": -INF,
    },
    "depth fastest, clipped to 8 of 16": {"grid": (8, 2, 7), "window_size": (16, 2, 7), "dtype": F16},
    "depth fastest, a table of a larger window": {
        "grid": (8, 3, 7),
        "window_size": (8, 7, 7),
        "bias_index": "geometric",
    },
    "8 deep, but the bias goes by another window": {"grid": (8, 3, 7), "window_size": (8, 7, 7)},
    "depth fastest, 64 elements": {"grid": (8, 3, 7), "window_size": (8, 3, 7), "head_dim": 64, "dtype": F16},
    "depth fastest, 56 elements, no table": {
        "grid": (8, 1, 7),
        "window_size": (8, 1, 7),
        "head_dim": 56,
        "table": False,
    },
    "depth fastest, huge logits": {"grid": (8, 2, 7), "window_size": (8, 2, 7), "size": 1e6},
    "8 frames of 16": {"grid": (4, 7, 7), "window_size": (8, 7, 7), "dtype": F16},
    "images": {"grid": (1, 14, 14), "window_size": (1, 7, 7), "shift": (0, 3, 3)},
    "shifted, padded": {"grid": (5, 7, 6), "window_size": WINDOW, "shift": (1, 2, 1), "pad": True, "dtype": F16},
    "padded with zeros": {"grid": (5, 7, 6), "window_size": WINDOW, "shift": (1, 2, 1)},
    "cyclic height": {"grid": SMALL, "window_size": WINDOW, "shift": (1, 2, 1), "wrap": (False, True, False)},
    "a mask of -inf": {"grid": SMALL, "window_size": WINDOW, "shift": (1, 2, 1), "mask_value": -INF},
    "a mask of -1e9": {"grid": SMALL, "window_size": WINDOW, "shift": (1, 2, 1), "mask_value": -1e9},
    "clipped, prefix": {"grid": (4, 3, 6), "window_size": (8, 7, 3), "shift": (1, 2, 1), "dtype": F16},
    "clipped, geometric": {"grid": (4, 3, 6), "window_size": (8, 7, 3), "bias_index": "geometric"},
    "a table too large for shared memory": {
        "grid": (3, 3, 4),
        "window_size": (30, 30, 30),
        "head_dim": 16,
        "bias_index": "geometric",
    },
    "no table": {"grid": SMALL, "window_size": WINDOW, "table": False},
    "one token": {"grid": (2, 2, 2), "window_size": (1, 1, 1)},
    "a negative scale": {"grid": SMALL, "window_size": WINDOW, "scale": -0.3},
    "a scale of 0": {"grid": SMALL, "window_size": WINDOW, "scale": 0.0},
    "a tiny scale": {"grid": SMALL, "window_size": WINDOW, "scale": 1e-6},
    "large logits": {"grid": SMALL, "window_size": WINDOW, "shift": (1, 2, 1), "size": 30.0},
    "huge logits": {"grid": SMALL, "window_size": WINDOW, "shift": (1, 2, 1), "size": 1e6},
    "a huge table": {"grid": SMALL, "window_size": WINDOW, "spread": 1e7},
    "batch": {"grid": SMALL, "window_size": WINDOW, "batch": 2, "heads": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_windows(name: str) -> None:
    check(**CASES[name])


@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 24, 30, 40, 48, 64])
def test_head_dims(head_dim: int) -> None:
    check((2, 8, 6), WINDOW, (0, 2, 1), head_dim=head_dim, pad=True)


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "three tensors of different strides": lambda x: (
        x[..., 0, :, :].contiguous(),
        x[..., 1, :, :],
        x[..., 2, :, :].transpose(1, 2).contiguous().transpose(1, 2),
    ),
    "a base at an odd element": lambda x: torch.cat([x.flatten(-3)[..., :1], x.flatten(-3)], -1)[..., 1:].unflatten(
        -1, (3, 2, 32)
    ),
    "rows of 4 bytes": lambda x: torch.cat([x.flatten(-3)[..., :2], x.flatten(-3)], -1)[..., 2:].unflatten(
        -1, (3, 2, 32)
    ),
    "expanded batch": lambda x: x[:1].expand(2, -1, -1, -1, -1, -1, -1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str) -> None:
    check((2, 8, 6), WINDOW, (0, 2, 1), batch=2, view=VIEWS[name])


@pytest.mark.parametrize("seed", [5, 7])
def test_any_order_and_the_worst_rounding_that_is_allowed(seed: int) -> None:
    with emulated.controls(seed=seed, truncate=True, approximate=True):
        check((8, 2, 14), (8, 2, 7), (0, 0, 3))
        check((5, 7, 6), WINDOW, (1, 2, 1), pad=True, dtype=F16)


@pytest.mark.parametrize("limit", [99, 163, 227])
def test_every_size_of_shared_memory(limit: int) -> None:
    with emulated.controls(shared_limit=limit * KB):
        check((8, 7, 7), (8, 7, 7), heads=1, head_dim=64)  # not resident with 99 KB
        check((16, 7, 7), (16, 7, 7), heads=1, size=1e5)  # depth fastest with 227 KB, and not folded


@pytest.mark.parametrize("limit", [0, KB])  # 0: the device does not tell
def test_too_little_shared_memory_is_an_error(limit: int) -> None:
    with emulated.controls(shared_limit=limit), pytest.raises(RuntimeError, match="too little shared memory"):
        check(SMALL, WINDOW)


def test_the_longest_windows() -> None:
    check((12, 10, 10), (12, 10, 10), heads=1, dtype=F16)
    with emulated.controls(shared_limit=99 * KB):
        check_dense(1, 1200, head_dim=64, bias=False)


@pytest.mark.slow
def test_more_groups_than_a_grid_has_in_y() -> None:
    try:
        emulated.install(checked=False)
        check((1, 1, 70_000), (1, 1, 1), heads=1, head_dim=8, table=False)
    finally:
        emulated.install()


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(("window_size", "most"), [((8, 7, 7), 0), ((1, 8, 8), 0), ((1, 7, 7), 8), ((7, 7, 7), 120)])
def test_lanes_seldom_meet_in_a_bank(window_size: tuple[int, int, int], most: int, head_dim: int) -> None:
    """Of some 3800 reads of the bias of (7, 7, 7), 905 were in turns where the table lay as it comes."""
    before = emulated.counts()
    check(window_size, window_size, heads=1, head_dim=head_dim)
    after = emulated.counts()
    assert after["ldmatrix_conflicts"] == before["ldmatrix_conflicts"]
    assert after["load_conflicts"] - before["load_conflicts"] <= most


# ---- Windows that came partitioned ----


def test_dense_bias() -> None:
    check_dense(4, 49)
    check_dense(1, 144, dtype=F16)
    check_dense(2, 64, head_dim=64, bias=False)


@pytest.mark.parametrize("mask", [-3.0, -INF, LOWEST])
def test_masks(mask: float) -> None:
    """One mask excludes some keys, the other all keys of a query."""
    check_dense(4, 33, mask=mask)
    check_dense(4, 33, mask=mask, bias=False)


# ---- Keys of other regions are left out where they certainly have no weight ----

BORDERS: dict[str, dict[str, Any]] = {
    "by height": {"grid": (8, 14, 7), "window_size": (8, 7, 7), "shift": (0, 3, 0), "heads": 1},
    "by depth": {"grid": (16, 3, 7), "window_size": (8, 3, 7), "shift": (4, 0, 0)},
    "by both, queries of two regions at a time": {"grid": (16, 6, 7), "window_size": (8, 3, 7), "shift": (4, 1, 0)},
    "by an odd depth": {"grid": (16, 3, 7), "window_size": (8, 3, 7), "shift": (3, 0, 0)},
    "by depth, in eights": {"grid": (32, 2, 7), "window_size": (16, 2, 7), "shift": (8, 0, 0), "head_dim": 64},
    "by width": {"grid": (8, 7, 14), "window_size": (8, 7, 7), "shift": (0, 0, 3), "heads": 1},
    "by width, and by depth": {"grid": (16, 7, 14), "window_size": (8, 7, 7), "shift": (4, 0, 3), "heads": 1},
    "by all": {"grid": (16, 14, 14), "window_size": (8, 7, 7), "shift": (4, 3, 3), "heads": 1},
    "by width, of a window that is not square": {"grid": (8, 2, 14), "window_size": (8, 2, 7), "shift": (0, 0, 3)},
}


@pytest.mark.parametrize("mask_value", [-100.0, -INF, 3.0])
@pytest.mark.parametrize(
    ("size", "spread"),
    [
        (1.0, 1.0),
        (1e2, 1.0),
        (0.3, 600.0),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(10.0, 1.0), (1e3, 1.0), (1.0, 0.0)]),
    ],
)
def test_regions(size: float, spread: float, mask_value: float) -> None:
    """With scores of these sizes, keys of other regions have no weight, all of it, or some."""
    for name in BORDERS:
        if name in ("by height", "by width, and by depth", "by all") and (size, spread) != (1.0, 1.0):
            continue  # they take long
        check(**BORDERS[name], size=size, spread=spread, mask_value=mask_value)


def test_what_is_left_out() -> None:
    def operations(mask_value: float, name: str) -> int:
        before = emulated.counts()["operations"]
        check(**BORDERS[name], mask_value=mask_value)
        return emulated.counts()["operations"] - before

    assert operations(-100.0, "by height") < 0.8 * operations(-1.0, "by height")
    assert operations(-100.0, "by width") < 0.8 * operations(-1.0, "by width")
    assert operations(-INF, "by depth, in eights") < 0.8 * operations(-1.0, "by depth, in eights")


@pytest.mark.parametrize("mask_value", [-100.0, -INF])
@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_what_is_not_finite_is_never_left_out(slot: int, value: float, mask_value: float) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 8, 14, 7, 3, 1, 32).to(BF16)
    qkv[0, 2, 0, 3, slot, 0, 7] = value
    options = window3d.Options((8, 7, 7), (0, 3, 0), (False,) * 3, "prefix", mask_value, 32**-0.5, 0.0)
    out, lse = window3d._forward(window3d.Inputs(qkv, None, None, None, None), options, "cuda")
    expected, expected_lse = reference.window3d_attention(qkv, None, return_lse=True, **options._asdict())
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert not bool(expected.isfinite().all())


def test_a_value_that_is_not_finite_stays_in_its_window_and_head() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 8, 2, 14, 3, 2, 32).to(BF16)
    spoiled = qkv.clone()
    spoiled[0, 3, 1, 2, 1, 0, 5] = float("nan")
    options = window3d.Options((8, 2, 7), (0, 0, 0), (False,) * 3, "prefix", -100.0, 32**-0.5, 0.0)
    clean, found = (
        window3d._forward(window3d.Inputs(x, None, None, None, None), options, "cuda")[0] for x in (qkv, spoiled)
    )
    changed = (clean != found).view(8, 2, 2, 7, 2, 32).any(0).any(0).any(1).any(-1)  # (windows, heads)
    assert changed.tolist() == [[True, False], [False, False]]
    assert bool(found[:, :, :, :7, :32].isnan().all())


# ---- How a block's shared memory is used ----


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, int]]:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(
        """#include "cuda/plan.h"
        extern "C" void plan(const int64_t* n, int64_t* out) {
          const auto p = vidattn::cuda::plan_forward({{n[0], n[1], n[2]}, n[3], n[4], n[5] != 0, n[6], n[7],
                                                     {n[0], n[1], n[2]}, {n[1], n[2]}}, n[8]);
          const int64_t all[] = {p.dim, p.threads, p.block_keys, p.resident, p.depth_fastest, p.bias_floats,
                                 p.shared_bytes, p.splits};
          for (int i = 0; i < 8; ++i) out[i] = all[i];
        }"""
    )
    library = folder / "plan.so"
    command = [build.COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{build.CSRC}", str(folder / "plan.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).plan
    names = ("dim", "threads", "block_keys", "resident", "depth_fastest", "bias_floats", "shared_bytes", "splits")

    def call(*numbers: int) -> dict[str, int]:
        out = (ctypes.c_int64 * len(names))()
        function((ctypes.c_int64 * len(numbers))(*numbers), out)
        return dict(zip(names, out, strict=True))

    return call


def test_every_length_has_a_plan(plan: Callable[..., dict[str, int]]) -> None:
    for tokens, head_dim, limit, sets in itertools.product(range(1, 1201), (8, 32, 33, 64), (99, 163, 227), (1, 3)):
        for shape in {(1, 1, tokens), (tokens, 1, 1), (tokens // 7, 1, 7) if tokens % 7 == 0 else (1, tokens, 1)}:
            p = plan(*shape, head_dim, geo.num_bias_rows(shape), 1, sets, 1000, limit * KB)
            assert p["dim"] in (32, 64) and p["dim"] >= head_dim
            assert p["shared_bytes"] <= limit * KB
            assert p["threads"] % 32 == 0 and 32 <= p["threads"] <= (384 if p["dim"] == 32 else 256)
            multiple = 8 if p["depth_fastest"] else 16
            padded = -(-tokens // multiple) * multiple
            assert p["block_keys"] == padded if p["resident"] else 48 <= p["block_keys"] < padded
            assert p["resident"] or p["block_keys"] % 48 == 0
            assert not p["depth_fastest"] or (shape[0] % 8 == 0 and shape[2] == 7 and p["resident"])
            assert p["bias_floats"] > 0 or p["shared_bytes"] > limit * KB // 2  # tables are left out only where need be


def test_two_blocks_of_video_swin_share_a_multiprocessor(plan: Callable[..., dict[str, int]]) -> None:
    p = plan(8, 7, 7, 32, 2535, 1, 1, 1000, 163 * KB)
    assert p["resident"] and p["depth_fastest"] and p["shared_bytes"] <= 82_944
    assert p["threads"] <= 192  # of 168 registers each


def test_few_windows_are_split(plan: Callable[..., dict[str, int]]) -> None:
    assert plan(8, 7, 7, 32, 2535, 1, 1, 264, 227 * KB)["splits"] == 1
    assert plan(8, 7, 7, 32, 2535, 1, 1, 132, 227 * KB)["splits"] == 2
    assert plan(8, 7, 7, 32, 2535, 1, 1, 12, 227 * KB)["splits"] == 3  # as many as leave each warp a pair of tiles
    assert plan(1, 7, 7, 32, 169, 1, 1, 12, 227 * KB)["splits"] == 1
    assert plan(1, 7, 7, 32, 169, 1, 1, 0, 227 * KB)["splits"] == 1


def test_what_the_plan_cannot_read_from_pairs_is_width_fastest(plan: Callable[..., dict[str, int]]) -> None:
    assert not plan(8, 7, 7, 32, 2535, 0, 1, 1000, 163 * KB)["depth_fastest"]
    assert not plan(4, 7, 7, 32, 2535, 1, 1, 1000, 163 * KB)["depth_fastest"]
    assert not plan(16, 7, 7, 32, 5239, 1, 1, 1000, 163 * KB)["depth_fastest"]
    assert plan(16, 7, 7, 32, 5239, 1, 1, 1000, 227 * KB)["depth_fastest"]
