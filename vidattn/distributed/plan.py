"""Tensor parallelism of the bundled models: the plan for ``torch.distributed.tensor.parallel.parallelize_module``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional

from vidattn.messages import describe
from vidattn.models.layers import Mlp
from vidattn.models.timesformer import Attention as TimeSformerAttention
from vidattn.models.video_swin import WindowAttention3D
from vidattn.models.vivit_layers import MultiHeadDotProductAttention
from vidattn.models.xvit_layers import Attention as XViTAttention
from vidattn.models.xvit_layers import TemporalShift
from vidattn.nn.parts import LINEAR, PLAIN_TENSORS, as_defined

__all__ = ["PackedHeads", "parallelize_plan"]


class PackedHeads(ParallelStyle):
    """Shards a packed projection to queries, keys and values by heads.

    Its rows are (3, h, d). A process has those of its heads, of queries, keys and values each; ``full_tensor()`` gives
    them in the order of the state dict. The output is a DTensor (..., 3 * h * d) that unflattens to ``Shard`` over h.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            _place(module, name, parameter, device_mesh, _packed(0), self.src_data_rank)
        module.__class__ = PackedLinear
        module.register_state_dict_pre_hook(_check_rows)
        return module

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PackedLinear(nn.Linear):
    """What ``PackedHeads`` makes of a linear layer: one that computes the rows of its process."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., in_features) that all processes have to a DTensor (..., out_features)."""
        weight: Any = self.weight
        mesh = weight.device_mesh
        # Each process computes with some rows, so the gradients of all have to be added up.
        whole: Any = _replicate(x, mesh)
        bias: Any = self.bias
        local = functional.linear(
            whole.to_local(grad_placements=[Partial()]), weight.to_local(), None if bias is None else bias.to_local()
        )
        return DTensor.from_local(local, mesh, [_packed(x.ndim - 1)], run_check=False)


def _packed(dim: int) -> Any:
    """Cut a dimension into three, and each third over the processes."""
    return _StridedShard(dim, split_factor=3)


