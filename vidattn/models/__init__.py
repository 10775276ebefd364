"""Reference video transformers, their published sizes and their checkpoints."""

from vidattn.models import (  # noqa: F401  (each family registers its own)
    timesformer_checkpoint,
    timesformer_variants,
    video_swin_checkpoint,
    video_swin_variants,
    vivit_checkpoint,
    vivit_variants,
    xvit_checkpoint,
    xvit_variants,
)
from vidattn.models.checkpoint import LoadReport, load_checkpoint
from vidattn.models.registry import InputSpec, create_model, get_input_spec, list_models

__all__ = ["InputSpec", "LoadReport", "create_model", "get_input_spec", "list_models", "load_checkpoint"]
