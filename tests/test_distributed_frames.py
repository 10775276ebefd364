"""Models that see clips of which each process holds some frames compute what one process computes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from sharded_frames_cases import CASES, PROCESSES, Outcome, Result, build, clip_of, step, work

RANKS = (2, 3, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Outcome]]:
    """What each rank found of each case at each number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(PROCESSES)]


@cache
def alone(name: str) -> Result:
    *_, result = step(build(CASES[name]), clip_of(CASES[name]))
    return result


def of_ranks(found: list[dict[tuple[str, int], Any]], name: str, ranks: int) -> list[Outcome]:
    outcomes = [of_rank[name, ranks] for of_rank in found[:ranks]]
    failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert not failed, failed[0]
    return outcomes


def assert_equal(actual: torch.Tensor | None, expected: torch.Tensor | None, what: str) -> None:
    assert (actual is None) == (expected is None), what
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max()
    assert error <= 1e-10 * expected.abs().max().clamp(min=1e-3), (what, float(error))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_all_gradients_are_those_of_one_process(found: Any, name: str, ranks: int) -> None:
    expected = alone(name)
    outcomes = of_ranks(found, name, ranks)
    for rank, outcome in enumerate(outcomes):
        assert_equal(outcome.result.logits, expected.logits, f"logits of rank {rank}")
        for key, gradient in expected.gradients.items():
            if key != "video":
                assert_equal(outcome.result.gradients[key], gradient, f"{key} of rank {rank}")
    parts = [outcome.result.gradients["video"] for outcome in outcomes]
    if "sampled" in name:
        return
    assert (parts[0] is None) == (expected.gradients["video"] is None)
    if parts[0] is not None:
        assert_equal(torch.cat(parts, dim=2), expected.gradients["video"], "video")