class HeadsOfWindows(ParallelStyle):
    """Shards the table of relative positions (L, h) of window attention by heads; masks and indices are replicated."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = "relative_position_bias_table"
        _place(module, name, getattr(module, name), device_mesh, Shard(1), self.src_data_rank)
        index = module.get_buffer("relative_position_index")
        module.relative_position_index = distribute_tensor(index, device_mesh, [Replicate()])

        def replicate(part: nn.Module, args: Any, kwargs: Any) -> Any:
            inputs, *masks = args
            masks = [_replicate(mask, device_mesh) for mask in masks]
            return (inputs, *masks), {key: _replicate(value, device_mesh) for key, value in kwargs.items()}

        module.register_forward_pre_hook(replicate, with_kwargs=True)
        return module

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class WholeChannels(ParallelStyle):
    """Gives a shift of keys or values (B * T, heads, N, d) all heads, since it counts channels over them.

    For attention in plain PyTorch: the fused op shifts the heads of a process where they are.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(part: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return inputs[0].redistribute(placements=[Replicate()]).to_local()

        def cut(part: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(output, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)])

        return distribute_module(module, device_mesh, None, gather, cut)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def parallelize_plan(model: nn.Module, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """Give the plan by which ``parallelize_module`` shards a bundled model over the processes of a mesh.

    Attention is sharded by heads and MLPs by hidden channels, each with one sum over the processes after it and one in
    the backward pass. Everything else, and the activations between, is the same on all processes. Names and shapes of
    the state dict stay; ``full_tensor()`` of an entry gives the values of one process. The model may be accelerated
    before or after, or not at all.

    Attention whose heads the mesh does not divide stays replicated, and so do others that cannot be cut by heads; a
    warning names them with the reason.

    Args:
        model: a model of ``vidattn.models``, or any module with its attention inside.
        mesh: one-dimensional mesh, ``mesh["tp"]`` of a larger one.

    Returns:
        Name of a module to its style, for ``torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)``.

    Raises:
        TypeError: ``model`` is no module, or ``mesh`` no mesh.
        ValueError: ``mesh`` has several dimensions, or nothing in the model can be sharded.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from vidattn.models import create_model
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> model = create_model("timesformer_base", img_size=32, depth=1)
        >>> model = parallelize_module(model, mesh, parallelize_plan(model, mesh))
        >>> model.model.blocks[0].attn.qkv.weight.placements
        (_StridedShard(dim=0, sf=3),)
        >>> dist.destroy_process_group()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parallelize_plan: model: expected a torch.nn.Module, got {describe(model)}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"parallelize_plan: mesh: expected a DeviceMesh, got {describe(mesh)}")
    if mesh.ndim != 1:
        raise ValueError(f"parallelize_plan: mesh: expected one dimension, got shape {tuple(mesh.shape)}")
    plan: dict[str, ParallelStyle] = {}
    replicated: list[str] = []
    for name, module in model.named_modules():
        part = next((row for row in _PARTS if isinstance(module, row[0])), None)
        if part is None:
            continue
        _, why_not, styles = part
        reason = why_not(module, mesh.size())
        if reason is None:
            plan |= {".".join(filter(None, (name, child))): style for child, style in styles(module).items()}
        else:
            replicated.append(f"{name or 'the model'} ({reason})")
    if replicated:
        warnings.warn(f"parallelize_plan: these stay replicated: {', '.join(replicated)}", stacklevel=2)
    if not plan:
        raise ValueError(
            f"parallelize_plan: model: expected attention or an MLP of a bundled model that {mesh.size()} processes can"
            f" share, got {type(model).__name__} without any"
        )
    return plan


# A linear layer with sharded weights maps each token by itself, like any other: twins do the work around it.
PLAIN_TENSORS.add(DTensor)
LINEAR.update(as_defined(PackedLinear))

# ---- What of a model is sharded, and how ----


def _why_not_by_heads(attention: Any, processes: int) -> str | None:
    heads = attention.num_heads
    if heads % processes:
        return f"its {heads} heads are no multiple of {processes} processes"
    if not getattr(attention, "with_qkv", True):
        return "it has no projections"
    if getattr(attention, "summary_frames", 0):
        return "its summary tokens are made of all heads"
    return _why_not_linear(attention, "qkv", "proj")


def _why_not_by_channels(mlp: Any, processes: int) -> str | None:
    reason = _why_not_linear(mlp, "fc1", "fc2")
    if reason is None and mlp.fc1.out_features % processes:
        return f"its {mlp.fc1.out_features} hidden channels are no multiple of {processes} processes"
    return reason


def _why_not_linear(module: nn.Module, *layers: str) -> str | None:
    kinds = {name: type(module.get_submodule(name)) for name in layers}
    return next((f"its {name} is a {kind.__name__}" for name, kind in kinds.items() if kind is not nn.Linear), None)


def _by_heads(attention: nn.Module) -> dict[str, ParallelStyle]:
    styles: dict[str, ParallelStyle] = {"qkv": PackedHeads(), "proj": RowwiseParallel()}
    if isinstance(attention, WindowAttention3D):
        styles[""] = HeadsOfWindows()
    for name, child in attention.named_children():
        if isinstance(child, TemporalShift):
            styles[name] = WholeChannels()
    return styles


def _by_channels(mlp: nn.Module) -> dict[str, ParallelStyle]:
    return {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}


_ATTENTIONS = (WindowAttention3D, TimeSformerAttention, MultiHeadDotProductAttention, XViTAttention)
_PARTS: list[tuple[Any, Callable[[Any, int], str | None], Callable[[Any], dict[str, ParallelStyle]]]] = [
    (_ATTENTIONS, _why_not_by_heads, _by_heads),
    (Mlp, _why_not_by_channels, _by_channels),
]


# ---- How a style places tensors ----


def _place(module: nn.Module, name: str, x: Tensor, mesh: DeviceMesh, place: Any, source: int | None) -> None:
    placed = distribute_tensor(x, mesh, [place], src_data_rank=source)
    module.register_parameter(name, nn.Parameter(placed, requires_grad=x.requires_grad))


def _replicate(value: Any, mesh: DeviceMesh) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False)


def _check_rows(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse to save rows that were cut once more: their placements give ``full_tensor()`` another order."""
    for name, parameter in module.named_parameters(recurse=False):
        places = parameter.placements if isinstance(parameter, DTensor) else ()
        if sum(place != Replicate() for place in places) > 1:
            raise ValueError(
                f"state_dict: {prefix}{name}: expected rows that are sharded by heads alone, got placements {places}."
                " FSDP has cut them again, and full_tensor() would give them in another order: use one of the two"
            )
