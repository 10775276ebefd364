"""DTensor and tensor parallelism: sharded calls and models against one process, by groups of processes on the CPU."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import distributed_models as models
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import distance, largest, result, run_group
from integration_cases import Ops
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import vidattn
import vidattn.distributed
from vidattn.distributed import plan as plan_module

PROCESSES = 2
BATCH, HEADS, HEAD_DIM = 4, 6, 8


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _window3d(packed: Tensor, table: Tensor, padding: Tensor) -> Tensor:
    return vidattn.window3d_attention(packed, table, window_size=(2, 3, 3), shift_size=(1, 1, 1), pad_qkv=padding)


def _separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return vidattn.window3d_attention((q, k, v), window_size=(2, 3, 3))


def _windows(packed: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return vidattn.window_attention(packed, bias, mask)


def _spatial(packed: Tensor) -> Tensor:
    out, cls = vidattn.spatial_attention(packed, 3, cls_token="per_frame")
    return torch.cat((out, cls), dim=1)


# The call, and the shapes of its tensors with the dimension of the heads; None is for what is not learned.
CALLS: dict[str, tuple[Any, list[tuple[tuple[int, ...], int | None]]]] = {
    "window3d": (
        _window3d,
        [
            ((BATCH, 3, 4, 5, 3, HEADS, HEAD_DIM), 5),
            ((3 * 5 * 5, HEADS), 1),
            ((3, HEADS, HEAD_DIM), 1),
        ],
    ),
    "window3d, separate": (_separate, [((BATCH, 2, 4, 3, HEADS, HEAD_DIM), 4)] * 3),
    "windows": (
        _windows,
        [((BATCH, 6, 3, HEADS, HEAD_DIM), 3), ((HEADS, 6, 6), 0), ((2, 6, 6), None)],
    ),
    "windows, as many masks": (
        _windows,
        [((BATCH, 6, 3, HEADS, HEAD_DIM), 3), ((HEADS, 6, 6), 0), ((BATCH, 6, 6), None)],
    ),
    "time": (partial(vidattn.temporal_attention, num_frames=3), [((BATCH, 12, 3, HEADS, HEAD_DIM), 3)]),
    "space": (_spatial, [((BATCH, 13, 3, HEADS, HEAD_DIM), 3)]),
    "factorized": (
        partial(vidattn.factorized_dot_product_attention, num_frames=3, num_temporal_heads=1),
        [((BATCH, 12, 3, HEADS, HEAD_DIM), 3)],
    ),
    "mixing": (
        partial(vidattn.space_time_mixing_attention, num_frames=2, shift_div=3),
        [((BATCH, 5, 3, HEADS, HEAD_DIM), 3)],
    ),
    "shift": (
        partial(vidattn.temporal_shift, num_frames=2, channel_shifts=[(0, 3, 1), (4, 6, -1)]),
        [((BATCH, 5, 8), None)],
    ),
}


def _run(call: Any, tensors: list[Tensor], learned: list[bool]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(needed) for x, needed in zip(tensors, learned)]
    out = call(*leaves)
    # A loss of each element by itself, so that the gradient is no constant and lies as the output does.
    (out.sin() if isinstance(out, Tensor) else out).sum().backward()
    return [out, *(x.grad for x in leaves if x.requires_grad)]  # type: ignore[list-item]


def _sharded_call(name: str, mode: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    call, shapes = CALLS[name]
    tensors = [_random(*shape) for shape, _ in shapes]
    learned = [heads is not None or len(shapes) == 1 for _, heads in shapes]
    expected = _run(call, tensors, learned)
    placed = []
    for number, (x, (shape, heads)) in enumerate(zip(tensors, shapes)):
        place: Any = Replicate()
        if mode == "batch" and shape[0] == BATCH:
            place = Shard(0)
        elif mode == "heads" and heads is not None:
            place = Shard(heads)
        elif mode == "tokens" and number == 0:
            place = Shard(1)
        placed.append(distribute_tensor(x, mesh, [place]))
    found = _run(call, placed, learned)
    assert all(isinstance(x, DTensor) for x in found)
    return {
        "distances": [distance(x.full_tensor(), y) for x, y in zip(found, expected, strict=True)],
        "placements": [str(x.placements[0]) for x in found],
    }


MODES = ("batch", "heads", "tokens", "none")
# Ops of a step of each model, with those of the backward pass.
MODELS: dict[str, dict[str, int]] = {
    "video_swin": {"window3d_attention": 4},
    "timesformer": {"divided_attention": 4},
    "vivit": {"divided_attention": 4},
    "vivit_dot_product": {"divided_attention": 2},
    "xvit": {"space_time_mixing_attention": 2, "divided_attention": 1},
}
FULL = {"full_state_dict": True}


def _parallel(name: str, order: str = "before", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a model, sharded by its plan. ``order`` says when it is accelerated: "before", "after", or "never"."""
    model = models.build(name).to(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if order == "before":
        vidattn.accelerate(model)
    parallelize_module(model, mesh, vidattn.distributed.parallelize_plan(model, mesh))
    if order == "after":
        vidattn.accelerate(model)
    return model


def _full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def _parallel_model(name: str, order: str) -> dict[str, Any]:
    """Compare a sharded model with one process: output, gradient of the input, and the state after a step."""
    alone, model, video = models.build(name).double(), _parallel(name, order), models.clips(2).double()
    expected = models.step(alone, video)
    with Ops() as ops:
        found = models.step(model, video)
    state, wanted = model.state_dict(), alone.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in wanted.items()}
    after = _full(state)
    return {
        "results": [distance(one, other) for one, other in zip(found, expected, strict=True)],
        "state": [float((after[key] - wanted[key]).abs().max()) for key in wanted],
        "ops": dict(ops.calls),
        "placements": [str(value.placements[0]) for key, value in state.items() if key.endswith("qkv.weight")],
    }


