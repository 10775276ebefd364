"""What else a group of processes does with clips that are cut: tasks, each done by all of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_frames_cases import CASES, build, clip_of, run, step, timesformer, video_swin, vivit
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vidattn
from vidattn.distributed import shard_frames

PROCESSES = 4


class Failed(str):
    """The traceback of a case or task that could not be done."""


def _message(call: Callable[[], Any]) -> str:
    """Give the error that a call raises, as a text."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(mesh: DeviceMesh) -> dict[str, str]:
    """What this rank says of mistakes; those that only one rank makes, all have to notice."""
    clip = torch.zeros(1, 3, 8, 16, 24, dtype=torch.float64)
    rank, found = mesh.get_local_rank(), {}
    model = build(CASES["timesformer"])
    cut = shard_frames(model, mesh)
    part = cut.split(clip)
    found["three frames"] = _message(lambda: cut.split(clip[:, :, :3]))
    found["no clip"] = _message(lambda: cut.split(clip[0]))
    found["another cut"] = _message(lambda: model(part[:, :, :1] if rank == 0 else part))
    found["another batch"] = _message(lambda: model(part.repeat(2, 1, 1, 1, 1) if rank == 3 else part))
    found["no batch"] = _message(lambda: model(part[0] if rank == 1 else part))
    found["three frames, cut by hand"] = _message(lambda: model(clip[:, :, rank : rank + (rank < 3)]))
    found["features"] = _message(lambda: model.forward_features(part))
    found["twice"] = _message(lambda: shard_frames(model, mesh))
    found["a part of a model"] = _message(lambda: shard_frames(model.model, mesh))
    fresh = build(CASES["timesformer"])
    shard_frames(fresh, mesh)
    found["a part called"] = _message(lambda: fresh.model(part))

    random = timesformer(drop_rate=0.5).double()
    shard_frames(random, mesh)
    found["dropout of tokens"] = _message(lambda: random(part))
    found["dropout in evaluation"] = _message(lambda: random.eval()(part))

    fully = build(CASES["timesformer"])
    shard_frames(fully, mesh)
    for block in fully.get_submodule("model.blocks").children():
        fully_shard(block, mesh=mesh)
    found["parameters in parts"] = _message(lambda: fully(part))

    swin = shard_frames(video_swin().double(), mesh)
    found["three windows"] = _message(lambda: swin.split(torch.zeros(1, 3, 11, 8, 8)))
    found["one window"] = _message(lambda: swin.split(torch.zeros(1, 3, 3, 8, 8)))
    fixed = vivit().double()
    whole = shard_frames(fixed, mesh).split(torch.zeros(1, 3, 18, 16, 24, dtype=torch.float64))
    found["another length"] = _message(lambda: fixed(whole))
    tall = vivit(
        patches=(8, 8),
        image_size=(20, 24),
        temporal_encoding_config={"method": "temporal_sampling", "n_sampled_frames": 4},
    )
    found["patches of two frames"] = _message(lambda: shard_frames(tall, mesh))
    return found


def outside(mesh: DeviceMesh) -> str:
    """What this rank says of a mesh without rank 3."""
    fewer = DeviceMesh("cpu", [0, 1, 2])
    return _message(lambda: shard_frames(build(CASES["timesformer"]), fewer))


def two_clips_of_two_lengths(mesh: DeviceMesh) -> list[Tensor | None]:
    """One step on two clips of which each is summed into the gradients; then one of SGD, and the logits after it."""
    model = build(CASES["timesformer"])
    cut = shard_frames(model, mesh)
    return _train(model, cut.split)


def _train(model: nn.Module, split: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    clip = clip_of(CASES["timesformer"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first, second = model(split(clip)), model(split(clip[:, :, :5].flip(2)))
    (first.square().sum() + second.sin().sum()).backward()
    model(split(clip)).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.step()
    with torch.no_grad():
        return [*gradients, model(split(clip))]


def two_clips_of_two_lengths_alone() -> list[Tensor | None]:
    """The same in one process."""
    return _train(build(CASES["timesformer"]), lambda clip: clip)


ORDERED = ("timesformer", "vivit 3", "vivit 4", "xvit", "video_swin")


def accelerated_afterwards(mesh: DeviceMesh) -> dict[str, Any]:
    """Results where ``accelerate`` comes after ``shard_frames``; how many modules it swapped; and after revert."""
    found = {}
    for name in ORDERED:
        model = build(CASES[name])
        classes = [type(module) for module in model.modules()]
        cut = shard_frames(model, mesh)
        acceleration = vidattn.accelerate(model)
        *_, result = step(model, cut.split(clip_of(CASES[name])))
        acceleration.revert()
        cut.revert()
        reverted = classes == [type(module) for module in model.modules()]
        found[name] = (result, len(acceleration.swapped), reverted and not acceleration.kept)
    return found


def checkpointed(mesh: DeviceMesh) -> dict[str, Any]:
    """Results where the blocks compute their activations again in the backward pass."""
    found = {}
    for name in ("timesformer", "vivit 4", "xvit"):
        model = build(CASES[name])
        cut = shard_frames(model, mesh)
        blocks = {type(module) for module in model.modules() if type(module).__name__.endswith("Block")}
        apply_activation_checkpointing(model, check_fn=lambda module, blocks=blocks: type(module) in blocks)
        assert any(isinstance(module, CheckpointWrapper) for module in model.modules())
        *_, result = step(model, cut.split(clip_of(CASES[name])))
        names = {key: key.replace("_checkpoint_wrapped_module.", "") for key in result.gradients}
        found[name] = result._replace(gradients={names[key]: grad for key, grad in result.gradients.items()})
    return found


def data_parallel(mesh: DeviceMesh) -> dict[str, Tensor | None]:
    """Gradients of DDP over two clips, each cut over two of the four ranks."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "frames"))
    model = build(CASES["timesformer"])
    cut = shard_frames(model, both["frames"])
    wrapped = DistributedDataParallel(model, process_group=both["data"].get_group())
    clip = clip_of(CASES["timesformer"])[both["data"].get_local_rank()].unsqueeze(0)
    wrapped(cut.split(clip)).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def data_parallel_alone() -> dict[str, Tensor | None]:
    """The same in one process, which takes the mean over both clips."""
    model = build(CASES["timesformer"])
    (model(clip_of(CASES["timesformer"])).square().sum() / 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


TASKS: dict[str, Callable[[DeviceMesh], Any]] = {
    task.__name__: task
    for task in (errors, outside, two_clips_of_two_lengths, accelerated_afterwards, checkpointed, data_parallel)
}


def work(rank: int, folder: str) -> None:
    """Run all cases with 2, 3 and 4 of the processes, and all tasks with 4; write down what this one found."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what a collective leaves unwritten with NaN
    store, patience = f"file://{folder}/store", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=patience)
    found: dict[Any, Any] = {}

    def note(key: Any, call: Callable[[], Any]) -> None:
        try:
            found[key] = call()
        except Exception:
            found[key] = Failed(traceback.format_exc())

    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in range(PROCESSES, 1, -1)}  # made by all
    for name, task in TASKS.items():
        note(name, partial(task, meshes[PROCESSES]))
    for size, mesh in meshes.items():
        for name, case in CASES.items() if rank < size else ():
            note((name, size), partial(run, case, mesh))
    torch.save(found, Path(folder) / f"rank{rank}")
    dist.destroy_process_group()
