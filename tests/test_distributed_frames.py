"""Models that see clips of which each process holds some frames compute what one process computes."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from sharded_frames_cases import BATCH, CASES, SEED, Kept, Result, build, clip_of, step
from sharded_frames_tasks import (
    ORDERED,
    PROCESSES,
    TASKS,
    Failed,
    data_parallel_alone,
    two_clips_of_two_lengths_alone,
    work,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from vidattn.distributed import _exchange, frames, shard_frames
from vidattn.models.timesformer import Block, TimeSformer
from vidattn.models.vivit import sample_frames_uniformly

RANKS = (2, 3, 4)
Found = list[dict[Any, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found of each case at each number of ranks, and of each task."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(PROCESSES)]


def of_ranks(found: Found, key: Any, ranks: int = PROCESSES) -> list[Any]:
    outcomes = [of_rank[key] for of_rank in found[:ranks]]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    assert not failed, failed[0]
    return outcomes


@cache
def alone(name: str) -> Result:
    """Give what one process computes; of models that sample frames the gradient of those."""
    model = build(CASES[name])
    if name.startswith("random"):
        torch.manual_seed(SEED)
        torch.manual_seed(int(torch.randint(2**62, ())))  # what the ranks draw from
    *_, result = step(model, clip_of(CASES[name]))
    if "sampled" in name:
        gradient = result.gradients["video"]
        assert gradient is not None
        result.gradients["video"] = sample_frames_uniformly(gradient, 5)
    return result


def assert_equal(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert (actual is None) == (expected is None), what
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max()
    assert error <= 1e-10 * expected.abs().max().clamp(min=1e-3), (what, float(error))


def assert_same_step(results: list[Result], expected: Result) -> None:
    """Compare logits and the gradients of all parameters of each rank, and the gradient of each one's frames."""
    for rank, result in enumerate(results):
        assert_equal(result.logits, expected.logits, f"logits of rank {rank}")
        assert result.gradients.keys() == expected.gradients.keys()
        for key, gradient in expected.gradients.items():
            if key != "video":
                assert_equal(result.gradients[key], gradient, f"{key} of rank {rank}")
    parts = [result.gradients["video"] for result in results]
    whole = None if any(part is None for part in parts) else torch.cat(parts, dim=2)  # type: ignore[arg-type]
    assert_equal(whole, expected.gradients["video"], "video")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_all_gradients_are_those_of_one_process(found: Found, name: str, ranks: int) -> None:
    assert_same_step([outcome.result for outcome in of_ranks(found, (name, ranks), ranks)], alone(name))


def test_clips_of_several_lengths_in_one_step(found: Found) -> None:
    """Two forward passes before their backward pass, gradients summed into what is there, a step of an optimizer."""
    expected = two_clips_of_two_lengths_alone()
    for tensors in of_ranks(found, "two_clips_of_two_lengths"):
        for number, (one, other) in enumerate(zip(tensors, expected, strict=True)):
            assert_equal(one, other, f"tensor {number}")


@pytest.mark.parametrize("name", ORDERED)
def test_accelerate_may_come_afterwards(found: Found, name: str) -> None:
    """It swaps what shard_frames left as it was, and in the reverse order both revert."""
    outcomes = [outcome[name] for outcome in of_ranks(found, "accelerated_afterwards")]
    assert_same_step([result for result, _, _ in outcomes], alone(name))
    assert all(reverted for _, _, reverted in outcomes)
    assert all((swapped > 0) == (name != "vivit 4") for _, swapped, _ in outcomes)


@pytest.mark.parametrize("name", ["timesformer", "vivit 4", "xvit"])
def test_blocks_may_be_checkpointed(found: Found, name: str) -> None:
    assert_same_step([outcome[name] for outcome in of_ranks(found, "checkpointed")], alone(name))


def test_other_ranks_may_hold_other_clips(found: Found) -> None:
    expected = data_parallel_alone()
    for gradients in of_ranks(found, "data_parallel"):
        for name, gradient in expected.items():
            assert_equal(gradients[name], gradient, name)


# What docs/distributed.md says of numbers sent. B, T, N, C, h, d: as there; t, n, k: frames, sites, heads of each rank.


def shares(count: int, ranks: int) -> list[int]:
    return [len(part) for part in torch.arange(count).tensor_split(ranks)]


def divided(rank: int, t: list[int], n: list[int], channels: int, there: float = 1.0, back: float = 1.0) -> int:
    T, N = sum(t), sum(n)
    return int(BATCH * channels * (there * t[rank] * (N - n[rank]) + back * n[rank] * (T - t[rank])))


def timesformer_numbers(rank: int, ranks: int) -> tuple[int, int]:
    numbers = 2 * divided(rank, shares(7, ranks), shares(6, ranks), 12)  # of two blocks
    return numbers, numbers


def time_attention_numbers(rank: int, ranks: int) -> tuple[int, int]:
    numbers = 2 * divided(rank, shares(7, ranks), shares(6, ranks), 8)
    return numbers, numbers


