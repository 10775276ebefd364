"""DTensor and tensor parallelism: sharded calls and models against one process, by groups of processes on the CPU."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import distributed_models as models
import pytest
import torch
from distributed_cases import distance, largest, result, run_group
from integration_cases import Ops
from torch import Tensor

import vidattn

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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

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
MODELS = ("video_swin", "timesformer", "vivit", "xvit")


def _parallel_model(name: str, order: str) -> dict[str, Any]:
    """Compare a model that is parallelized with one that is not: output, input's gradient, and the state after a step.

    ``order`` says whether, and when, the model is accelerated: "plain", "before" it is parallelized, or "after".
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    import vidattn.distributed

    mesh = init_device_mesh("cpu", (PROCESSES,))
    alone, video = models.build(name).double(), models.clips(2).double()
    model = copy.deepcopy(alone)
    if order == "before":
        vidattn.accelerate(model)
    parallelize_module(model, mesh, vidattn.distributed.parallelize_plan(model, mesh))
    if order == "after":
        vidattn.accelerate(model)
    expected = models.step(alone, video)
    with Ops() as ops:
        found = models.step(model, video)
    state = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in model.state_dict().items()}
    wanted = alone.state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in wanted.items()}
    places = [str(value.placements[0]) for key, value in model.state_dict().items() if key.endswith("qkv.weight")]
    return {
        "distances": {
            **{f"result {place}": distance(one, other) for place, (one, other) in enumerate(zip(found, expected))},
            **{key: float((state[key].double() - wanted[key].double()).abs().max()) for key in wanted},
        },
        "calls": dict(ops.calls),
        "placements": places,
    }


CASES: dict[str, Any] = {
    **{f"{name} by {mode}": partial(_sharded_call, name, mode) for name in CALLS for mode in MODES},
    **{f"{name}, {order}": partial(_parallel_model, name, order) for name in MODELS for order in ("plain", "before")},
    "video_swin, after": partial(_parallel_model, "video_swin", "after"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_group(PROCESSES, CASES, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_sharded_calls_compute_the_same(results: dict[str, Any], name: str, mode: str) -> None:
    found = result(results, f"{name} by {mode}")
    assert largest(found["distances"]) < 1e-13, found


@pytest.mark.parametrize("order", ["plain", "before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_parallel_models_compute_the_same(results: dict[str, Any], name: str, order: str) -> None:
    if f"{name}, {order}" not in CASES:
        return
    found = result(results, f"{name}, {order}")
    assert largest(found["distances"].values()) < 1e-12, found
    assert found["placements"] and set(found["placements"]) == {"_S(0, 3)"}
