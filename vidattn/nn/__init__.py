"""Accelerated twins of the bundled attention modules: same constructors, parameters and state dict, same function.

A twin computes the original's function with the ops of this package. Whatever the ops cannot stand in for (a mask of
the caller's own, a hook that watches the attention probabilities, a dropout of another kind) is computed as the
original does. ``vidattn.accelerate`` turns the modules of an existing model into their twins.
"""

from vidattn.nn.timesformer import FusedAttention, FusedBlock
from vidattn.nn.video_swin import FusedBasicLayer, FusedSwinTransformerBlock3D, FusedWindowAttention3D
from vidattn.nn.vivit import FusedMultiHeadDotProductAttention
from vidattn.nn.window_blocks import RegionMask
from vidattn.nn.xvit import FusedMixingAttention

__all__ = [
    "FusedAttention",
    "FusedBasicLayer",
    "FusedBlock",
    "FusedMixingAttention",
    "FusedMultiHeadDotProductAttention",
    "FusedSwinTransformerBlock3D",
    "FusedWindowAttention3D",
    "RegionMask",
]
