"""Train a small video transformer on several processes, with checkpoints that survive being killed.

Run as ``torchrun --nproc-per-node 4 examples/train_distributed.py`` (needs rich: ``pip install rich``), about a minute
on two cores. Each process is a CPU with gloo, or a GPU with NCCL where there are enough. The model learns which way a
texture moves, as in ``train_motion.py``; its parameters are sharded by FSDP2, or copied by DDP.

Started again on the same folder, with any number of processes, the training goes on from its last checkpoint. A
checkpoint is written beside the last one and takes its name when it is whole, so that whenever the training is killed,
there is one to go on from. All that is random follows from the number of the step: with as many processes as before the
weights become bit for bit those of a training that was never killed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from train_motion import MODELS, build_model, draw_clips

import vidattn
from vidattn.cli import CommandError, Parser, fail, need, positive, progress

BATCH = 16  # clips of a step, of all processes together
RATE = 1e-3
KEPT = 2  # checkpoints


def shard(model: nn.Module, method: str, device: torch.device) -> nn.Module:
    """Distributes an accelerated model over the processes.

    Args:
        model: on the device of this process.
        method: "fsdp" shards parameters, gradients and the state of the optimizer, each block by itself; "ddp" copies
            them to every process.
        device: where the model is.

    Returns:
        What to call in place of the model.
    """
    if method == "ddp":
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    for module in reversed(list(model.modules())):  # what is inside first
        if "Block" in type(module).__name__:
            fully_shard(module)
    return fully_shard(model)


def draw_part(step: int) -> tuple[Tensor, Tensor]:
    """Draws the clips of a step, and gives the part of this process: (B, 1, T, H, W) and (B,)."""
    clips, labels = draw_clips(BATCH, torch.Generator().manual_seed(step))
    count, rank = BATCH // dist.get_world_size(), dist.get_rank()
    return clips[rank * count :][:count], labels[rank * count :][:count]


def latest(folder: Path) -> Path | None:
    """Finds the last whole checkpoint in a folder."""
    return max(folder.glob("step-?????"), default=None)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes a checkpoint, each process its part; the last ones stay until it is whole.

    Args:
        folder: of all checkpoints.
        step: number of steps that are done.
        model: what is trained.
        optimizer: its optimizer.
    """
    partial, whole = folder / f"step-{step:05d}.partial", folder / f"step-{step:05d}"
    dcp.save(_state(step, model, optimizer), checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(whole)  # at once, or not at all
        for old in sorted(folder.glob("step-?????"))[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads a checkpoint, of any number of processes, into a model and its optimizer.

    Args:
        checkpoint: what ``save`` wrote.
        model: as it was then, sharded in any way.
        optimizer: its optimizer.

    Returns:
        The number of steps that are done.
    """
    state = _state(0, model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def _state(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"step": step, "model": model_state, "optimizer": optimizer_state}


def train(
    model: nn.Module,
    folder: Path,
    steps: int,
    every: int,
    device: torch.device,
    advance: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
) -> float:
    """Trains a model from its last checkpoint on, and writes losses to ``losses.jsonl``, a line a step.

    Args:
        model: distributed by ``shard``.
        folder: of the checkpoints.
        steps: steps in all, those that are done included.
        every: steps from one checkpoint to the next.
        device: where the model is.
        advance: told the stage, the steps done and the steps in all.

    Returns:
        The mean loss of the last ten steps that are done now; NaN if none was left to do.
    """
    losses: list[float] = []
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = latest(folder)
    first = 0 if checkpoint is None else load(checkpoint, model, optimizer)
    with open(folder / "losses.jsonl", "a", encoding="utf-8") if dist.get_rank() == 0 else nullcontext() as log:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            clips, labels = draw_part(step)
            loss = functional.cross_entropy(model(clips.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            losses.append(mean.item())
            if log is not None:
                log.write(json.dumps({"step": step, "loss": losses[-1]}) + "\n")
                log.flush()
            if (step + 1) % every == 0 or step + 1 == steps:
                save(folder, step + 1, model, optimizer)
            advance("train", step + 1, steps)
    return statistics.fmean(losses[-10:]) if losses else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, on the processes that torchrun has started.

    Args:
        arguments: command line arguments; those of this process unless given.

    Returns:
        The exit code: 0, or 2 after a one-line error on stderr.
    """
    parser = Parser(prog="train_distributed.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=MODELS, default="video_swin", help="default: video_swin")
    parser.add_argument("--method", choices=("fsdp", "ddp"), default="fsdp", help="default: fsdp")
    parser.add_argument("--steps", type=positive, default=120, metavar="N", help="default: 120")
    parser.add_argument("--every", type=positive, default=20, metavar="N", help="steps to a checkpoint (default: 20)")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="default: checkpoints")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where each process has a GPU, else cpu"
    )
    options = parser.parse_args(arguments)
    try:
        need("rich")
        if not dist.is_torchelastic_launched():
            raise CommandError("start this with torchrun --nproc-per-node 4 examples/train_distributed.py")
        return _run(options)
    except CommandError as error:
        return fail(str(error))


def _run(options: Any) -> int:
    kind = options.device or ("cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        if BATCH % dist.get_world_size():
            raise CommandError(f"the number of processes must divide {BATCH} clips, got {dist.get_world_size()}")
        main_process = dist.get_rank() == 0
        options.folder.mkdir(parents=True, exist_ok=True)
        if main_process:
            for left in options.folder.glob("*.partial"):  # of a training that was killed meanwhile
                shutil.rmtree(left)
        dist.barrier()
        model = build_model(options.model, seed=0).to(device)
        vidattn.accelerate(model)
        model = shard(model, options.method, device)
        with progress("train", plain=True) if main_process else nullcontext() as advance:
            loss = train(model, options.folder, options.steps, options.every, device, advance or (lambda *_: None))
        if main_process:
            print(f"loss        {loss:.4f}\ncheckpoint  {latest(options.folder)}")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
