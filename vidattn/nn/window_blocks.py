"""What the twins of Video Swin and its relatives share: blocks of shifted windows, and stages of such blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vidattn.models.video_swin_windows import MASK_VALUE, Triple, compute_mask, fit_window
from vidattn.nn.parts import DROPOUT, Affine, affine, is_plain, rate_in_use, why_not_number
from vidattn.nn.window_dropout import drop_in_windows
from vidattn.nn.windows import FusedWindowAttention, has_standard_index, in_3d, ops_can_attend
from vidattn.ops import window3d_attention
from vidattn.twins import Twin, why_overridden


class RegionMask(NamedTuple):
    """Stands for the mask of a shifted stage, which a fused block has no need to read.

    Attributes:
        padded: padded token grid.
        window: effective window.
        shift: effective shift.
    """

    padded: Triple
    window: Triple
    shift: Triple

    def build(self, device: torch.device) -> Tensor:
        """Make the mask itself, float32 (nW, N, N)."""
        return compute_mask(*self.padded, self.window, self.shift, device)

    @classmethod
    def of(cls, grid: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int]) -> RegionMask:
        """Fit windows to a token grid; all in 2D or all in 3D."""
        window, shift, padded = fit_window(in_3d(grid, 1), in_3d(window_size, 1), in_3d(shift_size, 0))
        return cls(padded, window, shift)


class WindowBlock(Twin):
    """A block that does the work of the attention inside it, ``attn``, on the token grid.

    For blocks with ``window_size``, ``shift_size``, ``norm1`` and an ``attn`` with the parts of the official one; in 2D
    and 3D. Their twins watch the ``forward`` of its class.

    Attributes:
        attention_twin: the twin that ``attn`` may be.
    """

    ops = ("window3d_attention", "window_attention")
    level = "block"
    attention_twin: ClassVar[type[Twin]] = FusedWindowAttention
    dropout_in_use = staticmethod(FusedWindowAttention.dropout_in_use)

    @staticmethod
    def table_of(attention: Any) -> Tensor | None:
        """Give the table of the position bias of an attention module; None where it adds none."""
        return attention.relative_position_bias_table

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        """Say why a block cannot become this twin; None if it can."""
        attention = module.attn
        if not _attends_for(cls, attention):
            return f"its attn is a {type(attention).__name__}"
        if tuple(attention.window_size) != tuple(module.window_size):
            return f"its window {module.window_size} is not that of its attn, {attention.window_size}"
        reason = why_overridden(attention) or why_not_number(attention)
        if reason is not None:
            return f"its attn: {reason}"
        if cls.table_of(attention) is not None and not has_standard_index(attention):
            return "its relative_position_index is not the standard one"
        return None


class FusedWindowBlock(WindowBlock):
    """A block whose ``forward_part1`` attends in (shifted) windows, on [`vidattn.window3d_attention`][].

    The projections run on the unpadded, unrolled grid; nothing is rolled, padded or partitioned. That takes the
    place of calling ``attn``, so at every call the block looks whether anything hangs on it: a wrapper, an adapter, a
    hook, a ``forward`` of the instance, another position index. Then ``attn`` is called with the windows that the
    original hands it. A mask of the caller's own is also used there, as it is.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the block as the original does. It hands the mask on, so a change of the original's shows here."""
        return self.replaced.forward(self, *args, **kwargs)

    def forward_part1(self: Any, x: Tensor, mask_matrix: Tensor | RegionMask | None) -> Tensor:
        """Normalise and attend, before stochastic depth and the residual.

        Args:
            x: tokens (B, D, H, W, C), in 2D (B, H, W, C).
            mask_matrix: additive mask (nW, N, N) of the padded, shifted grid, a ``RegionMask`` that stands for the
                standard one, or None. Used only when some axis is really shifted; None then means nothing is masked.

        Returns:
            Tokens of the shape of ``x``.
        """
        if x.dim() != len(self.window_size) + 2:
            return self.replaced.forward_part1(self, x, mask_matrix)  # the original's error
        regions = RegionMask.of(x.shape[1:-1], self.window_size, self.shift_size)
        shifted = any(offset > 0 for offset in regions.shift)
        standard = not shifted or mask_matrix is None or same_mask(mask_matrix, regions)
        projection = input_projection(self) if standard else None
        if projection is None:
            # Partitioned by the original's code: any mask, and whatever hangs on the attention, works there.
            if isinstance(mask_matrix, RegionMask):
                mask_matrix = mask_matrix.build(x.device) if shifted else None
            return self.replaced.forward_part1(self, x, mask_matrix)
        return attend_on_grid(self, x, regions, projection, mask_matrix is None)


def attend_on_grid(block: Any, x: Tensor, regions: RegionMask, projection: Affine, wrap: bool) -> Tensor:
    """Do what a block does before stochastic depth and the residual, in place of its attention.

    Args:
        block: the twin.
        x: tokens (B, D, H, W, C), in 2D (B, H, W, C).
        regions: the windows.
        projection: what ``input_projection`` says of the block.
        wrap: whether nothing is masked.

    Returns:
        Tokens of the shape of ``x``.
    """
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
    grid = in_3d(x.shape[1:-1], 1)
    context = window3d_attention(
        qkv if x.dim() == 5 else qkv.unsqueeze(1),
        block.table_of(attention),
        window_size=in_3d(block.window_size, 1),
        shift_size=regions.shift,
        pad_qkv=None if regions.padded == grid else projection.constant,
        mask_value=MASK_VALUE,
        wrap=wrap,
        scale=attention.scale,
        dropout_p=block.dropout_in_use(attention),
        backend=block.attention_backend,
    )
    out = attention.proj(context if x.dim() == 5 else context.squeeze(1))
    if rate_in_use(attention.proj_drop) > 0.0:
        return drop_in_windows(out, attention.proj_drop, block.window_size, regions.shift)
    return out


class FusedWindowStage(Twin):
    """A stage of blocks of shifted windows that does not build their mask when all of them are fused.

    For stages with the parts of the official code: ``window_size``, ``shift_size``, ``blocks`` and ``downsample``.
    """

    level = "layer"

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W), in 2D (B, C, H, W), through all blocks and the downsampling."""
        mask = region_mask(self, x.shape[2:])
        if mask is None:
            return self.replaced.forward(self, x)
        x = run_blocks(self, x, mask)
        return (x if self.downsample is None else self.downsample(x)).movedim(-1, 1)


