"""Video Swin as its authors published it, and where it was copied: mmaction2, OmniVision, SwinBERT and others.

Nobody has it as a package of its own, so it is known by its parts and its code alone.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.nn.window_blocks import FusedWindowBlock, FusedWindowStage, region_mask, run_blocks
from vidattn.nn.windows import FusedWindowAttention


class FusedWindowAttention3D(FusedWindowAttention):
    """``WindowAttention3D`` on ``vidattn.window_attention``."""


class FusedSwinTransformerBlock3D(FusedWindowBlock):
    """``SwinTransformerBlock3D`` on ``vidattn.window3d_attention``."""


class FusedBasicLayer(FusedWindowStage):
    """``BasicLayer`` that does not build a mask when all its blocks are fused."""


class FusedMmactionBasicLayer(FusedWindowStage):
    """``BasicLayer`` of mmaction2, whose output keeps the channels last."""

    def forward(self: Any, x: Tensor, do_downsample: bool = True) -> Tensor:
        """Map (B, C, D, H, W) to (B, D, H, W, C) through all blocks and, unless it is not wanted, the downsampling."""
        mask = region_mask(self, x.shape[2:])
        if mask is None:
            return self.replaced.forward(self, x, do_downsample)
        x = run_blocks(self, x, mask)
        return self.downsample(x) if self.downsample is not None and do_downsample else x


class FusedOmnivoreBasicLayer(FusedWindowStage):
    """``BasicLayer`` of OmniVision, which is told at each call whether to recompute activations."""

    def forward(self: Any, x: Tensor, use_checkpoint: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Map (B, C, D, H, W) through all blocks and the downsampling; other arguments ask for segmentation."""
        mask = None if args or kwargs else region_mask(self, x.shape[2:])
        if mask is None:
            return self.replaced.forward(self, x, use_checkpoint, *args, **kwargs)
        x = run_blocks(self, x, mask, use_checkpoint=use_checkpoint)
        return (x if self.downsample is None else self.downsample(x)).movedim(-1, 1)


def _is_attention(module: Any) -> bool:
    """Whether a module has a table of positions in 3D windows, and no other of its own."""
    return (
        _is_in_3d(getattr(module, "window_size", None))
        and set(module._parameters) - {"scale"} == {"relative_position_bias_table"}
        and set(module._buffers) == {"relative_position_index"}
        and {"qkv", "softmax", "attn_drop", "proj", "proj_drop"} <= set(module._modules)
        and _takes(module, "forward", "x", "mask")
    )


def _is_block(module: Any) -> bool:
    return (
        _is_in_3d(getattr(module, "window_size", None))
        and _is_in_3d(getattr(module, "shift_size", None))
        and not module._parameters
        and {"norm1", "attn", "drop_path", "norm2", "mlp"} <= set(module._modules)
        and _takes(module, "forward_part1", "x", "mask_matrix")
    )


def _is_stage(module: Any) -> bool:
    return (
        _is_in_3d(getattr(module, "window_size", None))
        and _is_in_3d(getattr(module, "shift_size", None))
        and "blocks" in module._modules
        and hasattr(module, "downsample")
        and any(_is_block(part) and _has_name(part, "SwinTransformerBlock3D") for part in module.blocks.modules())
    )


def _takes(module: Any, method: str, *names: str) -> bool:
    """Whether a method has these arguments and no others."""
    function = getattr(type(module), method, None)
    return function is not None and tuple(inspect.signature(function).parameters) == ("self", *names)


def _has_name(module: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _is_in_3d(axes: Any) -> bool:
    return isinstance(axes, (tuple, list)) and len(axes) == 3


def _is_official_stage(module: Any) -> bool:
    return _is_stage(module) and hasattr(module, "use_checkpoint")


def _is_mmaction_stage(module: Any) -> bool:
    return _is_stage(module) and hasattr(module, "with_cp")


def _is_omnivore_stage(module: Any) -> bool:
    return _is_stage(module) and not hasattr(module, "use_checkpoint") and not hasattr(module, "with_cp")


# Commits of the repositories.
_OFFICIAL = "Video-Swin-Transformer db018fb, video-swin-transformer-pytorch aa1afa0"
_SWINBERT, _OMNIVORE, _MMACTION = "SwinBERT 03116f1", "OmniVision 1d55abd", "mmaction2 4d6c934"
_STAGE = ("BasicLayer.forward", "compute_mask", "window_partition", "get_window_size")

COUNTERPARTS = (
    Counterpart(
        "WindowAttention3D",
        None,
        FusedWindowAttention3D,
        code=("WindowAttention3D.forward",),
        tested={"b10e63418eb2660d": ", ".join((_OFFICIAL, _SWINBERT, _OMNIVORE, _MMACTION))},
        resembles=_is_attention,
    ),
    Counterpart(
        "SwinTransformerBlock3D",
        None,
        FusedSwinTransformerBlock3D,
        code=(
            "SwinTransformerBlock3D.forward_part1",
            "SwinTransformerBlock3D.forward",
            "WindowAttention3D.forward",
            "window_partition",
            "window_reverse",
            "get_window_size",
        ),
        tested={
            "58d647bdb939621a": f"{_OFFICIAL}, {_SWINBERT}",
            "5aa53b178fc22a43": _OMNIVORE,
            "eadc1ce9cc5dc77d": _MMACTION,
        },
        resembles=_is_block,
    ),
    Counterpart(
        "BasicLayer",
        None,
        FusedBasicLayer,
        code=_STAGE,
        tested={"652a9b503a89b9fd": _OFFICIAL, "9dc0054813ea88ca": _SWINBERT},
        resembles=_is_official_stage,
    ),
    Counterpart(
        "BasicLayer",
        None,
        FusedMmactionBasicLayer,
        code=_STAGE,
        tested={"19c20ae49f0b21f6": _MMACTION},
        resembles=_is_mmaction_stage,
    ),
    Counterpart(
        "BasicLayer",
        None,
        FusedOmnivoreBasicLayer,
        code=_STAGE,
        tested={"c4862ec55f226d45": _OMNIVORE},
        resembles=_is_omnivore_stage,
    ),
)
