"""Groups of processes on this machine, each of which runs many cases, for the tests of everything distributed."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

# Rank, world size, and what the case gives on rank 0 of each group: numbers and tensors that can be saved.
Case = Callable[[], Any]


class Failed(str):
    """The traceback of a case that failed on some process."""


def run_group(world_size: int, cases: dict[str, Case], folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Run all cases in one group of processes, one after the other.

    Args:
        world_size: number of processes.
        cases: functions that can be pickled, by name; all processes call them in the same order.
        folder: empty folder for what the processes write.
        device: "cpu" for gloo; "cuda" for NCCL and a GPU for each process.

    Returns:
        What each case returned on rank 0, or ``Failed``. Cases after a failed one are not run: the processes may
        no longer be at the same place.
    """
    torch.multiprocessing.spawn(_process, (world_size, cases, str(folder), device), nprocs=world_size)
    results = torch.load(folder / "results")
    for rank in range(world_size):
        for name, text in torch.load(folder / f"failed{rank}").items():
            results[name] = Failed(f"on rank {rank}: {text}")
    return results


def _process(rank: int, world_size: int, cases: dict[str, Case], folder: str, device: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which fills what nobody wrote with NaN
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=90),
    )
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, case in cases.items():
        try:
            torch.manual_seed(0)
            results[name] = case()
            dist.barrier()
        except Exception:
            failed[name] = traceback.format_exc()
            break
    torch.save(failed, Path(folder) / f"failed{rank}")
    if rank == 0:
        torch.save(results, Path(folder) / "results")
    dist.destroy_process_group()


def result(results: dict[str, Any], name: str) -> Any:
    """Give the result of a case; fail with its traceback, or that of the case that stopped the group before it."""
    failed = next((value for value in results.values() if isinstance(value, Failed)), None)
    found = results.get(name, failed)
    assert not isinstance(found, Failed), found
    assert found is not None, f"{name} gave nothing"
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value of the second."""
    one, other = one.detach().double(), other.detach().double()
    assert one.shape == other.shape, (one.shape, other.shape)
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def largest(distances: Iterable[float]) -> float:
    """The largest; NaN where one of them is."""
    return max(distances, key=lambda value: (value != value, value), default=0.0)
