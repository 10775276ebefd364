"""vidattn for Hugging Face's kernel hub: the attention functions, with their reference and Triton kernels."""

from . import layers
from .backends import use_backend, why_not
from .ops import (
    factorized_dot_product_attention,
    space_time_mixing_attention,
    spatial_attention,
    temporal_attention,
    temporal_shift,
    window3d_attention,
    window_attention,
)

__all__ = [
    "factorized_dot_product_attention",
    "layers",
    "space_time_mixing_attention",
    "spatial_attention",
    "temporal_attention",
    "temporal_shift",
    "use_backend",
    "why_not",
    "window3d_attention",
    "window_attention",
]
