"""Training on several processes, with DDP and FSDP2, against one process: losses and weights after some steps."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import distributed_models as models
import pytest
import torch
import torch.distributed as dist
from distributed_cases import distance, largest, result, run_group
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

import vidattn
import vidattn.distributed

STEPS, CLIPS = 5, 4
NAMES = (*models.BUNDLED, *models.FOREIGN)
# What five steps may differ by, of each tensor's largest value: SGD in float32, AdamW in float64, and both in bfloat16.
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-11, "mixed": 0.05}


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
    """List the blocks of any model: what has a norm before each of its parts."""
    norms = {module: sum(isinstance(part, nn.LayerNorm) for part in module.children()) for module in model.modules()}
    return [module for module, count in norms.items() if count > 1]


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
            if module in _blocks(model):
                model.set_submodule(name, checkpoint_wrapper(module))
    if run.wrapper == "ddp":
        wrapped: nn.Module = DistributedDataParallel(
            model,
            [device.index] if device.type == "cuda" else None,
            find_unused_parameters=run.model
            == "xvit",  # as in its paper's code, its temporal head leaves one layer out
        )
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


def _steps(run: Run, model: nn.Module, video: Tensor, first: int) -> list[Tensor]:
    optimizer = _optimizer(run, model)
    autocast = run.option == "mixed" and run.wrapper == "ddp"
    return [models.learn(model, optimizer, video, first, autocast) for _ in range(STEPS)]


def _train(run: Run) -> dict[str, Any]:
    """Train on all clips alone, and on a part of them with the others; compare."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    alone, together = _make(run, device), _make(run, device)
    start = [parameter.detach().clone() for parameter in alone.parameters()]
    video = models.clips(CLIPS).to(next(alone.parameters()))
    wanted = _steps(run._replace(option=""), alone, video, 0)
    count = CLIPS // world_size
    wrapped = _distributed(run, together, device)
    losses = _steps(run, wrapped, video[rank * count :][:count], rank * count)
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
        "change": _norm(found[name] - expected[name] for name in expected)
        / _norm(after - before for after, before in zip(expected.values(), start, strict=True)),
    }


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([x.detach().double().norm() for x in tensors]).norm())


