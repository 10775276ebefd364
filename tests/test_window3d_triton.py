"""What surrounds the Triton kernels of window attention: tables, grids, planes, CUDA graphs, configurations.

Their numbers are tested with those of all backends; test_triton_interpreter.py runs those tests, and the ones here that
need to run a kernel, where there is no GPU.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton
from attention_cases import device_of, evaluate, to
from torch import Tensor
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from window3d_cases import Case

import vidattn
from benchmarks.gpu_audit import specialisation
from benchmarks.gpu_plans import plan_window3d
from benchmarks.shapes import GPU_WINDOW_CASES
from vidattn import backends, reference
from vidattn import geometry as geo
from vidattn.calls import WindowCall
from vidattn.kernels import configs, plans, window3d, window3d_planes, window3d_tables
from vidattn.kernels.configs import Config
from vidattn.kernels.launch import INTERPRETED, TARGETS, Launch
from vidattn.kernels.rows import Rows
from vidattn.kernels.softmax import dropout_of
from vidattn.kernels.window3d_configs import ShapeClass, candidate_configs, default_config, padded_length
from vidattn.kernels.window3d_tiles import Hiding, Planes, Windows
from vidattn.ops import _library

RUNS = not vidattn.why_not("window3d_attention", backend="triton")
needs_triton = pytest.mark.needs_triton
SECONDS = configs._seconds
CPU = torch.device("cpu")
GEOMETRIES = [
    geo.resolve_windows((4, 6, 9), (2, 3, 4), (1, 1, 2)),
    geo.resolve_windows((16, 14, 14), (8, 7, 7), (4, 3, 3)),
    geo.resolve_windows((3, 5, 7), (2, 3, 3), (1, 1, 1), (True, False, False)),
    geo.resolve_windows((2, 9, 4), (2, 7, 7), (0, 3, 3)),
    geo.resolve_windows((5, 5, 5), (5, 5, 5)),
    geo.resolve_windows((1, 1, 140), (1, 1, 70), (0, 0, 6)),  # the last six tokens see no full tile
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "x".join(map(str, geometry.grid)))


def plan(
    grid: tuple[int, int, int] = (16, 56, 56),
    window: tuple[int, int, int] = (8, 7, 7),
    shift: tuple[int, int, int] = (0, 0, 0),
    batch: int = 8,
    heads: int = 3,
    head_dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
    arch: str = "sm_90",
) -> list[Launch]:
    """Launches of a forward pass on tensors without memory."""
    windows = geo.resolve_windows(grid, window, shift)
    with torch.device("meta"):
        qkv = torch.empty(batch, *grid, 3, heads, head_dim, dtype=dtype)
        table, seed = torch.empty(geo.num_bias_rows(window), heads), torch.empty(1, dtype=torch.int64)
        out, lse = torch.empty(batch, *grid, heads * head_dim, dtype=dtype), torch.empty(batch, *grid, heads)
    call = WindowCall(
        *qkv.unbind(-3),
        bias=table,
        bias_window=[*window, *geo.bias_extents(window, windows, "prefix")],
        mask=None,
        pad_qkv=None,
        seed=seed if dropout_p else None,
        window=windows.window,
        shift=windows.shift,
        wrap=windows.wrap,
        scale=head_dim**-0.5,
        mask_value=mask_value,
        dropout_p=dropout_p,
    )
    return window3d.plan_forward(call, out, lse, arch=arch)


# ---- Tables ----


@geometries
def test_tokens_are_those_of_the_geometry(geometry: geo.WindowGeometry) -> None:
    tables = window3d_tables.window_tables(geometry, 3, 0, CPU)
    count = geometry.num_tokens
    assert torch.equal(tables.tokens[:, :count].long(), geo.source_tokens(geometry))
    assert (tables.tokens[:, count:] == -2).all()
    assert tables.has_padding == bool((geo.source_tokens(geometry) < 0).any())


@geometries
@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_hold_every_window_once_and_only_one_kind(geometry: geo.WindowGeometry, size: int) -> None:
    batch = 3
    tables = window3d_tables.window_tables(geometry, batch, 0, CPU)
    groups, kinds = tables.groups(size)
    groups = groups.view(-1, size, 2)
    numbers = groups[..., 0] * geometry.num_windows + groups[..., 1]
    distinct = [number for group in numbers.tolist() for number in dict.fromkeys(group)]
    assert sorted(distinct) == list(range(batch * geometry.num_windows))
    for group in numbers.tolist():  # what is repeated is the last
        assert group == [*dict.fromkeys(group), *[group[-1]] * (size - len(set(group)))]
    mask = geo.region_mask(geometry)
    if mask is not None:
        hidden = tables.hidden[kinds.long()]  # type: ignore[index]
        assert all(torch.equal(mask[w], hidden[g]) for g in range(len(groups)) for w in groups[g, :, 1].tolist())
    assert tables.starts[0] == 0 and tables.starts[-1] == batch * geometry.num_windows
    assert torch.equal(
        tables.kinds,
        torch.bucketize(torch.arange(tables.starts[-1]), torch.tensor(tables.starts[1:]), right=True).int(),
    )


def test_masks_of_the_caller_are_kinds() -> None:
    tables = window3d_tables.window_tables(geo.resolve_windows((1, 1, 20), (1, 1, 20)), 12, 4, CPU)
    groups, kinds = tables.groups(2)
    assert torch.equal(groups[..., 0] % 4, kinds[:, None].expand(-1, 2))
    assert tables.num_kinds == 4 and tables.hidden is None


@geometries
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 32), (64, 64)])
def test_hidden_tiles_are_hidden_as_a_whole(geometry: geo.WindowGeometry, rows: int, columns: int) -> None:
    tables = window3d_tables.window_tables(geometry, 2, 0, CPU)
    visible, mean = tables.visible(rows, columns)
    count, full = geometry.num_tokens, geometry.num_tokens // columns
    if visible is None:
        assert mean == full
        return
    assert tables.hidden is not None
    left_out = 0
    for kind in range(tables.num_kinds):
        for tile in range(-(-count // rows)):
            first, last = visible[kind, tile].tolist()
            assert 0 <= first < last <= full  # kernels count on one
            for column in [*range(first), *range(last, full)]:
                block = tables.hidden[kind, tile * rows : (tile + 1) * rows, column * columns : (column + 1) * columns]
                assert block.all()
                left_out += 1
    assert left_out > 0 and mean < full


def test_a_shift_in_time_hides_a_third_of_the_tiles() -> None:
    """Swin-T: half of the windows are border windows in time, whose halves do not see each other."""
    tables = window3d_tables.window_tables(GEOMETRIES[1], 1, 0, CPU)
    visible, mean = tables.visible(64, 128)
    assert visible is not None and 2.4 < mean < 2.6  # of 3


@pytest.mark.parametrize(
    ("window", "bias_index"), [((2, 3, 4), "prefix"), ((4, 7, 7), "prefix"), ((4, 7, 7), "geometric")]
)
@geometries
def test_positions_give_the_rows_of_the_table(
    geometry: geo.WindowGeometry, window: tuple[int, int, int], bias_index: str
) -> None:
    windows = geo.resolve_windows(geometry.grid, window)
    extents = geo.bias_extents(window, windows, bias_index)
    found = window3d_tables.bias_positions(window, extents, windows.num_tokens, CPU)
    positions = found.positions.long()
    assert torch.equal(
        positions[:, None] - positions[None, :] + found.origin, geo.bias_rows(window, windows, bias_index)
    )
    assert torch.equal(found.tokens_at[positions].long(), torch.arange(windows.num_tokens))
    assert (found.tokens_at >= 0).sum() == windows.num_tokens


# ---- Grids and arguments, looked at without running ----


def test_more_groups_than_a_grid_axis_holds() -> None:
    """Every program is on axis x, and every window is reached: 70,000 of them, and ten million."""
    for batch, grid in ((1, (70, 200, 10)), (8, (64, 140, 300))):
        attend = plan(grid, (1, 1, 2), batch=batch, heads=1)[-1]
        windows = batch * math.prod(grid) // 2
        assert windows > 65_535
        assert attend.arguments["windows"].listed.numel() == 2 * windows
        assert attend.grid == -(-windows // attend.arguments["WINDOWS"])


def test_too_many_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 2147483647 programs, got 2147483648"):
        Launch(window3d.window3d_forward, 2**31, {})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_strides_past_two_to_the_31_are_passed_in_64_bits() -> None:
    with torch.device("meta"):
        far = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    qkv = far.as_strided((2, 1, 2, 4, 3, 2, 8), (2**31 + 8, 384, 192, 48, 16, 8, 1))
    with torch.device("meta"):
        out, lse = torch.empty(2, 1, 2, 4, 16, dtype=torch.bfloat16), torch.empty(2, 1, 2, 4, 2)
    call = WindowCall(
        *qkv.unbind(-3), None, [], None, None, None, (1, 2, 2), (0, 0, 0), (False, False, False), 1.0, -100.0, 0.0
    )
    (attend,) = window3d.plan_forward(call, out, lse, arch="sm_90")
    kinds = attend.source().signature
    assert [kinds[name] for name in "qkv"] == [Rows("*bf16", "i64", "i32", "i32")] * 3


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_launch_is_specialised_alike_whether_it_is_run_or_compiled_ahead() -> None:
    """By type, alignment and divisibility of each argument and each part of one, as Triton itself looks at them."""
    q = torch.zeros(2 * 3 * 24 + 1)
    rows = (
        Rows(q, 1, 16, 24),
        Rows(q[1:], 2**31, 17, 0),
        Rows(q[4:].to(torch.bfloat16), 32, 1, 8),
    )
    backend = make_backend(TARGETS["sm_90"])
    kernel = window3d.window3d_forward
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    for numbers in ((1, 16, 3), (32, 1, 2**31)):
        for planes, dropout in (
            (Planes(None, 0, 0, None), None),
            (Planes(q, 0, 448, None), dropout_of(torch.zeros(1).long(), 0.5)),
        ):
            options = dict.fromkeys(kernel.arg_names, 1)  # the constants
            options |= dict(zip("qkv", rows)) | {
                "pad_qkv": q,
                "planes": planes,
                "hiding": Hiding(None, None, None),
                "dropout": dropout,
            }
            options |= {"out": q[1:], "lse": q, "windows": Windows(*[torch.zeros(4).int()] * 3), "scale": 1.0}
            options |= dict(zip(("heads", "num_windows", "grid_tokens"), numbers)) | {"full_tiles": 16}
            source = Launch(kernel, 1, options).source()
            bound, specialisation, _ = binder(**options)
            _, signature, constants, attributes = kernel._pack_args(backend, {}, bound, specialisation, {})
            assert source.signature == signature and source.constants == constants
            assert [type(kind) for kind in source.signature.values()] == [type(kind) for kind in signature.values()]
            assert source.attrs == {place: found for place, found in attributes.items() if found}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_kernel_is_compiled_once_for_all_batches_heads_and_grids(direction: str, dropout_p: float) -> None:
    def kernels(dropout_p: float = dropout_p, **changes: Any) -> list[str]:
        case = replace(GPU_WINDOW_CASES["swin_t_stage1_shifted"], **changes)
        launches = plan_window3d(case, direction, torch.bfloat16, "sm_90", dropout_p=dropout_p)
        return [specialisation(launch) for launch in launches]

    expected = kernels()
    for changes in ({"batch": 3}, {"heads": 1}, {"heads": 6}, {"grid": (24, 63, 70)}, {"grid": (32, 28, 28)}):
        assert kernels(**changes) == expected, changes
    if dropout_p > 0:
        assert kernels(0.5) == kernels(0.3) == expected


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3, 4, 5, 2, 8), None, 16),
        ((2, 3, 4, 5, 2, 8), (960, 320, 80, 16, 8, 1), 16),
        ((2, 3, 4, 5, 2, 8), (960, 640, 80, 16, 8, 1), 0),  # every second frame
        ((2, 3, 4, 5, 2, 8), (960, 16, 48, 192, 8, 1), 0),  # permuted
        ((2, 3, 4, 5, 2, 8), (0, 0, 0, 0, 8, 1), 0),
        ((2, 1, 4, 1, 2, 8), (960, 7, 80, 3, 8, 1), 80),
        ((2, 1, 1, 1, 2, 8), (960, 7, 11, 3, 8, 1), 16),
    ],
)
def test_stride_from_token_to_token(shape: tuple[int, ...], strides: tuple[int, ...] | None, expected: int) -> None:
    x = (
        torch.empty(shape, device="meta")
        if strides is None
        else torch.empty(10**5, device="meta").as_strided(shape, strides)
    )
    assert window3d._token_stride(x) == expected


def test_a_shallow_mask_hides_nothing_and_an_infinite_one_needs_no_proof() -> None:
    for mask_value in (-5.0, 0.0):
        assert plan(shift=(4, 3, 3), mask_value=mask_value)[-1].arguments["hiding"] == (None, None, None)
    assert plan()[-1].arguments["hiding"] == (None, None, None)
    hiding = plan(shift=(4, 3, 3), mask_value=-math.inf)[-1].arguments["hiding"]
    assert hiding.visible is not None and hiding[1:] == (None, None)
    hiding = plan(shift=(4, 3, 3), mask_value=-100.0)[-1].arguments["hiding"]
    assert hiding.mask_value == -100.0 and hiding.bias_max.shape == (1,)


def test_planes_hold_the_masks_unless_they_would_take_too_much() -> None:
    *_, attend = plan(shift=(4, 3, 3))
    planes = attend.arguments["planes"]
    assert planes.bias.shape == (8, 3, 392, 448) and planes.mask is None
    *_, attend = plan((16, 24, 24), (8, 12, 12), (4, 6, 6), heads=24)
    planes = attend.arguments["planes"]
    assert planes.bias.shape == (1, 24, 1152, 1152) and planes.kind == 0
    assert planes.mask.shape == (8, 1, 1152, 1152)


# ---- Configurations ----


@pytest.mark.parametrize("tokens", [1, 8, 49, 196, 343, 392, 784, 1152])
@pytest.mark.parametrize(
    "kernel", ["window3d_forward", "window3d_backward_queries", "window3d_backward_keys", "window3d_backward_bias"]
)
def test_tiles_fit_the_window(kernel: str, tokens: int) -> None:
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter"):
        for block_d in (16, 32, 64, 128):
            for tensor_cores, itemsize in ((True, 2), (True, 4), (False, 4)):
                for lean in (True, False):
                    shape = ShapeClass(arch, itemsize, tensor_cores, block_d, tokens, lean)
                    for config in (default_config(kernel, shape), *candidate_configs(kernel, shape)):
                        for block in (config.block_m, config.block_n):
                            assert 16 <= block <= 128 and block & (block - 1) == 0
                            assert block < 2 * max(16, tokens)
                            full, tail = padded_length(tokens, block)
                            # Maps and planes are padded to 128 and 64: nothing outside is read.
                            assert tokens <= full * block + tail <= -(-tokens // 64) * 64


@pytest.fixture
def autotune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Autotuning as on a GPU, with times that grow with the tile; gives the folder of its cache."""
    monkeypatch.setenv("VIDATTN_AUTOTUNE", "1")
    monkeypatch.setenv("VIDATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    monkeypatch.setattr(configs, "_seconds", lambda launch: launch)
    configs._cache_file.cache_clear()
    configs._known.clear()
    yield tmp_path
    configs._cache_file.cache_clear()
    configs._known.clear()


def _tune(launch: Callable[[Config], Any], shape: tuple[object, ...] = ("sm_90", 392)) -> Config:
    candidates = [Config(32, 32), Config(16, 16), Config(128, 64)]
    return configs.tuned("kernel", shape, Config(64, 64), lambda: candidates, launch, torch.device("cuda", 0))


def test_autotuning_takes_the_fastest_and_remembers_it(autotune: Path) -> None:
    tried: list[Config] = []

    def launch(config: Config) -> Any:
        tried.append(config)
        return config.block_m

    assert _tune(launch) == Config(16, 16)
    assert tried == [Config(64, 64), Config(32, 32), Config(16, 16), Config(128, 64)]
    (file,) = autotune.iterdir()
    assert list(json.loads(file.read_text()).values()) == [list(Config(16, 16))]
    configs._known.clear()  # as in another process
    assert _tune(launch) == Config(16, 16) and len(tried) == 4
    assert _tune(launch, ("sm_90", 784)) == Config(16, 16) and len(tried) == 8
    file.write_text("{ cut short")
    configs._known.clear()
    assert _tune(launch) == Config(16, 16) and len(tried) == 12


def test_a_configuration_that_does_not_compile_is_not_taken(autotune: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler may fail in any way; only if it always does, the first failure is raised."""
    failures: dict[int, Exception] = {
        64: RuntimeError("PassManager::run failed"),
        32: triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
        128: AssertionError("layout"),
    }

    def compile_or_fail(launch: Launch) -> None:
        if launch.options["rows"] in failures:
            raise failures[launch.options["rows"]]

    monkeypatch.setattr(configs, "_seconds", SECONDS)
    monkeypatch.setattr(Launch, "prepare", compile_or_fail)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: 1.0)

    def launch(config: Config) -> Launch:
        return Launch(window3d.window3d_forward, 1, {}, {"rows": config.block_m})

    assert _tune(launch) == Config(16, 16)
    failures[16] = RuntimeError("another")
    with pytest.raises(RuntimeError, match="PassManager"):
        _tune(launch, ("sm_90", 784))


def test_autotuning_is_opt_in(autotune: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDATTN_AUTOTUNE")
    assert _tune(lambda config: pytest.fail("timed")) == Config(64, 64)
    assert not list(autotune.iterdir())


def test_autotuning_is_refused_while_a_graph_is_captured(autotune: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"kernel: autotuning cannot run while a CUDA graph.*warmup"):
        _tune(lambda config: pytest.fail("timed"))
    monkeypatch.setattr(configs, "is_capturing", lambda: False)
    expected = _tune(lambda config: config.block_n)
    monkeypatch.setattr(configs, "is_capturing", lambda: True)
    assert _tune(lambda config: pytest.fail("timed")) == expected


# ---- CUDA graphs ----


def test_a_capture_takes_tables_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    known, unknown = geo.resolve_windows((3, 4, 5), (3, 2, 2)), geo.resolve_windows((3, 4, 7), (3, 2, 2))
    tables = window3d_tables.window_tables(known, 2, 0, CPU)
    groups = tables.groups(2)
    positions = window3d_tables.bias_positions((3, 2, 2), (2, 2), 12, CPU)
    monkeypatch.setattr(window3d_tables, "is_capturing", lambda: True)
    assert window3d_tables.window_tables(known, 2, 0, CPU) is tables and tables.groups(2) is groups
    assert window3d_tables.bias_positions((3, 2, 2), (2, 2), 12, CPU) is positions
    with pytest.raises(RuntimeError, match=r"window3d: a CUDA graph is being captured.*warmup"):
        window3d_tables.window_tables(unknown, 2, 0, CPU)
    with pytest.raises(RuntimeError, match=r"window3d: a CUDA graph is being captured.*warmup"):
        tables.groups(4)


# ---- What the backend says ----


@pytest.mark.skipif(RUNS, reason="here it runs")
def test_without_a_gpu_the_backend_says_why() -> None:
    qkv = torch.zeros(1, 2, 2, 2, 3, 1, 8)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run this call: there is no GPU.*TRITON_INTERPRET=1"):
        vidattn.window3d_attention(qkv, window_size=2, backend="triton")
    with vidattn.use_backend("triton"), pytest.raises(ValueError, match=r"chosen by use_backend.*there is no GPU"):
        vidattn.window_attention(torch.zeros(1, 8, 3, 1, 8))


@pytest.mark.parametrize(
    ("interpreted", "dtype", "head_dim", "reason"),
    [
        (False, torch.float64, 8, r"float32, bfloat16 and float16, got torch.float64"),
        (True, torch.float64, 8, r"float32, bfloat16 and float16, got torch.float64"),
        (True, torch.bfloat16, 8, r"interpreter computes bfloat16 products wrongly"),
        (False, torch.float32, 129, r"head dimensions up to 128, got 129"),
        (False, torch.bfloat16, 128, None),
        (True, torch.float16, 1, None),
    ],
)
def test_what_the_kernels_do_not_run(
    monkeypatch: pytest.MonkeyPatch, interpreted: bool, dtype: torch.dtype, head_dim: int, reason: str | None
) -> None:
    monkeypatch.setattr(_library, "TRITON_INTERPRETED", interpreted)
    monkeypatch.setattr(_library, "MISINTERPRETED", [torch.bfloat16])
    found = _library._check_triton(backends.AttentionCall("window3d_attention", "cuda", dtype, head_dim))
    assert (reason is None) == (not found)
    assert reason is None or (len(found) == 1 and re.search(reason, found[0]))


@needs_triton
def test_auto_does_not_take_the_interpreter() -> None:
    call = backends.AttentionCall("window3d_attention", "cpu", torch.float32, 8)
    assert backends.choose_backend(call, "auto") in ("cpu", "reference")
    assert backends.choose_backend(call, "triton") == "triton" or not backends.TRITON_INTERPRETED


# ---- Memory: nothing beside the buffers is read or written ----


def _guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous tensor between two stretches of NaN, and a check that they still are."""
    guard = 4096
    storage = torch.full((math.prod(shape) + 2 * guard,), math.nan, dtype=dtype, device=device)

    def check() -> None:
        assert storage[:guard].isnan().all() and storage[-guard:].isnan().all()

    return storage[guard:-guard].view(shape), check


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case((3, 5, 7), (2, 3, 3), (1, 1, 1), head_dim=5),
        Case((2, 6, 6), (2, 3, 3), batch=3, heads=1, head_dim=16, pad=False),
        Case((3, 5, 7), (2, 3, 3), (1, 1, 1), dropout_p=0.3),
    ],
    ids=["padded", "whole", "dropout"],
)
def test_guards_around_every_buffer(case: Case, dtype: torch.dtype) -> None:
    device, seed = device_of("triton"), torch.tensor([11], device=device_of("triton"))
    inputs = to(case.inputs(dtype), device)
    windows = geo.resolve_windows(case.grid, case.window, case.shift)
    checks: list[Callable[[], None]] = []

    def guarded(value: Tensor | None, shape: tuple[int, ...] = (), kind: torch.dtype = torch.float32) -> Any:
        if value is None and not shape:
            return None
        buffer, check = _guarded(
            tuple(value.shape) if value is not None else shape, value.dtype if value is not None else kind, device
        )
        checks.append(check)
        return buffer if value is None else buffer.copy_(value)

    q, k, v = (guarded(x) for x in inputs["qkv"].unbind(-3))
    table, pad, dout = guarded(inputs["bias_table"]), guarded(inputs.get("pad_qkv")), guarded(inputs["grad_out"])
    out, lse = guarded(None, tuple(dout.shape), dtype), guarded(None, tuple(q.shape[:-1]))
    call = WindowCall(
        q, k, v, table, [*case.window, *geo.bias_extents(case.window, windows, "prefix")], None, pad,
        seed if case.dropout_p else None, windows.window, windows.shift, windows.wrap,
        case.head_dim**-0.5, -100.0, case.dropout_p,
    )  # fmt: skip
    window3d.forward(call, out, lse)
    grads = [guarded(None, tuple(q.shape), dtype) for _ in range(3)]
    grads += [guarded(None, tuple(table.shape)), None if pad is None else guarded(None, tuple(pad.shape))]
    window3d.backward(call, dout, out, lse, *grads)
    for check in checks:
        check()
    expected, expected_lse = reference.window3d_attention(
        (q, k, v), table, pad_qkv=pad, return_lse=True, seed=seed, **case.options()
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert all(grad is None or grad.isfinite().all() for grad in grads)


# ---- Planes ----


@needs_triton
@pytest.mark.parametrize("size", [1, 16384, 20000])
def test_planes_know_the_largest_bias(size: int) -> None:
    device = device_of("triton")
    table = torch.randn(size, 1, device=device, generator=torch.Generator(device).manual_seed(0)) - 5
    for value in (None, -math.inf, math.nan):
        if value is not None:
            table[size // 2] = value
        largest, launch = window3d_planes._plan_largest(table)
        launch.run()
        torch.testing.assert_close(largest, table.amax().reshape(1), rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.usefixtures("fresh_plans")
def test_planes_apart_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks in planes of their own, as large windows with many heads have them."""
    case = Case((4, 6, 6), (2, 3, 3), (1, 1, 1), pad=False)
    inputs, options = to(case.inputs(torch.float32), device_of("triton")), dict(case.options(), backend="triton")
    together = evaluate(vidattn.window3d_attention, inputs, options)
    monkeypatch.setattr(window3d_planes, "COMBINED_LIMIT", 0)
    plans.forget()
    apart = evaluate(vidattn.window3d_attention, inputs, options)
    for name, value in together.items():
        torch.testing.assert_close(apart[name], value, rtol=1e-5, atol=1e-5)
