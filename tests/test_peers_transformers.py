"""The bundled models against those of Hugging Face's transformers: the same weights, logits and gradients.

Their models are built from configurations with random weights; nothing is downloaded. Gradients are compared under
their names and in their layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision_swin  # noqa: F401  (before transformers, which imports torchvision and cannot do so by itself here)
from attention_cases import device_of
from golden_cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from torch import Tensor, nn
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
)
from twin_cases import spread

import vidattn
from vidattn.models import load_checkpoint, timesformer_checkpoint, vivit_checkpoint
from vidattn.models.timesformer import TimeSformer
from vidattn.models.vivit import ViViT

# Of each tensor's largest value, in float64; ten digits are what the GELU of their ViViT has of its constant.
EXACT = {"huggingface": 1e-13, "transformers": 2e-11}
BACKENDS = [name for name in vidattn.list_backends() if not vidattn.why_not("spatial_attention", backend=name)]
State = Mapping[str, Tensor]


class Peers(NamedTuple):
    theirs: nn.Module
    ours: nn.Module
    in_their_layout: Callable[[State], State]
    layout: str
    frames_alone: bool = False


def timesformer_peers(**options: Any) -> Peers:
    config = TimesformerConfig(
        patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80,
        num_labels=7, **{"image_size": 32, "num_frames": 5, **options},
    )  # fmt: skip
    ours = TimeSformer(
        img_size=config.image_size,
        patch_size=8,
        num_classes=7,
        num_frames=config.num_frames,
        attention_type=config.attention_type,
        embed_dim=48,
        depth=2,
        num_heads=3,
        mlp_ratio=80 / 48,
        qkv_bias=config.qkv_bias,
    )
    revert = partial(timesformer_checkpoint.revert_state_dict, source="huggingface")
    # Their attention over space alone gives the logits of each frame; ours, as the paper's code, those of the clip.
    frames_alone = config.attention_type == "space_only"
    return Peers(TimesformerForVideoClassification(config), ours, revert, "huggingface", frames_alone)


def vivit_peers(**options: Any) -> Peers:
    config = VivitConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, num_labels=7,
        attn_implementation="sdpa",  # the other rounds probabilities to float32, in float64 too
        **{"image_size": 32, "num_frames": 6, "tubelet_size": (2, 8, 8), **options},
    )  # fmt: skip
    frames, *patch = config.tubelet_size
    ours = ViViT(
        80,
        2,
        4,
        7,
        (*patch, frames),
        48,
        classifier="token",
        num_frames=config.num_frames,
        image_size=config.image_size,
        qkv_bias=config.qkv_bias,
        layer_norm_eps=config.layer_norm_eps,
    )
    revert = partial(vivit_checkpoint.revert_state_dict, source="transformers", num_heads=4)
    return Peers(VivitForVideoClassification(config), ours, revert, "transformers")


CASES: dict[str, tuple[Callable[[], Peers], tuple[int, ...]]] = {
    **{
        f"timesformer-{kind}": (partial(timesformer_peers, attention_type=kind), (2, 5, 3, 32, 32))
        for kind in ("divided_space_time", "joint_space_time", "space_only")
    },
    "timesformer-no-bias": (partial(timesformer_peers, qkv_bias=False), (1, 5, 3, 32, 32)),
    "timesformer-one-frame": (partial(timesformer_peers, num_frames=1, image_size=40), (3, 1, 3, 40, 40)),
    "vivit": (vivit_peers, (2, 6, 3, 32, 32)),
    "vivit-epsilon": (partial(vivit_peers, layer_norm_eps=0.1), (2, 6, 3, 32, 32)),
    "vivit-no-bias-tubelets-not-square": (
        partial(vivit_peers, qkv_bias=False, image_size=(24, 40), tubelet_size=(3, 8, 10)),
        (1, 6, 3, 24, 40),
    ),
}


def results(logits: Tensor, video: Tensor, parameters: State) -> dict[str, Tensor]:
    """Logits, and the gradients of the video and of all parameters."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view(logits.shape)
    (logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"logits": logits.detach(), "video": video.grad, **gradients}  # type: ignore[dict-item]


def their_results(peers: Peers, video: Tensor) -> dict[str, Tensor]:
    video = video.clone().requires_grad_()
    return results(peers.theirs(pixel_values=video).logits, video, dict(peers.theirs.named_parameters()))


def our_results(peers: Peers, video: Tensor) -> dict[str, Tensor]:
    video = video.clone().requires_grad_()
    clips = video.flatten(0, 1).unsqueeze(1) if peers.frames_alone else video
    found = results(peers.ours(clips.transpose(1, 2)), video, dict(peers.ours.named_parameters()))
    return {name: found.pop(name) for name in ("logits", "video")} | dict(peers.in_their_layout(found))


def compare(name: str, actual: Tensor, exact: State, tolerances: tuple[float, float]) -> None:
    # The gradient of a key's bias vanishes: adding the same to all keys changes no softmax.
    measured_by = name.replace("k_proj.bias", "k_proj.weight")
    allowed = tolerances[name != "logits"] * exact[measured_by].abs().max()
    assert actual.shape == exact[name].shape, name
    error = (actual.double().cpu() - exact[name]).abs().max()
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"  # a NaN compares false


@pytest.mark.parametrize("backend", [None, *BACKENDS], ids=lambda name: name or "plain")
@pytest.mark.parametrize("case", CASES)
def test_weights_logits_and_gradients(case: str, backend: str | None) -> None:
    build, shape = CASES[case]
    peers = build()
    spread(peers.theirs.eval()).double()
    peers.ours.eval().double()
    video = torch.randn(shape, dtype=torch.float64)
    exact = their_results(peers, video)
    report = load_checkpoint(peers.ours, peers.theirs.state_dict())
    assert report.converted_from == peers.layout and not report.missing and not report.unexpected
    if backend is not None:
        assert vidattn.accelerate(peers.ours, backend=backend).swapped
    device = "cpu" if backend is None else device_of(backend)
    tolerances = {
        torch.float64: (EXACT[peers.layout], EXACT[peers.layout]),
        torch.float32: (OUTPUT_TOLERANCE, GRADIENT_TOLERANCE),
    }
    for dtype in tolerances:
        if dtype == torch.float64 and backend == "triton":
            continue  # has none
        peers.ours.to(device, dtype).zero_grad()
        found = our_results(peers, video.to(device, dtype))
        assert found.keys() == exact.keys()
        for name, tensor in found.items():
            compare(name, tensor, exact, tolerances[dtype])


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
@pytest.mark.parametrize("case", ["timesformer-divided_space_time", "vivit", "vivit-epsilon"])
def test_folders_as_transformers_saves_them(case: str, shard_size: str, tmp_path: Path) -> None:
    peers = CASES[case][0]()
    spread(peers.theirs.eval())
    peers.theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    report = load_checkpoint(peers.ours.eval(), tmp_path)
    assert not report.missing and not report.unexpected
    found = peers.in_their_layout(peers.ours.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in peers.theirs.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("num_attention_heads", 8), ("layer_norm_eps", 1e-3), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=rf"expected a config\.json that agrees .* got {name}="):
            load_checkpoint(peers.ours, tmp_path)
