"""Golden cases of ViViT: the paper's code in flax, and Hugging Face's model 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from golden_cases import GoldenCase, GoldenRun, UnknownCaseError
from torch import Tensor, nn

import vidattn
from vidattn.models import load_checkpoint, vivit
from vidattn.models.vivit_checkpoint import convert_state_dict, revert_state_dict
from vidattn.twins import Twin, register_twin


def build(case: GoldenCase) -> GoldenRun:
    """Build a module, block or model."""
    peer = case.metadata.get("peer", "")
    config = case.config
    builder = next((builder for ending, builder in _BUILDERS.items() if peer.endswith(" " + ending)), None)
    if builder is None:
        raise UnknownCaseError(f"{case.name}: ViViT has nothing like {config.get('class', peer)!r}")
    config.pop("run")
    inputs = case.tensors("input.")
    inputs.pop("cotangent")
    run = builder(config, inputs, case.tensors("state."))
    run.data = tuple(inputs)
    unused = inputs.keys() - run.inputs.keys()
    assert not unused, f"inputs not used: {sorted(unused)}"
    return run


def check_function(case: GoldenCase) -> None:
    """Raise: no function of ViViT that is not differentiable is recorded."""
    raise UnknownCaseError(f"{case.name}: ViViT has no function {case.config.get('class')!r}")


def measured_by(name: str) -> str | None:
    """Measure the gradient of a key's bias by that of its weight: adding the same to all keys changes no softmax."""
    match = re.fullmatch(r"(state\..*(?:key[./]|k_proj\.))bias", name)
    return None if match is None else match[1] + ("kernel" if name.endswith("/bias") else "weight")


class FactorizedAttention(nn.Module):
    """The function as a module, (B, T, N, h, d) each."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return vivit.factorized_dot_product_attention(query, key, value)


class FusedFactorizedAttention(Twin, FactorizedAttention):
    """The op in its place."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        qkv = (query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2))
        return vidattn.factorized_dot_product_attention(qkv, query.shape[1]).view(query.shape)


register_twin(f"{__name__}.FactorizedAttention", f"{__name__}:FusedFactorizedAttention")


def _function(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    assert not state
    return GoldenRun(
        FactorizedAttention(),
        inputs,
        lambda module, inputs: {"output": module(inputs["query"], inputs["key"], inputs["value"])},
        main="output",
    )


def _reverter(source: str, *heads: int | None) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    num_heads, temporal_num_heads = (*heads, None)[:2]
    assert num_heads is not None
    return lambda gradients: revert_state_dict(
        gradients, source, num_heads=num_heads, temporal_num_heads=temporal_num_heads
    )


def _block(attention: str) -> Callable[..., GoldenRun]:
    def builder(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
        heads = config["num_heads"]
        if attention == "axes":
            block: nn.Module = vivit.EncoderFactorizedSelfAttentionBlock(
                config["hidden"], config["mlp_dim"], heads, config["attention_order"]
            )
        else:
            block = vivit.EncoderBlock(config["hidden"], config["mlp_dim"], heads, attention)
        block.load_state_dict(convert_state_dict(state, "scenic"), strict=True)

        def call(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
            x = inputs["x"]
            if attention == "axes":
                return {"output": module(x.unflatten(1, (config["temporal_dims"], -1))).flatten(1, 2)}
            return {"output": module(x)}

        return GoldenRun(block, inputs, call, main="output", source_gradients=_reverter("scenic", heads))

    return builder


def _scenic_model(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    _, frames, height, width, _ = inputs["x"].shape
    encoders = {name: config.pop(name, None) for name in ("spatial_transformer", "temporal_transformer")}
    heads: tuple[int | None, ...] = (config.get("num_heads"),)
    model_class: Any = vivit.ViViT
    if encoders["spatial_transformer"]:
        model_class = vivit.SpaceTimeViViT
        for encoder, options in encoders.items():
            config.update({f"{encoder.split('_')[0]}_{name}": value for name, value in options.items()})
        heads = config["spatial_num_heads"], config["temporal_num_heads"]
    model = model_class(**config, num_frames=frames, image_size=(height, width))
    report = load_checkpoint(model, state)
    assert report.converted_from == "scenic"
    return GoldenRun(
        model,
        inputs,
        lambda model, inputs: {"logits": model(inputs["x"].movedim(-1, 1))},
        main="logits",
        source_gradients=_reverter("scenic", *heads),
    )


def _transformers_model(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    ft, fh, fw = config["tubelet_size"]
    heads = config["num_attention_heads"]
    model = vivit.ViViT(
        config["intermediate_size"],
        config["num_hidden_layers"],
        heads,
        config["num_labels"],
        (fh, fw, ft),
        config["hidden_size"],
        classifier="token",
        num_frames=config["num_frames"],
        image_size=config["image_size"],
        in_channels=config["num_channels"],
        qkv_bias=config["qkv_bias"],
        gelu="erf" if config.get("hidden_act") == "gelu" else "tanh",
        layer_norm_eps=config.get("layer_norm_eps", 1e-6),
    )
    report = load_checkpoint(model, state)
    hub = any(".encoder.layer." in name for name in state)
    assert report.converted_from == ("transformers-hub" if hub else "transformers")
    return GoldenRun(
        model,
        inputs,
        lambda model, inputs: {"logits": model(inputs["pixel_values"].transpose(1, 2))},
        main="logits",
        source_gradients=_reverter(report.converted_from, heads),
    )


_MODEL = "scenic/projects/vivit/model.py"
_BUILDERS: dict[str, Callable[..., GoldenRun]] = {
    "scenic/projects/vivit/model_utils.py factorized_dot_product_attention": _function,
    f"{_MODEL} EncoderBlock": _block("joint"),
    f"{_MODEL} EncoderBlock(attention_fn=factorized_dot_product_attention)": _block("factorized"),
    f"{_MODEL} EncoderFactorizedSelfAttentionBlock": _block("axes"),
    f"{_MODEL} ViViT": _scenic_model,
    f"{_MODEL} SpaceTimeViViT": _scenic_model,
    "VivitForVideoClassification": _transformers_model,
}
