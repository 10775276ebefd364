"""Training on several processes, with DDP and FSDP2, against one process: losses and weights after some steps."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from typing import Any, NamedTuple

import distributed_models as models
import pytest
import torch
import torch.distributed as dist
from distributed_cases import distance, largest, result, run_group
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import vidattn

STEPS, CLIPS = 5, 4
NAMES = (*models.BUNDLED, *models.FOREIGN)
# What five steps may differ by, of each tensor's largest value: SGD in float32, AdamW in float64, and both in bfloat16.
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-9, "mixed": 0.05}


class Run(NamedTuple):
    """How a model is trained.

    Attributes:
        model: name of the model.
        wrapper: "ddp", or "fsdp" for FSDP2 with each block a unit.
        optimizer: "sgd" with momentum in float32, or "adamw" in float64.
        option: "", "mixed" (bfloat16), "offload" (parameters of FSDP2 in the memory of the host), "checkpoint"
            (activations of the blocks are computed again), "compile" (as autograd sees it, without code being made).
    """

    model: str
    wrapper: str
    optimizer: str
    option: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, self))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """List modules with a norm of their own, innermost first: blocks, and what is around them."""
    found = [module for module in model.modules() if any(isinstance(part, nn.LayerNorm) for part in module.children())]
    return [module for module in reversed(found) if module is not model]


def _optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    if run.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _make(run: Run, device: torch.device) -> nn.Module:
    model = models.build(run.model).to(device, torch.float64 if run.optimizer == "adamw" else torch.float32)
    vidattn.accelerate(model)
    return model


def _distributed(run: Run, model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model in place, for all processes."""
    if run.option == "checkpoint":
        for name, module in list(model.named_modules()):
            if module in _blocks(model) and not isinstance(module, nn.Sequential):
                model.set_submodule(name, checkpoint_wrapper(module))
    if run.wrapper == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    else:
        options: dict[str, Any] = {}
        if run.option == "mixed":
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if run.option == "offload":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for module in _blocks(model):
            fully_shard(module, **options)
        wrapped = fully_shard(model, **options)
    if run.option == "compile":
        wrapped.compile(backend="aot_eager")
    return wrapped


def _steps(run: Run, model: nn.Module, video: Tensor, first: int, device: torch.device) -> list[Tensor]:
    optimizer = _optimizer(run, model)
    cast = run.option == "mixed" and run.wrapper == "ddp"
    with torch.autocast(device.type, torch.bfloat16) if cast else contextlib.nullcontext():
        return [models.learn(model, optimizer, video, first) for _ in range(STEPS)]


def _train(run: Run) -> dict[str, Any]:
    """Train on all clips alone, and on a part of them with the others; compare."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    alone, together = _make(run, device), _make(run, device)
    video = models.clips(CLIPS).to(next(alone.parameters()))
    wanted = _steps(run._replace(option=""), alone, video, 0, device)
    count = CLIPS // world_size
    wrapped = _distributed(run, together, device)
    losses = _steps(run, wrapped, video[rank * count :][:count], rank * count, device)
    for loss in losses:
        dist.all_reduce(loss)
    expected = dict(alone.named_parameters())
    found = {}
    for name, parameter in together.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name.replace("_checkpoint_wrapped_module.", "")] = value
    assert found.keys() == expected.keys()
    return {
        "losses": [distance(one / world_size, other) for one, other in zip(losses, wanted, strict=True)],
        "weights": {name: _difference(run, name, found[name], expected[name]) for name in expected},
        "loss": [wanted[0].item(), wanted[-1].item()],
    }


def _difference(run: Run, name: str, found: Tensor, expected: Tensor) -> float:
    if run.optimizer == "adamw" and name.endswith("qkv.bias"):
        # A bias of all keys alike moves no score: its gradient is rounding, and AdamW takes steps of full size by it.
        parts = [torch.cat((x[: len(x) // 3], x[2 * len(x) // 3 :])) for x in (found, expected)]
        return distance(*parts)
    return distance(found, expected)


def _assert_as_alone(run: Run, found: dict[str, Any]) -> None:
    tolerance = TOLERANCE["mixed" if run.option == "mixed" else run.optimizer]
    assert found["loss"][1] < found["loss"][0]
    assert largest(found["losses"]) < tolerance, (run, found["losses"])
    assert largest(found["weights"].values()) < tolerance, (run, found["weights"])


SELECTED = (
    Run("video_swin", "fsdp", "sgd"),
    Run("timesformer", "ddp", "adamw"),
    Run("xvit", "fsdp", "adamw"),
    Run("vivit", "ddp", "sgd"),
    Run("torchvision", "ddp", "sgd"),
    Run("transformers", "fsdp", "sgd", "checkpoint"),
)
ALL = tuple(itertools.starmap(Run, itertools.product(NAMES, ("ddp", "fsdp"), ("sgd", "adamw"))))
OPTIONS = tuple(
    Run(name, wrapper, "sgd", option)
    for name, wrapper in itertools.product(NAMES, ("ddp", "fsdp"))
    for option in ("mixed", "checkpoint", "compile", "offload")
    if option != "offload" or wrapper == "fsdp"
)


def _group(world_size: int, runs: tuple[Run, ...], factory: pytest.TempPathFactory) -> dict[str, Any]:
    device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    return run_group(world_size, {str(run): partial(_train, run) for run in runs}, factory.mktemp("group"), device)


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _group(2, SELECTED, tmp_path_factory)


@pytest.mark.parametrize("run", SELECTED, ids=str)
def test_two_processes_train_as_one(selected: dict[str, Any], run: Run) -> None:
    _assert_as_alone(run, result(selected, str(run)))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_models_train_as_on_one_process(tmp_path_factory: pytest.TempPathFactory, world_size: int) -> None:
    found = _group(world_size, ALL, tmp_path_factory)
    for run in ALL:
        _assert_as_alone(run, result(found, str(run)))


@pytest.mark.slow
def test_all_models_train_with_every_option(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = _group(2, OPTIONS, tmp_path_factory)
    for run in OPTIONS:
        _assert_as_alone(run, result(found, str(run)))
