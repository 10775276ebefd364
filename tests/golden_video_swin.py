"""Golden cases of Video Swin: the papers' code, and torchvision's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_cases import GoldenCase, GoldenRun, UnknownCaseError
from torch import Tensor, nn

from vidattn.models import load_checkpoint, video_swin
from vidattn.models.video_swin_checkpoint import revert_state_dict
from vidattn.models.video_swin_windows import fit_window

# torchvision's names of the arguments that both have.
_FROM_TORCHVISION = {
    "patch_size": "patch_size",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
    "dropout": "drop_rate",
    "attention_dropout": "attn_drop_rate",
    "stochastic_depth_prob": "drop_path_rate",
}


def build(case: GoldenCase) -> GoldenRun:
    """Build a module, block or model."""
    config = case.config
    builder = _BUILDERS.get(config["class"])
    if builder is None:
        raise UnknownCaseError(f"{case.name}: Video Swin has no class {config['class']!r}")
    inputs = case.tensors("input.")
    inputs.pop("cotangent", None)
    run = builder(config, inputs, case.tensors("state."))
    unused = inputs.keys() - run.inputs.keys()
    assert not unused, f"inputs not used: {sorted(unused)}"
    return run


def check_function(case: GoldenCase) -> None:
    """Compare a function with its golden results, exactly."""
    check = {"compute_mask": _check_masks, "SwinTransformer3D.inflate_weights": _check_inflation}.get(
        case.config["class"]
    )
    if check is None:
        raise UnknownCaseError(f"{case.name}: Video Swin has no function {case.config['class']!r}")
    check(case)


def _call_on_x(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"out": module(inputs["x"])}


def _module(name: str) -> Callable[..., GoldenRun]:
    """Builder of a module that maps x to out."""

    def builder(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
        arguments = dict(config["args"])
        if isinstance(arguments.get("downsample"), str):
            arguments["downsample"] = getattr(video_swin, arguments["downsample"])
        if isinstance(arguments.get("norm_layer"), str):
            arguments["norm_layer"] = getattr(nn, arguments["norm_layer"].rpartition(".")[2])
        module = getattr(video_swin, name)(**arguments)
        module.load_state_dict(state, strict=True)
        return GoldenRun(module, inputs, _call_on_x, swaps=name in ("BasicLayer", "SwinTransformer3D"))

    return builder


def _attention(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    module = video_swin.WindowAttention3D(**config["args"])
    module.load_state_dict(state, strict=True)
    return GoldenRun(
        module, {"mask": None, **inputs}, lambda module, inputs: {"out": module(inputs["x"], mask=inputs["mask"])}
    )


def _block(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    module = video_swin.SwinTransformerBlock3D(**config["args"])
    module.load_state_dict(state, strict=True)
    window, shift, padded = fit_window(inputs["x"].shape[1:4], module.window_size, module.shift_size)
    if "effective" in config:
        effective = {"window": list(window), "shift": list(shift), "padded": list(padded)}
        assert config["effective"] == effective
    mask: Tensor | None = None
    if any(shift):  # large masks are left out of the files
        mask = video_swin.compute_mask(*padded, window, shift, "cpu")
    return GoldenRun(
        module,
        {"mask_matrix": mask, **inputs},
        lambda module, inputs: {"out": module(inputs["x"], inputs["mask_matrix"])},
    )


def _call_model(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        features = model.forward_features(inputs["x"])
    return {"features": features, "out": model(inputs["x"])}


def _recognizer(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    arguments = config["args"]
    model = video_swin.Recognizer3D(
        video_swin.SwinTransformer3D(**arguments["backbone"]), video_swin.I3DHead(**arguments["cls_head"])
    )
    model.load_state_dict(state, strict=True)
    return GoldenRun(model, inputs, _call_model)


def _torchvision_model(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    arguments = dict(config["args"])
    num_classes = arguments.pop("num_classes", 400)
    backbone = video_swin.SwinTransformer3D(
        patch_norm=True, **{_FROM_TORCHVISION[name]: value for name, value in arguments.items()}
    )
    model = video_swin.Recognizer3D(backbone, video_swin.I3DHead(num_classes, backbone.num_features))
    report = load_checkpoint(model, state)
    assert report.converted_from == "torchvision"
    return GoldenRun(
        model, inputs, _call_model, source_gradients=lambda gradients: revert_state_dict(gradients, "torchvision")
    )


def _torchvision_attention(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    from torchvision_swin import torchvision_swin3d

    module = torchvision_swin3d.ShiftedWindowAttention3d(**config["args"])
    module.load_state_dict(state, strict=True)
    return GoldenRun(module, inputs, _call_on_x)


def _torchvision_block(config: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> GoldenRun:
    from torchvision_swin import SwinTransformerBlock, torchvision_swin3d

    module = SwinTransformerBlock(attn_layer=torchvision_swin3d.ShiftedWindowAttention3d, **config["args"])
    module.load_state_dict(state, strict=True)
    return GoldenRun(module, inputs, _call_on_x)


_BUILDERS: dict[str, Callable[..., GoldenRun]] = {
    "WindowAttention3D": _attention,
    "SwinTransformerBlock3D": _block,
    "Recognizer3D(SwinTransformer3D,I3DHead)": _recognizer,
    "SwinTransformer3d": _torchvision_model,
    "ShiftedWindowAttention3d": _torchvision_attention,
    "SwinTransformerBlock(attn_layer=ShiftedWindowAttention3d)": _torchvision_block,
    **{
        name: _module(name)
        for name in ("BasicLayer", "I3DHead", "Mlp", "PatchEmbed3D", "PatchMerging", "SwinTransformer3D")
    },
}


def _check_masks(case: GoldenCase) -> None:
    masked = case.tensors("output.masked.")
    cases = case.config["cases"]
    assert len(masked) == len(cases) > 0
    for number, expected in enumerate(cases):
        window, shift, padded = fit_window(expected["size"], expected["window"], expected["shift"])
        assert [list(window), list(shift), list(padded)] == [
            expected["eff_window"],
            expected["eff_shift"],
            expected["padded"],
        ]
        assert video_swin.get_window_size(expected["size"], expected["window"], expected["shift"]) == (window, shift)
        mask = video_swin.compute_mask(*padded, window, shift, "cpu")
        assert mask.dtype == torch.float32
        torch.testing.assert_close(mask, masked[str(number)].float() * -100.0, rtol=0, atol=0)
        windows = math.prod(axis // extent for axis, extent in zip(padded, window, strict=True))
        assert mask.shape == (windows, math.prod(window), math.prod(window))


def _check_inflation(case: GoldenCase) -> None:
    backbone = video_swin.SwinTransformer3D(**case.config["args"])
    image = case.tensors("input.")
    report = load_checkpoint(backbone, {"model": image})
    assert report.converted_from == "image"
    assert sorted(report.ignored) == sorted(name for name in image if name.startswith("head."))
    expected = case.tensors("state.")
    state = backbone.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