def region_mask(stage: Any, grid: Sequence[int]) -> RegionMask | None:
    """Give what stands for the mask of a stage on a token grid; None where somebody may look at the mask itself."""
    fused = len(grid) == len(stage.window_size) and stage.is_intact() and all(map(takes_region_mask, stage.blocks))
    return RegionMask.of(grid, stage.window_size, stage.shift_size) if fused else None


def run_blocks(stage: Any, x: Tensor, mask: RegionMask, **options: Any) -> Tensor:
    """Map (B, C, D, H, W) through the blocks of a stage to (B, D, H, W, C); ``options`` are arguments of theirs."""
    x = x.movedim(1, -1)
    for block in stage.blocks:
        x = block(x, mask, **options)
    return x


# Where wrappers that hand their arguments on keep what they wrap: activation checkpointing, FSDP, torch.compile.
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def takes_region_mask(block: nn.Module, twin: type[WindowBlock] = FusedWindowBlock) -> bool:
    """Whether nobody between a stage and the block that is fused, to this twin, looks at the mask."""
    while not isinstance(block, twin):
        inner = next((block._modules[name] for name in _WRAPPED if name in block._modules), None)
        if inner is None:
            return False
        block = inner
    hooks = (*block._forward_pre_hooks.values(), *block._forward_hooks.values())
    kind: Any = type(block)
    methods = [name for name in ("forward", "forward_part1") if hasattr(twin, name)]
    return (
        block.is_intact()
        and all(getattr(kind, name) is getattr(twin, name) and name not in block.__dict__ for name in methods)
        and all(hook.__module__.startswith("torch.distributed.") for hook in hooks)  # FSDP's
    )


def _attends_for(block: type[WindowBlock], attention: Any) -> bool:
    """Whether a module is of the class whose work the block does, or a twin of that class."""
    kind: Any = type(attention)
    twin: Any = block.attention_twin
    if issubclass(kind, twin) and kind.forward is twin.forward:
        kind = kind.replaced
    return any(row.namespace is kind and row.name == "forward" for row in block._watched)


def input_projection(block: Any) -> Affine | None:
    """Describe the qkv projection; None where the block may not do the work of its attention.

    It may where nothing hangs on the attention and its projections map token by token.
    """
    attention: Any = block._modules["attn"]
    kind = type(attention)
    if not (
        block.is_intact()
        and _attends_for(type(block), attention)
        and is_plain(attention, {kind: kind.forward})
        and ops_can_attend(attention)
        and is_plain(attention._modules["proj_drop"], DROPOUT)
        and tuple(attention.window_size) == tuple(block.window_size)
        and (block.table_of(attention) is None or has_standard_index(attention))
        and affine(attention._modules["proj"]) is not None
    ):
        return None
    return affine(attention._modules["qkv"])


def same_mask(mask: Tensor | RegionMask, standard: RegionMask) -> bool:
    """Whether a mask is known to be the standard one, without a look at it."""
    return isinstance(mask, RegionMask) and mask == standard
