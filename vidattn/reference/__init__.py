"""The attention ops in plain PyTorch: the definition of correct, and the fallback where no kernel runs.

Every function here is differentiable by autograd to any order, in any floating dtype, on any device. In float64 on the
CPU it is the oracle that every backend is tested against.
"""

from vidattn.reference.divided import factorized_dot_product_attention, spatial_attention, temporal_attention
from vidattn.reference.window3d import window3d_attention, window_attention

__all__ = [
    "factorized_dot_product_attention",
    "spatial_attention",
    "temporal_attention",
    "window3d_attention",
    "window_attention",
]