def _compiled_model(name: str) -> dict[str, Any]:
    model, video = _parallel(name), models.clips(2).double()
    expected = models.step(copy.deepcopy(model), video)
    found = models.step(torch.compile(model, backend="aot_eager", fullgraph=True), video)
    return {"distances": [distance(one, other) for one, other in zip(found, expected, strict=True)]}


def _options_are_told_apart() -> list[bool]:
    """Windows of one shape whose table has a gradient, has none, and has one again."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    call, shapes = CALLS["window3d"]
    found = []
    for needed in (True, False, True):
        placed = [
            distribute_tensor(_random(*shape), mesh, [Shard(0)] if shape[0] == BATCH else [Replicate()])
            for shape, _ in shapes
        ]
        found.append(len(_run(call, placed, [True, needed, needed])))
    return [count == 2 + 2 * needed for count, needed in zip(found, (True, False, True))]


def _dropout() -> str:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    qkv = distribute_tensor(_random(2, 12, 3, 2, 8), mesh, [Shard(3)])
    with pytest.raises(ValueError, match=r"dropout_p: expected 0\.0 for DTensors, got 0\.5") as caught:
        vidattn.temporal_attention(qkv, 3, dropout_p=0.5)
    return str(caught.value)


def _checkpoint(folder: str) -> dict[str, Any]:
    """Save a sharded model and its optimizer, and go on from there with another one, and on one process."""
    options = StateDictOptions(**FULL)
    video = models.clips(2)
    trained, restored = (_parallel("video_swin", dtype=torch.float32) for _ in range(2))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (trained, restored)]
    models.learn(trained, optimizers[0], video)
    model_state, optimizer_state = get_state_dict(trained, optimizers[0], options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    model_state, optimizer_state = get_state_dict(restored, optimizers[1], options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    alone = models.build("video_swin")
    alone.load_state_dict(state["model"])
    set_state_dict(
        restored,
        optimizers[1],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    saved = all(torch.equal(alone.state_dict()[key], value) for key, value in _full(trained.state_dict()).items())
    for model, optimizer in zip((trained, restored), optimizers):
        models.learn(model, optimizer, video)
    after = [_full(model.state_dict()) for model in (trained, restored)]
    return {"saved": saved, "goes on": all(torch.equal(after[0][key], after[1][key]) for key in after[0])}


def _clipped_gradients() -> float:
    """The norm of the gradients of DTensors and tensors together, as the documentation says."""
    alone, model = models.build("timesformer").double(), _parallel("timesformer")
    norms = []
    for each in (alone, model):
        each(models.clips(2).double()).square().sum().backward()
        with implicit_replication():
            norm = torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return distance(norms[1], norms[0])


CASES: dict[str, Any] = {
    "told apart": _options_are_told_apart,
    "dropout": _dropout,
    "clipped": _clipped_gradients,
    **{f"{name} by {mode}": partial(_sharded_call, name, mode) for name in CALLS for mode in MODES},
    **{f"{name}, {order}": partial(_parallel_model, name, order) for name in MODELS for order in ("never", "before")},
    "video_swin, after": partial(_parallel_model, "video_swin", "after"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("group")
    cases = CASES | {"checkpoint": partial(_checkpoint, str(folder / "checkpoint"))}
    return run_group(PROCESSES, cases, folder)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_sharded_calls_compute_the_same(results: dict[str, Any], name: str, mode: str) -> None:
    found = result(results, f"{name} by {mode}")
    assert largest(found["distances"]) < 1e-13, found


@pytest.mark.parametrize(
    ("case", "placements"),
    [
        ("window3d by batch", ["S(0)", "S(0)", "P(sum)", "P(sum)"]),
        ("window3d by heads", ["S(4)", "S(5)", "S(1)", "S(1)"]),
        ("window3d by tokens", ["S(0)", "S(0)", "P(sum)", "P(sum)"]),  # sent to where it is cheapest
        ("window3d, separate by heads", ["S(4)", "S(4)", "S(4)", "S(4)"]),
        ("windows by batch", ["S(0)", "S(0)", "P(sum)"]),
        ("windows by heads", ["S(2)", "S(3)", "S(0)"]),
        ("time by heads", ["S(2)", "S(3)"]),
        ("factorized by heads", ["S(2)", "S(3)"]),
        ("mixing by batch", ["S(0)", "S(0)"]),
        ("mixing by heads", ["S(2)", "S(3)"]),
        ("shift by batch", ["S(0)", "S(0)"]),
    ],
)
def test_results_lie_where_they_are_computed(results: dict[str, Any], case: str, placements: list[str]) -> None:
    """Output first, then the gradients; nothing is gathered that need not be."""
    assert result(results, case)["placements"] == placements


def test_which_gradients_are_needed_is_no_matter_of_shapes(results: dict[str, Any]) -> None:
    assert result(results, "told apart") == [True, True, True]


def test_dropout_of_sharded_calls_is_refused(results: dict[str, Any]) -> None:
    assert result(results, "dropout").startswith("divided_attention: ")


@pytest.mark.parametrize("order", ["never", "before"])
@pytest.mark.parametrize("name", MODELS)
def test_parallel_models_compute_the_same(results: dict[str, Any], name: str, order: str) -> None:
    found = result(results, f"{name}, {order}")
    assert largest(found["results"]) < 1e-12 and largest(found["state"]) < 1e-12, found
    assert found["placements"] and set(found["placements"]) == {"_S(0, 3)"}
    ops = MODELS[name] if order == "before" else {}
    assert found["ops"] == {name + suffix: count for name, count in ops.items() for suffix in ("", "_backward")}


def test_a_parallel_model_can_be_accelerated(results: dict[str, Any]) -> None:
    found = result(results, "video_swin, after")
    assert largest(found["results"]) < 1e-12 and largest(found["state"]) < 1e-12, found
    assert found["ops"] == {"window3d_attention": 4, "window3d_attention_backward": 4}


@pytest.mark.slow
def test_parallel_models_compile_whole(tmp_path: Path) -> None:
    found = run_group(PROCESSES, {name: partial(_compiled_model, name) for name in MODELS}, tmp_path)
    for name in MODELS:
        assert largest(result(found, name)["distances"]) < 1e-13


def _on_a_grid(name: str) -> dict[str, Any]:
    """Batch over two processes and heads over two, in one mesh."""
    mesh = init_device_mesh("cpu", (2, 2))
    call, shapes = CALLS[name]
    tensors, learned = [_random(*shape) for shape, _ in shapes], [heads is not None for _, heads in shapes]
    expected = _run(call, tensors, learned)
    places = [
        [Shard(0) if shape[0] == BATCH else Replicate(), Replicate() if heads is None else Shard(heads)]
        for shape, heads in shapes
    ]
    found = _run(call, [distribute_tensor(x, mesh, place) for x, place in zip(tensors, places)], learned)
    return {
        "distances": [distance(x.full_tensor(), y) for x, y in zip(found, expected, strict=True)],
        "placements": [[str(place) for place in x.placements] for x in found],
    }


@pytest.mark.slow
def test_batch_and_heads_at_once(tmp_path: Path) -> None:
    names = [name for name in CALLS if name != "shift"]
    found = run_group(4, {name: partial(_on_a_grid, name) for name in names}, tmp_path)
    for name in names:
        (batch, heads), *_ = result(found, name)["placements"]
        assert largest(found[name]["distances"]) < 1e-13 and heads.startswith("S"), found[name]
        assert batch == ("R" if "as many masks" in name else "S(0)")  # half of those windows have other masks


@pytest.mark.slow
def test_four_processes_share_heads(tmp_path: Path) -> None:
    cases = {
        f"{name}, {order}": partial(_parallel_model, name, order) for name in MODELS for order in ("before", "never")
    }
    found = run_group(4, cases, tmp_path)
    for name in cases:
        assert largest(result(found, name)["results"]) < 1e-12 and largest(found[name]["state"]) < 1e-12


def test_a_parallel_model_is_saved_and_restored(results: dict[str, Any]) -> None:
    assert result(results, "checkpoint") == {"saved": True, "goes on": True}


def test_gradients_of_a_parallel_model_are_clipped_together(results: dict[str, Any]) -> None:
    assert result(results, "clipped") < 1e-13


def test_importing_the_package_leaves_dtensor_out() -> None:
    code = "import sys, vidattn, vidattn.models, vidattn.nn; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Give a mesh of six processes, of which this is one and the others are not there."""
    dist.init_process_group("fake", rank=0, world_size=6, store=FakeStore())
    yield init_device_mesh("cpu", (6,))
    dist.destroy_process_group()


