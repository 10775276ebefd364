"""Reference video transformers, their published sizes and their checkpoints."""

from vidattn.models import video_swin_variants  # noqa: F401  (registers its models)
from vidattn.models.registry import InputSpec, create_model, get_input_spec, list_models

__all__ = ["InputSpec", "create_model", "get_input_spec", "list_models"]
