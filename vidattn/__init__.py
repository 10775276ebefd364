"""Exact, fast attention for video transformers and other models that attend inside windows, sites or frames."""

import torch  # noqa: F401  # the compiled extension needs torch's libraries loaded first

from vidattn.backends import current_backend, list_backends, set_backend, use_backend, warmup, why_not
from vidattn.geometry import explain_windows
from vidattn.ops import window3d_attention, window_attention

__version__ = "0.1.0"

__all__ = [
    "current_backend",
    "explain_windows",
    "list_backends",
    "set_backend",
    "use_backend",
    "warmup",
    "why_not",
    "window3d_attention",
    "window_attention",
]