def factorized_numbers(rank: int, ranks: int) -> tuple[int, int]:
    t, n = shares(7, ranks), shares(6, ranks)
    return 2 * divided(rank, t, n, 8, 1.5, 0.5), 2 * divided(rank, t, n, 8, 0.5, 1.5)


def joint_numbers(rank: int, ranks: int) -> tuple[int, int]:
    t, k, head_dim, N = shares(7, ranks), shares(3, ranks), 4, 6
    there, back = N * t[rank] * (3 - k[rank]), N * (7 - t[rank]) * k[rank]
    forward = 3 * there + back + k[rank] * (ranks - 1)
    backward = 3 * back + there + 3 - k[rank]
    return 2 * BATCH * head_dim * forward, 2 * BATCH * head_dim * backward


def gathered(rank: int, t: list[int], channels: int) -> tuple[int, int]:
    return BATCH * channels * t[rank] * (len(t) - 1), BATCH * channels * (sum(t) - t[rank])


def encoder_numbers(rank: int, ranks: int) -> tuple[int, int]:
    return gathered(rank, shares(7, ranks), 8)


def xvit_numbers(rank: int, ranks: int) -> tuple[int, int]:
    neighbours = (rank > 0) + (rank < ranks - 1)
    halo = 2 * neighbours * 2 * BATCH * 5 * 4  # two blocks, K and V, five tokens, 16 / 4 channels
    forward, backward = gathered(rank, shares(8, ranks), 16)
    return halo + forward, halo + backward


def video_swin_numbers(rank: int, ranks: int) -> tuple[int, int]:
    numbers = 2 * BATCH * 2 * (5 * 7 * 8 + 3 * 4 * 16)  # one shifted block in each of two stages
    return numbers, numbers


SENT = {
    "timesformer": timesformer_numbers,
    "timesformer, accelerated": timesformer_numbers,
    "timesformer, joint": joint_numbers,
    "timesformer, space only": lambda rank, ranks: (0, 0),
    "vivit 2": encoder_numbers,
    "vivit 3": time_attention_numbers,
    "vivit 4": factorized_numbers,
    "xvit": xvit_numbers,
    "xvit, accelerated": xvit_numbers,
    "video_swin": video_swin_numbers,
    "video_swin, accelerated": video_swin_numbers,
}
SUMMED = {"timesformer": [12, 12], "timesformer, accelerated": [12, 12], "video_swin": [16], "vivit 3": []}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", SENT)
def test_what_is_sent(found: Found, name: str, ranks: int) -> None:
    for rank, outcome in enumerate(of_ranks(found, (name, ranks), ranks)):
        sent = (sum(outcome.forward.get("alltoall_base", [])), sum(outcome.backward.get("alltoall_base", [])))
        assert sent == tuple(8 * numbers for numbers in SENT[name](rank, ranks)), rank
        assert outcome.forward["allgather"] == [7 * 8]
        *summed, gradients = outcome.backward["allreduce"]
        used = [gradient for key, gradient in alone(name).gradients.items() if key != "video" and gradient is not None]
        assert gradients == 8 * sum(gradient.numel() for gradient in used)
        if name in SUMMED and name != "vivit 3":
            expected = [8 * BATCH * channels for channels in SUMMED[name]]
            assert outcome.forward["allreduce"] == summed == expected
        assert {*outcome.forward, *outcome.backward} <= {"allgather", "alltoall_base", "allreduce"}


UNITS = {"timesformer": 7, "vivit 1, mean": 7, "vivit 3": 7, "vivit 4": 7, "xvit": 8, "video_swin": 4}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", UNITS)
def test_a_rank_keeps_its_share_of_activations(found: Found, name: str, ranks: int) -> None:
    """And less than a quarter on top, which is the more the smaller the model."""
    model = build(CASES[name])
    kept = Kept(model)
    with kept:
        next(step(model, clip_of(CASES[name])))
    for outcome, units in zip(of_ranks(found, (name, ranks), ranks), shares(UNITS[name], ranks), strict=True):
        assert outcome.kept <= 1.25 * kept.bytes() * units / UNITS[name]


