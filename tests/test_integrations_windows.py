"""Window attention modules of repositories with their attention swapped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import standin_windows as repositories
import torch
from integration_cases import Integration, Target, admit, assert_as_before, run
from torch import Tensor, nn
from torch.nn import functional

import vidattn

DIM, HEADS, WINDOW, TOKENS = 12, 3, (2, 3, 4), 24
WINDOWS = 2  # in a clip


def separating(*windows: int, tokens: int = TOKENS) -> Tensor:
    """A mask (..., N, N) that parts the tokens of each window otherwise."""
    region = torch.randint(0, 2, (*windows, tokens), generator=torch.Generator().manual_seed(3))
    return -100.0 * (region[..., None] != region[..., None, :])


def fragments(windows: int, tokens: int) -> Tensor:
    """Distances between the fragments of each pair of tokens."""
    places = torch.randint(0, 3, (windows, tokens, 3), generator=torch.Generator().manual_seed(4))
    return places[:, :, None] - places[:, None]


class Attended(nn.Module):
    """Attention modules one after the other, each with arguments of its own behind the windows."""

    def __init__(self, *calls: tuple[nn.Module, dict[str, Any]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part for part, _ in calls)
        self.given = [arguments for _, arguments in calls]

    def forward(self, x: Tensor) -> Tensor:
        for part, given in zip(self.parts, self.given, strict=True):
            floating = {name: row for name, row in given.items() if isinstance(row, Tensor) and row.is_floating_point()}
            given = {**given, **{name: row.to(x.dtype) for name, row in floating.items()}}
            x = x + part(functional.layer_norm(x, x.shape[-1:]), **given)
        return x


class UpAndDown(nn.Module):
    """An encoder's attention, and a decoder's whose queries are something else."""

    def __init__(self, decoder: type[nn.Module]) -> None:
        super().__init__()
        self.encoder = repositories.nnformer.WindowAttention(DIM, (3, 3, 3), HEADS, proj_drop=0.2)
        self.decoder = decoder(DIM, (3, 3, 3), HEADS, proj_drop=0.2)
        self.register_buffer("mask", separating(WINDOWS, tokens=27))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x, mask=self.mask, pos_embed=x.mean(0, keepdim=True))
        return self.decoder(skip, x.flip(0), mask=self.mask)


def vrt() -> nn.Module:
    kind = repositories.vrt.WindowAttention
    masked = {"mask": separating(WINDOWS)}
    return Attended((kind(DIM, WINDOW, HEADS), masked), (kind(DIM, (3, 3, 4), HEADS, mut_attn=False), masked))


def rvrt() -> nn.Module:
    return Attended((repositories.rvrt.WindowAttention(DIM, WINDOW, HEADS), {"mask": separating(WINDOWS)}))


def aurora() -> nn.Module:
    plain = repositories.aurora.WindowAttention(DIM, HEADS, use_lora=False)
    adapted = partial(repositories.aurora.WindowAttention, DIM, HEADS, use_lora=True, drop=0.2)
    masked = {"mask": separating(WINDOWS)}
    return Attended((plain, {}), (adapted(), masked), (adapted(), {"rollout_step": 41}))


def transmorph() -> nn.Module:
    kind = repositories.transmorph.WindowAttention
    masked = {"mask": separating(WINDOWS)}
    return Attended(
        (kind(DIM, WINDOW, HEADS, rpe=False), {}), (kind(DIM, WINDOW, HEADS, rpe=True, proj_drop=0.2), masked)
    )


def bayesian() -> nn.Module:
    return Attended((repositories.bayesian.WindowAttention(DIM, WINDOW, HEADS), {"mask": separating(WINDOWS)}))


def physicsnemo() -> nn.Module:
    kinds = repositories.physicsnemo
    plain, masked = kinds.EarthAttention3D(DIM, 2, WINDOW, HEADS), kinds.EarthAttention2D(DIM, 2, (6, 4), HEADS, 0.2)
    return Attended((plain, {}), (masked, {"mask": separating(3, 2)}))


def mfai() -> nn.Module:
    kind = repositories.mfai.EarthAttention3D
    plain, masked = {"mask": None, "batch_size": 2}, {"mask": separating(6), "batch_size": 2}
    return Attended((kind(DIM, 2, WINDOW, HEADS), plain), (kind(DIM, 2, WINDOW, HEADS), masked))


def fast_vqa() -> nn.Module:
    kind = repositories.fast_vqa.WindowAttention3D
    resized = {"fmask": fragments(WINDOWS, TOKENS), "resized_window_size": WINDOW, "mask": separating(WINDOWS)}
    by_fragment = {"fmask": fragments(WINDOWS, TOKENS), "mask": separating(2 * WINDOWS)}
    first, second = kind(DIM, (3, 4, 5), HEADS), kind(DIM, WINDOW, HEADS, frag_bias=True, proj_drop=0.2)
    return Attended((first, resized), (second, by_fragment))


def windows(*shape: int) -> dict[str, Any]:
    return {"x": torch.randn(*shape, DIM)}


def target(library: str, model: str, integration: str, build: Callable[[], nn.Module], *shape: int) -> Target:
    names = ("WindowAttention", "WindowAttention_kv", "WindowAttention3D", "EarthAttention3D", "EarthAttention2D")
    return Target(library, model, build, partial(windows, *shape), names, integration, stand_in=True)


TARGETS = [
    target("VRT", "TMSA", "vrt", vrt, 4, TOKENS),
    target("RVRT", "STL", "vrt", rvrt, 4, TOKENS),
    target("Aurora", "Swin3DTransformerBackbone", "aurora", aurora, 4, TOKENS),
    target("TransMorph", "TransMorph", "transmorph", transmorph, 4, TOKENS),
    target("TransMorph", "TransMorph-Bayes", "transmorph", bayesian, 4, TOKENS),
    target(
        "nnFormer", "tumor and synapse", "nnformer", partial(UpAndDown, repositories.nnformer.WindowAttention_kv), 4, 27
    ),
    target("nnFormer", "acdc", "nnformer", partial(UpAndDown, repositories.acdc.WindowAttention_kv), 4, 27),
    target("physicsnemo", "Pangu and FengWu", "earth", physicsnemo, 6, 2, TOKENS),
    target("mfai", "PanguWeather", "earth", mfai, 12, TOKENS),
    target("FAST-VQA", "SwinTransformer3D", "fast_vqa", fast_vqa, 4, TOKENS),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass
