"""Golden cases of TimeSformer: the papers' code, and Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from golden_cases import OUTPUT_TOLERANCE, GoldenCase, GoldenRun, UnknownCaseError, assert_golden
from torch import Tensor, nn

from vidattn.models import load_checkpoint, timesformer
from vidattn.models.timesformer_checkpoint import revert_state_dict

# Hugging Face's names of the arguments that both have.
_FROM_HUGGINGFACE = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "num_frames": "num_frames",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_labels": "num_classes",
    "attention_type": "attention_type",
    "qkv_bias": "qkv_bias",
}


def build(case: GoldenCase) -> GoldenRun:
    """Build a module, block or model."""
    name = case.metadata["peer"].split()[-1] if case.metadata.get("peer") else str(case.config.get("class"))
    builder = _BUILDERS.get(name)
    if builder is None:
        raise UnknownCaseError(f"{case.name}: TimeSformer has no class {name!r}")
    config = case.config
    shape, run = config.pop("input_shape"), config.pop("run")
    inputs = case.tensors("input.")
    inputs.pop("cotangent", None)
    (video,) = inputs.values()
    assert list(video.shape) == shape
    return builder(case, config, run, inputs)


def check_function(case: GoldenCase) -> None:
    """Refuse every case: TimeSformer has no functions that are not modules."""
    raise UnknownCaseError(f"{case.name}: TimeSformer has no functions")


def _norm_layer(config: dict[str, Any]) -> Callable[[int], nn.Module]:
    return partial(nn.LayerNorm, eps=config.pop("norm_eps"))


def _attention(case: GoldenCase, config: dict[str, Any], run: dict[str, Any], inputs: dict[str, Tensor]) -> GoldenRun:
    module = timesformer.Attention(**config)
    module.load_state_dict(case.tensors("state."), strict=True)
    return GoldenRun(module, inputs, lambda module, inputs: {"output": module(inputs["x"])}, main="output")


def _block(case: GoldenCase, config: dict[str, Any], run: dict[str, Any], inputs: dict[str, Tensor]) -> GoldenRun:
    module = timesformer.Block(norm_layer=_norm_layer(config), **config)
    module.load_state_dict(case.tensors("state."), strict=True)
    inside = case.tensors("aux.")

    def call(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the block, and compare what its parts returned while it ran."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, part: nn.Module, arguments: Any, output: Tensor) -> None:
            seen[f"{name}_out"] = output

        # Its twin calls no attention, or with hooks is no different. The tolerance is one of float32 and float64.
        plain = type(module) is timesformer.Block and inputs["x"].dtype.itemsize > 2
        parts = {name: part for name, part in module.named_children() if plain and f"{name}_out" in inside}
        hooks = [part.register_forward_hook(partial(keep, name)) for name, part in parts.items()]
        output = module(inputs["x"], run["B"], run["T"], run["W"])
        for hook in hooks:
            hook.remove()
        if plain:
            assert seen.keys() == inside.keys()
        for name, tensor in seen.items():
            assert_golden(f"aux.{name}", tensor, inside[name], OUTPUT_TOLERANCE)
        return {"output": output}

    return GoldenRun(module, inputs, call, main="output")


def _network(case: GoldenCase, config: dict[str, Any], run: dict[str, Any], inputs: dict[str, Tensor]) -> GoldenRun:
    model = timesformer.VisionTransformer(norm_layer=_norm_layer(config), **config)
    model.load_state_dict(case.tensors("state."), strict=True)
    return GoldenRun(model, inputs, lambda model, inputs: {"logits": model(inputs["x"])}, main="logits")


def _huggingface(case: GoldenCase, config: dict[str, Any], run: dict[str, Any], inputs: dict[str, Tensor]) -> GoldenRun:
    arguments = {ours: config.pop(theirs) for theirs, ours in _FROM_HUGGINGFACE.items()}
    arguments["mlp_ratio"] = config.pop("intermediate_size") / arguments["embed_dim"]
    model = timesformer.TimeSformer(norm_layer=partial(nn.LayerNorm, eps=config.pop("layer_norm_eps")), **arguments)
    assert not config, f"arguments not used: {sorted(config)}"
    report = load_checkpoint(model, case.tensors("state."))
    assert report.converted_from == "huggingface"
    return GoldenRun(
        model,
        inputs,
        lambda model, inputs: {"logits": model(torch.transpose(inputs["pixel_values"], 1, 2))},  # frames come first
        main="logits",
        source_gradients=lambda gradients: revert_state_dict(gradients, "huggingface"),
        data=("pixel_values",),
    )


_BUILDERS: dict[str, Callable[..., GoldenRun]] = {
    "Attention": _attention,
    "Block": _block,
    "VisionTransformer": _network,
    "TimesformerForVideoClassification": _huggingface,
}