def _difference(run: Run, name: str, found: Tensor, expected: Tensor) -> float:
    if run.optimizer == "adamw" and name.endswith("qkv.bias"):
        # A bias of all keys alike moves no score: its gradient is rounding, and AdamW takes steps of full size by it.
        parts = [torch.cat((x[: len(x) // 3], x[2 * len(x) // 3 :])) for x in (found, expected)]
        return distance(*parts)
    return distance(found, expected)


def _assert_as_alone(run: Run, found: dict[str, Any]) -> None:
    assert found["loss"][1] < found["loss"][0]
    if run.option == "mixed":  # of which weights show little: what they changed by does
        assert largest(found["losses"]) < TOLERANCE["mixed"] and found["change"] < TOLERANCE["mixed"], (run, found)
        return
    tolerance = TOLERANCE[run.optimizer]
    assert largest(found["losses"]) < tolerance, (run, found["losses"])
    assert largest(found["weights"].values()) < tolerance, (run, found["weights"])


SELECTED = (
    Run("video_swin", "fsdp", "sgd"),
    Run("timesformer", "ddp", "adamw"),
    Run("xvit", "fsdp", "adamw"),
    Run("vivit", "fsdp", "sgd", "checkpoint"),
    Run("torchvision", "ddp", "sgd"),
)
ALL = tuple(itertools.starmap(Run, itertools.product(NAMES, ("ddp", "fsdp"), ("sgd", "adamw"))))
OPTIONS = tuple(
    Run(name, wrapper, "sgd", option)
    for name, wrapper in itertools.product(NAMES, ("ddp", "fsdp"))
    for option in ("mixed", "checkpoint", "compile", "offload")
    if option != "offload" or wrapper == "fsdp"
)


def _group(
    world_size: int, runs: tuple[Run, ...], factory: pytest.TempPathFactory, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    cases = {str(run): partial(_train, run) for run in runs} | (more or {})
    return run_group(world_size, cases, factory.mktemp("group"), device)


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _group(2, SELECTED, tmp_path_factory, {**COSTS, "cut twice": _twice_cut})


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


# ---- The formulas of docs/distributed.md ----


class _Sent(TorchDispatchMode):
    """Counts the bytes that collectives are about, by the name of the collective: of all processes together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {
            "allreduce": "all-reduce",
            "all_reduce": "all-reduce",
            "allgather": "all-gather",
            "scatter": "reduce-scatter",
        }
        kind = next((kind for name, kind in names.items() if "c10d" in func.namespace and name in func.name()), None)
        if kind is not None:
            sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args]
            self.bytes[kind] += max(sizes)
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def _costs(method: str, name: str) -> dict[str, Any]:
    """Count what a process holds and sends, beside what the documentation says."""
    processes = dist.get_world_size()
    model, video = models.build(name), models.clips(2)
    vidattn.accelerate(model)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    total = sum(sizes.values())
    blocks = _blocks(model)
    if method == "tensor":
        mesh = init_device_mesh("cpu", (processes,))
        parallelize_module(model, mesh, vidattn.distributed.parallelize_plan(model, mesh))
        whole = ("proj.bias", "fc2.bias")
        parts = (".attn.", ".temporal_attn.", ".attn_time.", ".attn_space.", ".mlp.")
        shared = sum(
            size for key, size in sizes.items() if any(part in key for part in parts) and not key.endswith(whole)
        )
        held = shared // processes + total - shared
        attended = [4 * 2 * 64 * 16, 4 * 2 * 65 * 16, 4 * 2 * 65 * 16]  # time, space, MLP of a block: a B S C
        expected = {"all-reduce": 2 * len(blocks) * sum(attended)}
    elif method == "fsdp":
        # Filled up to rows that all processes have alike.
        filled, inner = (
            sum(-(-len(x) // processes) * processes * x[0].numel() for part in parts for x in part.parameters())
            for parts in ([model], blocks)
        )
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        held = filled // processes
        expected = {"all-gather": 4 * (filled + inner), "reduce-scatter": 4 * filled}
    else:
        held, expected = total, {"all-reduce": 4 * total}
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):  # DDP sends more in its first step
        with _Sent() as sent:
            models.learn(model, optimizer, video)
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tree_leaves([*model.parameters(), optimizer.state])]
    return {
        "held": sum(x.numel() for x in local if isinstance(x, Tensor) and x.ndim > 0) / (3 * held),
        "sent": {kind: count / expected[kind] for kind, count in sent.bytes.items()},
        "expected": sorted(expected),
    }


def _twice_cut() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("data", "tensor"))
    model = models.build("timesformer")
    parallelize_module(model, mesh["tensor"], vidattn.distributed.parallelize_plan(model, mesh["tensor"]))
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.qkv\.weight: expected rows that are sharded by heads alone"
    ) as caught:
        model.state_dict()
    return str(caught.value)


COSTS = {method: partial(_costs, method, "timesformer") for method in ("ddp", "fsdp", "tensor")}


def _assert_as_documented(found: dict[str, Any]) -> None:
    assert sorted(found["sent"]) == found["expected"]
    assert all(ratio == 1 for ratio in (*found["sent"].values(), found["held"])), found


@pytest.mark.parametrize("method", COSTS)
def test_memory_and_bytes_are_as_documented(selected: dict[str, Any], method: str) -> None:
    _assert_as_documented(result(selected, method))


@pytest.mark.slow
def test_memory_and_bytes_of_four_processes(tmp_path: Path) -> None:
    found = run_group(4, COSTS, tmp_path)
    for method in COSTS:
        _assert_as_documented(result(found, method))


def test_rows_that_are_cut_twice_are_not_saved(selected: dict[str, Any]) -> None:
    assert "placements" in result(selected, "cut twice")


# ---- examples/train_distributed.py ----

ROOT = Path(__file__).parent.parent
EXAMPLE_STEPS, EVERY, KILLED_AFTER = 30, 12, 17


def _start(folder: Path, processes: int, method: str = "fsdp") -> subprocess.Popen[bytes]:
    """Start the example as its first lines say."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    example = ["examples/train_distributed.py", "--folder", str(folder), "--method", method]
    sizes = ["--steps", str(EXAMPLE_STEPS), "--every", str(EVERY)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, *example, *sizes], cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def _finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and the processes that it has started, all at once."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    for child in (process.pid, *map(int, children)):
        os.kill(child, signal.SIGKILL)
    process.communicate()


def _steps_in(folder: Path) -> list[tuple[int, float]]:
    log = folder / "losses.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(row["step"], row["loss"]) for row in rows]


def _checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-?????"))


def _read(folder: Path, to: Path) -> Any:
    dcp_to_torch_save(folder / f"step-{EXAMPLE_STEPS:05d}", to)
    return torch.load(to)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, processes: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _finish(_start(whole, processes))
    process = _start(killed, processes)
    while len(_steps_in(killed)) < KILLED_AFTER and process.poll() is None:
        time.sleep(0.01)
    _kill(process)
    before, (saved, *_) = _steps_in(killed), reversed(_checkpoints(killed))
    assert KILLED_AFTER <= len(before) < EXAMPLE_STEPS and saved == EVERY
    (killed / f"step-{2 * EVERY:05d}.partial").mkdir()  # as a training leaves it that was killed while it saved
    _finish(_start(killed, processes))
    after = _steps_in(killed)[len(before) :]
    assert [step for step, _ in after] == list(range(saved, EXAMPLE_STEPS))
    assert [*before[:saved], *after] == _steps_in(whole)
    assert _checkpoints(killed) == [2 * EVERY, EXAMPLE_STEPS] and not list(killed.glob("*.partial"))
    (found, shape), (wanted, wanted_shape) = (
        tree_flatten(_read(folder, tmp_path / folder.name.upper())) for folder in (killed, whole)
    )
    assert shape == wanted_shape and len(found) > 100
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.slow
def test_a_training_goes_on_with_other_processes(tmp_path: Path) -> None:
    """Four processes that share the parameters, then two that copy them."""
    process = _start(tmp_path, processes=4)
    while not _checkpoints(tmp_path) and process.poll() is None:
        time.sleep(0.01)
    _kill(process)
    (saved,) = _checkpoints(tmp_path)
    before = len(_steps_in(tmp_path))
    _finish(_start(tmp_path, processes=2, method="ddp"))
    after = _steps_in(tmp_path)[before:]
    assert [step for step, _ in after] == list(range(saved, EXAMPLE_STEPS))
    again = dict(_steps_in(tmp_path)[:before])
    assert all(abs(loss - again[step]) < 1e-4 for step, loss in after if step in again)
    assert after[-1][1] < _steps_in(tmp_path)[0][1]
