"""Whole models: inference of the reference model, eager and compiled, and of the accelerated model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vidattn
from benchmarks.rounds import CLOCK, GEMM
from benchmarks.shapes import DTYPES, MODEL_CASES, SMOKE_MODEL_CASES
from vidattn.models import create_model

CASES = MODEL_CASES | SMOKE_MODEL_CASES
CONTENDERS = ("eager", "compiled", "vidattn")


def build(case: str, dtype: str, contender: str) -> Callable[[], tuple[Tensor, ...]]:
    """Make a model with random weights and a random video, the same ones for every contender, and the call to time."""
    shape = CASES[case]
    torch.manual_seed(0)
    model = create_model(shape.model, **dict(shape.overrides)).eval().to(DTYPES[dtype])
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

    return infer


def model_flops(case: str) -> int:
    """Operations of one inference, counted on the reference model without running it."""
    shape = CASES[case]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create_model(shape.model, **dict(shape.overrides)).eval()
        model(torch.empty(shape.video_shape))
    return counter.get_total_flops()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE_MODEL_CASES if metafunc.config.getoption("smoke") else MODEL_CASES
    metafunc.parametrize(
        ("case", "dtype", "contender"),
        [(case, dtype, contender) for case in cases for dtype in DTYPES for contender in (*CONTENDERS, GEMM)],
    )


@pytest.mark.benchmark(timer=CLOCK)
def bench_model_inference(contest, case: str, dtype: str, contender: str) -> None:
    contest(
        f"models/{case}/inference/{dtype}",
        build,
        {"case": case, "dtype": dtype},
        contender,
        model_flops(case),
        direction="inference",
        video_shape=CASES[case].video_shape,
    )