TOGETHER = {  # of what one rank does wrong, or all: what every rank says
    "three frames": "ValueError: shard_frames: mesh: expected at most 3 ranks for 3 frames",
    "no clip": "ValueError: split: video: expected (batch, channels, frames, height, width), got tensor (3, 8, 16, 24)",
    "another cut": "ValueError: part: expected [2, 2, 2, 1] frames on the ranks, as split() cuts them, got [1, 2",
    "another batch": "ValueError: part: expected (batch, channels, frames, height, width), alike on all ranks",
    "no batch": "ValueError: part: expected (batch, channels, frames, height, width), alike on all ranks",
    "three frames, cut by hand": "ValueError: shard_frames: mesh: expected at most 3 ranks for 3 frames",
    "features": "RuntimeError: forward_features: a model after shard_frames gives logits alone",
    "twice": "TypeError: shard_frames: model: expected one of TimeSformer, ViViT, SpaceTimeViViT, XViT, Recognizer3D",
    "a part of a model": "TypeError: shard_frames: model: expected one of TimeSformer",
    "a part called": "RuntimeError: after shard_frames call the whole model",
    "dropout of tokens": "ValueError: shard_frames: model: expected dropout of 0 in training, because no rank could "
    "draw it for the tokens of all, got p=0.5 of model.pos_drop",
    "dropout in evaluation": "no error",
    "parameters in parts": "ValueError: shard_frames: model: expected every rank to have all parameters, got 40 that "
    "are sharded themselves, the first is model.blocks.0.norm1.weight",
    "three windows": "ValueError: shard_frames: mesh: expected at most 3 ranks for 11 frames, which may be cut after "
    "each 4, got 4",
    "one window": "ValueError: shard_frames: mesh: expected at most 1 ranks for 3 frames, which may be cut after",
    "another length": "ValueError: part: expected parts of a clip of (7, 2, 3) patches, for which the position "
    "embedding was made, got (9, 2, 3) patches in 18 frames of 16 x 24 on all ranks",
    "patches of two frames": "ValueError: shard_frames: model: expected frames of a multiple of 8 pixels in height",
}


@pytest.mark.parametrize("mistake", TOGETHER)
def test_all_ranks_raise_together(found: Found, mistake: str) -> None:
    messages = [messages[mistake] for messages in of_ranks(found, "errors")]
    assert all(message.startswith(TOGETHER[mistake]) for message in messages), messages


def test_all_tasks_are_looked_at(found: Found) -> None:
    assert {key for key in found[0] if not isinstance(key, tuple)} == set(TASKS)
    assert set(of_ranks(found, "errors")[0]) == set(TOGETHER)


def test_a_process_outside_of_the_mesh_is_told(found: Found) -> None:
    *inside, outside = of_ranks(found, "outside")
    assert inside == ["no error"] * 3
    assert outside == "ValueError: shard_frames: mesh: expected this process to be in it, got one of other processes"


def test_examples() -> None:
    assert doctest.testmod(frames).failed == doctest.testmod(_exchange).failed == 0


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_one_rank_is_enough_and_revert_restores(mesh: DeviceMesh) -> None:
    model = build(CASES["timesformer"])
    classes = [type(module) for module in model.modules()]
    before = model.state_dict()
    cut = shard_frames(model, mesh)
    clip = clip_of(CASES["timesformer"])
    assert cut.split(clip).data_ptr() == clip.data_ptr()
    assert_same_step([list(step(model, cut.split(clip)))[-1]], alone("timesformer"))
    assert list(model.state_dict()) == list(before)
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(model.state_dict().values(), before.values()))
    cut.revert()
    assert [type(module) for module in model.modules()] == classes
    assert model.forward_features(clip).shape == (2, 12, 7, 2, 3)


def test_split_cuts_whatever_has_the_frames(mesh: DeviceMesh) -> None:
    cut = shard_frames(build(CASES["timesformer"]), mesh)
    assert cut.split(torch.arange(9).view(1, 1, 9, 1, 1)).flatten().tolist() == list(range(9))
    with pytest.raises(TypeError, match=r"split: video: expected a tensor, got 'clip\.mp4'"):
        cut.split("clip.mp4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="part: expected a tensor, got 3"):
        cut._model(3)


def test_revert_does_not_undo_what_others_did(mesh: DeviceMesh) -> None:
    model = build(CASES["timesformer"])
    cut = shard_frames(model, mesh)
    block = model.get_submodule("model.blocks.0")
    block.__class__ = type("Mine", (type(block),), {})
    with pytest.raises(RuntimeError, match="revert: 1 modules are of another class since shard_frames, the first is a"):
        cut.revert()


def test_meshes_and_models_that_do_not_fit(mesh: DeviceMesh) -> None:
    model = build(CASES["timesformer"])
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh, got 4"):
        shard_frames(model, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mesh: expected one dimension, as mesh\[name\] gives, got 2"):
        shard_frames(model, DeviceMesh("cpu", [[0]]))
    with pytest.raises(TypeError, match=r"model: expected one of .* got torch\.nn\.modules\.linear\.Linear"):
        shard_frames(nn.Linear(2, 2), mesh)


def test_changed_models_are_refused(mesh: DeviceMesh) -> None:
    class Mine(Block):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args).flip(1)

    model = build(CASES["timesformer"])
    block = model.get_submodule("model.blocks.1")
    block.__class__ = Mine
    with pytest.raises(ValueError, match=r"expected model.blocks.1 to be a Block as it is bundled, got .*Mine"):
        shard_frames(model, mesh)
    assert type(model) is TimeSformer  # nothing was changed
    block.__class__ = Block
    block.forward = block.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="got the instance overrides forward"):
        shard_frames(model, mesh)
