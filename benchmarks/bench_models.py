"""Whole models: inference and training steps of the reference model, eager and compiled, and of the accelerated one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vidattn
from benchmarks.rounds import BASELINES, CLOCK
from benchmarks.shapes import DTYPES, MODEL_CASES, SMOKE_MODEL_CASES
from vidattn.models import create_model

CASES = MODEL_CASES | SMOKE_MODEL_CASES
# A compiled training step of these depths takes minutes to compile.
CONTENDERS = {"inference": ("eager", "compiled", "vidattn"), "training": ("eager", "vidattn")}


def build(case: str, direction: str, dtype: str, contender: str) -> Callable[[], tuple[Tensor, ...]]:
    """Make a model with random weights and a random video, the same ones for every contender, and the call to time.

    Args:
        case: name of the case.
        direction: "inference", or "training": forward, loss and backward, with the model's own stochastic depth.
        dtype: "float32" | "bfloat16", of the model and the video.
        contender: one of ``CONTENDERS[direction]``.

    Returns:
        A function that returns (logits,), or (logits, gradient of the first parameter).
    """
    shape = CASES[case]
    torch.manual_seed(0)
    model = create_model(shape.model, **dict(shape.overrides)).to(DTYPES[dtype])
    model.train(direction == "training")
    video = torch.randn(shape.video_shape).to(DTYPES[dtype])
    if contender == "vidattn":
        vidattn.accelerate(model)
    run = model
    if contender == "compiled":
        torch.compiler.reset()
        run = torch.compile(model, dynamic=False)

    def infer() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(video),)

    labels = torch.zeros(len(video), dtype=torch.int64)
    first = next(model.parameters())

    def train() -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # everybody drops the same paths
        model.zero_grad()
        logits = run(video)
        F.cross_entropy(logits, labels).backward()
        assert first.grad is not None
        return logits.detach(), first.grad

    return infer if direction == "inference" else train


def model_flops(case: str, direction: str) -> int:
    """Operations of one call, counted on the reference model without running it."""
    shape = CASES[case]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = create_model(shape.model, **dict(shape.overrides)).train(direction == "training")
        with torch.set_grad_enabled(direction == "training"):
            logits = model(torch.empty(shape.video_shape))
            if direction == "training":
                logits.sum().backward()
    return counter.get_total_flops()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE_MODEL_CASES if metafunc.config.getoption("smoke") else MODEL_CASES
    metafunc.parametrize(
        ("case", "direction", "dtype", "contender"),
        [
            (case, direction, dtype, contender)
            for case in cases
            for direction, contenders in CONTENDERS.items()
            for dtype in DTYPES
            for contender in (*contenders, *BASELINES)
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_model(contest, case: str, direction: str, dtype: str, contender: str) -> None:
    contest(
        f"models/{case}/{direction}/{dtype}",
        build,
        {"case": case, "direction": direction, "dtype": dtype},
        contender,
        model_flops(case, direction),
        video_shape=CASES[case].video_shape,
    )
