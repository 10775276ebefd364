"""Models that FSDP shards after they were accelerated, by two processes on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from twin_cases import spread

import vidattn
from vidattn.models.timesformer import Block, TimeSformer
from vidattn.models.video_swin import SwinTransformer3D, SwinTransformerBlock3D

PROCESSES = 2
VIDEO = torch.linspace(-1, 1, 2 * 3 * 4 * 32 * 32).view(2, 3, 4, 32, 32).sin()


def _models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    swin = SwinTransformer3D(
        patch_size=(2, 4, 4), embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=(2, 3, 3), drop_path_rate=0.0
    )
    timesformer = TimeSformer(
        img_size=32, patch_size=8, num_classes=5, num_frames=4, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.0
    )
    return {"video_swin": spread(swin), "timesformer": spread(timesformer)}


def _parts(model: nn.Module, what: str) -> list[nn.Module]:
    """What is sharded by itself, innermost first."""
    kinds: dict[str, Any] = {
        "blocks": lambda module: isinstance(module, (SwinTransformerBlock3D, Block)),
        "attentions": lambda module: isinstance(getattr(module, "qkv", None), nn.Module),
        "layers": lambda module: type(module) is nn.Linear,
        "the root": lambda module: False,
    }
    return [module for module in reversed(list(model.modules())) if kinds[what](module)]


def _shard_v1(model: nn.Module, what: str, use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(module) for module in _parts(model, what)})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def _shard_v2(model: nn.Module, what: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in _parts(model, what):
        fully_shard(module)
    return fully_shard(model)


def _loss_and_input_gradient(model: nn.Module) -> list[Tensor]:
    video = VIDEO.clone().requires_grad_()
    out = model(video)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert video.grad is not None
    return [out.detach(), video.grad]


def _process(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    found = []
    for name, model in _models().items():
        expected = _loss_and_input_gradient(copy.deepcopy(model))
        for what in ("blocks", "attentions", "layers", "the root"):
            for kind in ("1", "1, flat", "2"):
                fast = copy.deepcopy(model)
                vidattn.accelerate(fast)
                sharded = _shard_v2(fast, what) if kind == "2" else _shard_v1(fast, what, kind == "1")
                errors = [
                    ((one - other).abs().max() / other.abs().max()).item()
                    for one, other in zip(_loss_and_input_gradient(sharded), expected, strict=True)
                ]
                found.append((name, what, kind, max(errors)))
    if rank == 0:
        torch.save(found, Path(folder) / "found")
    dist.destroy_process_group()


def test_sharded_models_compute_the_same(tmp_path: Path) -> None:
    """Whatever is sharded by itself: blocks, attentions, the linear layers, or the model as a whole."""
    torch.multiprocessing.spawn(_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=PROCESSES)
    found = torch.load(tmp_path / "found")
    assert len(found) == 2 * 4 * 3
    assert [row for row in found if not row[-1] < 2e-5] == []
