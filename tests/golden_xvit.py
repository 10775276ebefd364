"""Golden cases of X-ViT: the paper's code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from golden_cases import GoldenCase, GoldenRun, UnknownCaseError
from torch import nn

from vidattn.models import xvit


def build(case: GoldenCase) -> GoldenRun:
    """Build a module, block or model."""
    config = case.config
    name = str(config.pop("class"))
    if name not in _BUILDERS:
        raise UnknownCaseError(f"{case.name}: X-ViT has no class {name!r}")
    inputs = case.tensors("input.")
    inputs.pop("cotangent", None)
    module = _BUILDERS[name](**config)
    module.load_state_dict(case.tensors("state."), strict=True)
    swaps = name != "TemporalShift"
    return GoldenRun(module, inputs, lambda module, inputs: {"y": module(inputs["x"])}, main="y", swaps=swaps)


def check_function(case: GoldenCase) -> None:
    """Refuse every case: X-ViT has no functions that are not modules."""
    raise UnknownCaseError(f"{case.name}: X-ViT has no functions")


def _attention(n_segment: int, shift_div: int, **arguments: Any) -> nn.Module:
    attention = xvit.Attention(**arguments)
    if n_segment:  # 0 where the paper's code leaves the block as it is
        _shift(attention, n_segment, shift_div)
    return attention


def _shift(attention: xvit.Attention, n_segment: int, shift_div: int) -> None:
    for place in ("control_point_query", "control_point_value"):
        setattr(attention, place, xvit.TemporalShift(getattr(attention, place), n_segment, shift_div))


def _core(**arguments: Any) -> nn.Module:
    """The attention of packed queries, keys and values, without the projections around it."""
    attention = _attention(**arguments)
    attention.qkv = attention.proj = nn.Identity()
    return attention


def _block(n_segment: int, shift_div: int, norm_eps: float, **arguments: Any) -> nn.Module:
    block = xvit.Block(norm_layer=partial(nn.LayerNorm, eps=norm_eps), **arguments)
    _shift(block.attn, n_segment, shift_div)
    return block


def _network(base: dict[str, Any], shift: dict[str, Any]) -> nn.Module:
    network = xvit.VisionTransformer(**base)
    shift["n_div"] = shift.pop("shift_div")
    xvit.make_temporal_shift(network, **shift)
    return network


def _head(cfg: dict[str, Any]) -> nn.Module:
    """The temporal head of a model whose backbone is as small as can be."""
    size = {"embed_dim": cfg["TEMPORAL_HEAD.HIDDEN_DIM"], "depth": 0, "num_heads": 1}
    return xvit.XViT.from_config(cfg, **size).consensus


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "Attention": _attention,
    "AttentionCore": _core,
    "TemporalShift": lambda n_segment, shift_div: xvit.TemporalShift(nn.Identity(), n_segment, shift_div),
    "Block": _block,
    "VisionTransformer": _network,
    "VitHead": _head,
    "XVIT": lambda base, cfg: xvit.XViT.from_config(cfg, **base),
}
