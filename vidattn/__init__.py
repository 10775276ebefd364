"""Exact, fast attention for video transformers and other models that attend inside windows, sites or frames."""

import importlib
from types import ModuleType

import torch  # noqa: F401  # the compiled extension needs torch's libraries loaded first

from vidattn.accelerate import Acceleration, accelerate
from vidattn.backends import current_backend, list_backends, set_backend, use_backend, warmup, why_not
from vidattn.capture import capture_attention
from vidattn.geometry import explain_windows
from vidattn.ops import (
    factorized_dot_product_attention,
    space_time_mixing_attention,
    spatial_attention,
    temporal_attention,
    temporal_shift,
    window3d_attention,
    window_attention,
)

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "accelerate",
    "capture_attention",
    "current_backend",
    "explain_windows",
    "factorized_dot_product_attention",
    "list_backends",
    "set_backend",
    "space_time_mixing_attention",
    "spatial_attention",
    "temporal_attention",
    "temporal_shift",
    "use_backend",
    "warmup",
    "why_not",
    "window3d_attention",
    "window_attention",
]


def __getattr__(name: str) -> ModuleType:
    """Import the model zoo and the twins when they are first asked for."""
    if name in ("models", "nn"):
        return importlib.import_module(f"vidattn.{name}")
    raise AttributeError(f"module 'vidattn' has no attribute {name!r}")
