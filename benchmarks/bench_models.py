"""Whole models, and attention modules of libraries: inference and training steps, eager, compiled and accelerated."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vidattn
from benchmarks.calls import EXACT
from benchmarks.libraries import create
from benchmarks.rounds import CLOCK
from benchmarks.selection import parametrize
from benchmarks.shapes import DTYPES, MODEL_CASES, MODULE_CASES, SMOKE_MODEL_CASES, Work
from vidattn.models.layers import DropPath

CASES = MODEL_CASES | MODULE_CASES | SMOKE_MODEL_CASES
CONTENDERS = ("eager", "compiled", "vidattn", "vidattn_compiled")


def build(
    case: str, direction: str, dtype: str, contender: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """Make a model or module with random weights, a random input, the same for every contender, and the call to time.

    Args:
        case: name of the case.
        direction: "inference", or "training": forward, loss and backward.
        dtype: "float32" | "bfloat16" | "float16", of the model and the input.
        contender: one of ``CONTENDERS``, or ``EXACT``.
        device: where model and input are.

    Returns:
        A function that returns (logits,), or (logits, gradient of the first parameter).

    Raises:
        NotImplementedError: a training step is to be compiled, of a model for which that takes many minutes.
    """
    shape = CASES[case]
    wanted = shape.compiled_training or os.environ.get("VIDATTN_COMPILED_TRAINING")
    if direction == "training" and contender.endswith("compiled") and not wanted:
        raise NotImplementedError(
            "a training step of this depth takes minutes to compile; VIDATTN_COMPILED_TRAINING=1 has it done"
        )
    torch.manual_seed(0)
    model = create(shape.model, **dict(shape.overrides)).to(device, DTYPES[dtype])
    model.train(direction == "training")
    for layer in model.modules():
        # Outputs could not be compared if everybody drew masks of his own, or if a layer that starts from zero hid all.
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
        elif isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    video = torch.randn(shape.input_shape).to(device, DTYPES[dtype])
    if contender == EXACT:
        exact = getattr(torch, shape.exact)
        model, video = model.to(exact), video.to(exact)
    if contender.startswith("vidattn"):
        vidattn.accelerate(model)
    run = model
    if contender.endswith("compiled"):
        run = torch.compile(model, dynamic=False)

    def infer() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(video),)

    first = next(model.parameters())

    def train() -> tuple[Tensor, ...]:
        model.zero_grad()
        logits = run(video)
        if case in MODULE_CASES:  # tokens, which have no labels
            logits.square().mean().backward()
        else:  # one label a clip, or one a voxel
            labels = torch.zeros(len(logits), *logits.shape[2:], dtype=torch.int64, device=device)
            F.cross_entropy(logits, labels).backward()
        assert first.grad is not None
        return logits.detach(), first.grad

    return infer if direction == "inference" else train


@cache
def model_flops(case: str, direction: str) -> int:
    """Operations of one call, counted on the reference model without running it."""
    shape = CASES[case]
    model = create(shape.model, **dict(shape.overrides)).train(direction == "training").to("meta")
    training = direction == "training"
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        logits = model(torch.empty(shape.input_shape))
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(
        metafunc,
        MODULE_CASES | MODEL_CASES,
        SMOKE_MODEL_CASES,
        lambda direction, dtype: CONTENDERS,
        ("inference", "training"),
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_model(contest, case: str, direction: str, dtype: str, threads: int, contender: str) -> None:
    contest(
        "models",
        build,
        (case, direction, dtype, threads, contender),
        Work(model_flops(case, direction)),
        input_shape=CASES[case].input_shape,
    )
