"""Tiny models of every bundled kind with clips to cut, and what a group of processes makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from twin_cases import spread

import vidattn
from vidattn.distributed import shard_frames
from vidattn.models.timesformer import TimeSformer
from vidattn.models.video_swin import I3DHead, Recognizer3D, SwinTransformer3D
from vidattn.models.vivit import SpaceTimeViViT, ViViT
from vidattn.models.xvit import XViT

BATCH = 2
SEED = 11


class Case(NamedTuple):
    """A model and the clip it sees: ``video`` is (frames, height, width)."""

    build: Callable[[], nn.Module]
    video: tuple[int, int, int]
    accelerated: bool = False


def timesformer(**options: Any) -> TimeSformer:
    sizes = {"img_size": (16, 24), "patch_size": 8, "num_classes": 5, "num_frames": 7, "embed_dim": 12, "depth": 2}
    return TimeSformer(**{**sizes, "num_heads": 3, "drop_path_rate": 0.0, **options})


_NO_DROPOUT = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}


def vivit(attention: str = "spacetime", **options: Any) -> ViViT:
    sizes = {"mlp_dim": 10, "num_layers": 2, "num_heads": 2, "num_classes": 5, "patches": (8, 8, 2), "hidden_size": 8}
    config = {"type": attention}
    if attention == "factorized_self_attention_block":
        config["attention_order"] = options.pop("attention_order", "time_space")
    clip = {"num_frames": 15, "image_size": (16, 24), "attention_config": config}
    return ViViT(**{**sizes, **clip, **_NO_DROPOUT, **options})


def factorized_encoder(**options: Any) -> SpaceTimeViViT:
    sizes = {f"{axis}_{key}": value for axis in ("spatial", "temporal") for key, value in _ENCODER.items()}
    clip = {"num_classes": 5, "patches": (8, 8, 2), "hidden_size": 8, "num_frames": 15, "image_size": (16, 24)}
    return SpaceTimeViViT(**{**sizes, **clip, "classifier": "token", **_NO_DROPOUT, **options})


_ENCODER = {"mlp_dim": 10, "num_layers": 1, "num_heads": 2}


def xvit(**options: Any) -> XViT:
    sizes = {"img_size": 32, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_frames": 4}
    head = {"temporal_heads": 2, "temporal_mlp_dim": 6, "dropout_rate": 0.0}
    return XViT(**{**sizes, **head, "num_segments": 8, "shift_div": 4, **options})


def _factorized_encoder_with_dropout() -> SpaceTimeViViT:
    model = factorized_encoder(dropout_rate=0.5)
    for module in model.spatial_transformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def video_swin(dropout_ratio: float = 0.0, **options: Any) -> Recognizer3D:
    sizes = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": (4, 3, 3), "patch_size": (1, 4, 4)}
    backbone = SwinTransformer3D(**{**sizes, "drop_path_rate": 0.0, "patch_norm": True, **options})
    return Recognizer3D(backbone, I3DHead(5, backbone.num_features, dropout_ratio=dropout_ratio))


_TALL, _SQUARE, _SWIN = (16, 24), (32, 32), (20, 28)
CASES: dict[str, Case] = {
    "timesformer": Case(timesformer, (7, *_TALL)),
    "timesformer, accelerated": Case(timesformer, (7, *_TALL), True),
    "timesformer, time embeddings resized": Case(partial(timesformer, num_frames=3), (9, *_TALL)),
    "timesformer, fewer sites than ranks": Case(partial(timesformer, img_size=(8, 16), depth=1), (7, 8, 16)),
    "timesformer, fewer sites, accelerated": Case(partial(timesformer, img_size=(8, 16), depth=1), (7, 8, 16), True),
    "timesformer, joint": Case(partial(timesformer, attention_type="joint_space_time"), (7, *_TALL)),
    "timesformer, joint, accelerated": Case(partial(timesformer, attention_type="joint_space_time"), (7, *_TALL), True),
    "timesformer, space only": Case(partial(timesformer, attention_type="space_only"), (7, *_TALL)),
    "vivit 1, class token": Case(partial(vivit, classifier="token"), (15, *_TALL)),
    "vivit 1, a frame a rank": Case(partial(vivit, classifier="token", num_frames=8, num_heads=4), (8, *_TALL), True),
    "vivit 1, mean": Case(partial(vivit, representation_size=6), (15, *_TALL)),
    "vivit 2": Case(factorized_encoder, (15, *_TALL)),
    "vivit 2, accelerated": Case(factorized_encoder, (15, *_TALL), True),
    "vivit 2, sampled frames": Case(
        partial(
            factorized_encoder,
            patches=(8, 8),
            temporal_encoding_config={"method": "temporal_sampling", "n_sampled_frames": 5},
            attention_config={"spatial_only_baseline": True},
            classifier="gap",
        ),
        (15, *_TALL),
    ),
    "vivit 3": Case(partial(vivit, "factorized_self_attention_block", classifier="gmp"), (15, *_TALL)),
    "vivit 3, accelerated": Case(
        partial(vivit, "factorized_self_attention_block", attention_order="space_time"), (15, *_TALL), True
    ),
    "vivit 4": Case(partial(vivit, "factorized_dot_product_attention", classifier="gsp"), (15, *_TALL)),
    "vivit 4, accelerated": Case(partial(vivit, "factorized_dot_product_attention"), (15, *_TALL), True),
    "vivit 4, fewer sites than ranks": Case(
        partial(vivit, "factorized_dot_product_attention", image_size=(8, 16)), (15, 8, 16), True
    ),
    "xvit": Case(xvit, (8, *_SQUARE)),
    "xvit, accelerated": Case(xvit, (8, *_SQUARE), True),
    "xvit, segments": Case(partial(xvit, num_segments=4, consensus_type="avg", before_softmax=False), (12, *_SQUARE)),
    "xvit, window of two frames": Case(
        partial(xvit, num_segments=4, shift_window=2, shift_div=3, shift_per_head=True, consensus_type="identity"),
        (4, *_SQUARE),
        True,
    ),
    "xvit, summary tokens": Case(partial(xvit, summary_token=True, num_segments=4), (8, *_SQUARE), True),
    "xvit, frozen backbone": Case(partial(xvit, freeze_backbone=True, locations_list=(1,)), (8, *_SQUARE)),
    "video_swin": Case(video_swin, (13, *_SWIN)),
    "video_swin, accelerated": Case(video_swin, (13, *_SWIN), True),
    "video_swin, patches of two frames": Case(
        partial(video_swin, patch_size=(2, 4, 4), use_checkpoint=True), (25, 24, 24)
    ),
    "video_swin, shifted in time alone": Case(
        partial(video_swin, window_size=(3, 8, 8), qkv_bias=False), (12, *_SWIN), True
    ),
    "video_swin, windows of one frame": Case(partial(video_swin, window_size=(1, 3, 3)), (5, *_SWIN)),
    "random: timesformer": Case(partial(timesformer, drop_path_rate=0.5), (7, *_TALL)),
    "random: timesformer, accelerated": Case(partial(timesformer, drop_path_rate=0.5), (7, *_TALL), True),
    "random: timesformer, joint": Case(
        partial(timesformer, drop_path_rate=0.5, attention_type="joint_space_time"), (7, *_TALL)
    ),
    "random: timesformer, space only": Case(
        partial(timesformer, drop_path_rate=0.5, attention_type="space_only"), (7, *_TALL)
    ),
    "random: vivit 1": Case(partial(vivit, stochastic_droplayer_rate=0.5), (15, *_TALL)),
    "random: vivit 2": Case(_factorized_encoder_with_dropout, (15, *_TALL)),
    "random: xvit": Case(partial(xvit, drop_path_rate=0.5, temporal_drop=0.3, dropout_rate=0.5), (8, *_SQUARE), True),
    "random: video_swin": Case(
        partial(video_swin, drop_path_rate=0.5, dropout_ratio=0.5, use_checkpoint=True), (13, *_SWIN), True
    ),
}


def build(case: Case) -> nn.Module:
    torch.manual_seed(1)
    return spread(case.build()).double()


def clip_of(case: Case) -> Tensor:
    count = BATCH * 3 * case.video[0] * case.video[1] * case.video[2]
    return torch.linspace(-40, 40, count, dtype=torch.float64).sin().view(BATCH, 3, *case.video)


class Result(NamedTuple):
    """What a process has after a step: gradients by name, that of its frames under "video"."""

    logits: Tensor
    gradients: dict[str, Tensor | None]


def step(model: nn.Module, video: Tensor) -> Iterator[Any]:
    """Do a step; yields between forward and backward, and then the result."""
    leaf = video.detach().clone().requires_grad_()
    logits = model(leaf)
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum()
    yield None
    loss.backward()
    gradients: dict[str, Tensor | None] = {name: p.grad for name, p in model.named_parameters()}
    yield Result(logits.detach(), {**gradients, "video": leaf.grad})


class Traffic(TorchDispatchMode):
    """Bytes that a process hands to collectives, by collective, whoever calls them; for itself it sends nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            if name == "alltoall_base":
                count = sum(args[4]) * args[1].element_size()
            else:
                tensors = args[1] if name == "allgather" else args[0]
                count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.sent.setdefault(name, []).append(count)
        return func(*args, **(kwargs or {}))


class Outcome(NamedTuple):
    """What a rank found: its result, the traffic of the two passes, and the bytes that the forward pass kept."""

    result: Result
    forward: dict[str, list[int]]
    backward: dict[str, list[int]]
    kept: int


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return x

        super().__init__(keep, lambda x: x)

    def bytes(self) -> int:
        return sum(self.storages.values())


def run(case: Case, mesh: DeviceMesh) -> Outcome:
    model = build(case)
    names = set(model.state_dict())
    if case.accelerated:
        assert vidattn.accelerate(model).swapped
    clip = shard_frames(model, mesh)
    assert set(model.state_dict()) == names
    part = clip.split(clip_of(case))
    torch.manual_seed(SEED + mesh.get_local_rank())  # that of rank 0 counts
    steps = step(model, part)
    kept = Kept(model)
    with Traffic() as forward, kept:
        next(steps)
    with Traffic() as backward:
        result = next(steps)
    return Outcome(result, forward.sent, backward.sent, kept.bytes())