def test_what_the_mesh_does_not_divide_stays_replicated_and_is_named(mesh: DeviceMesh) -> None:
    model = models.build("timesformer")  # 4 heads, 64 hidden channels
    model.model.blocks[0].attn.num_heads = 6
    with pytest.warns(UserWarning, match="these stay replicated") as caught:
        plan = vidattn.distributed.parallelize_plan(model, mesh)
    assert sorted(plan) == ["model.blocks.0.attn.proj", "model.blocks.0.attn.qkv"]
    text = str(caught[0].message)
    assert text.count("its 4 heads are no multiple of 6 processes") == 3
    assert "model.blocks.1.mlp (its 64 hidden channels are no multiple of 6 processes)" in text


class Adapted(nn.Linear):
    """A layer that may be anything."""


def test_layers_of_other_kinds_stay_replicated(mesh: DeviceMesh) -> None:
    model = models.build("timesformer")
    for module in model.modules():
        if hasattr(module, "num_heads"):
            module.num_heads = 6
    model.model.blocks[1].attn.proj = Adapted(16, 16)
    with pytest.warns(UserWarning, match=r"model\.blocks\.1\.attn \(its proj is a Adapted\)"):
        plan = vidattn.distributed.parallelize_plan(model, mesh)
    assert len(plan) == 6 and "model.blocks.1.attn.qkv" not in plan


def test_examples() -> None:
    found = doctest.testmod(plan_module)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.filterwarnings("ignore:parallelize_plan")
def test_plans_that_cannot_be(mesh: DeviceMesh) -> None:
    plan = vidattn.distributed.parallelize_plan
    with pytest.raises(ValueError, match="expected attention or an MLP of a bundled model that 6 processes can share"):
        plan(models.build("timesformer"), mesh)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got 3"):
        plan(3, mesh)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh, got None"):
        plan(nn.Linear(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mesh: expected one dimension, got shape \(2, 3\)"):
        plan(models.build("timesformer"), init_device_mesh("cpu", (2, 3)))
