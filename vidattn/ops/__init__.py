"""The public attention functions and the ``torch.ops.vidattn`` ops behind them."""

from vidattn.ops.divided import factorized_dot_product_attention, spatial_attention, temporal_attention
from vidattn.ops.window import window_attention
from vidattn.ops.window3d import window3d_attention

__all__ = [
    "factorized_dot_product_attention",
    "spatial_attention",
    "temporal_attention",
    "window3d_attention",
    "window_attention",
]
