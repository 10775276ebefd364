"""The paper's TimeSformer with its attention swapped."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from integration_cases import Integration, Target, admit, assert_as_before, run, spread
from standin_timesformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

import vidattn
from vidattn.backends import tensor_leaves
from vidattn.nn.divided import _folded


def clip() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 3, 8, 12)}


_target = partial(
    Target, "facebookresearch/TimeSformer", inputs=clip, attention=("Attention",), integration="timesformer",
    stand_in=True,
)  # fmt: skip
KINDS = ("divided_space_time", "space_only", "joint_space_time")
TARGETS = [
    _target(f"VisionTransformer, {kind}", partial(VisionTransformer, attention_type=kind), compiles=kind == KINDS[0])
    for kind in KINDS
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Block:
    """A block whose code counts as tested."""
    torch.manual_seed(0)
    block = spread(Block(12, 2)).eval()
    admit(block, "timesformer", monkeypatch)
    return block


def tokens(dtype: torch.dtype = torch.float32, frames: int = 3, sites: int = 6) -> dict[str, Any]:
    torch.manual_seed(1)
    x = torch.randn(2, 1 + frames * sites, 12, dtype=dtype, requires_grad=True)
    return {"x": x, "B": 2, "T": frames, "W": 3}


@pytest.mark.parametrize("part", [key for key, _ in Block(12, 2).named_modules() if key])
def test_a_part_that_somebody_watches_is_called_as_before(block: Block, part: str) -> None:
    seen: list[list[Tensor]] = []
    for accelerated in (False, True):
        watched = copy.deepcopy(block)
        if accelerated:
            vidattn.accelerate(watched)
        calls: list[Tensor] = []
        watched.get_submodule(part).register_forward_hook(
            lambda module, args, output, calls=calls: calls.extend(tensor_leaves(output)[:1])
        )
        calls.append(watched(**tokens()))
        seen.append(calls)
    assert [x.shape for x in seen[0]] == [x.shape for x in seen[1]]
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*seen, strict=True))


def test_dropout_draws_the_same_numbers(block: Block) -> None:
    block.double().train()
    for part in (block.attn.proj_drop, block.temporal_attn.proj_drop, block.mlp.drop):
        part.p = 0.3
    before = run(copy.deepcopy(block), tokens(torch.float64))
    vidattn.accelerate(block)
    after = run(block, tokens(torch.float64))
    assert after.ops.forward == 2
    assert_as_before(after, before, None)


def test_attention_without_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Attention(12, 3, True, 0.0, 0.0, with_qkv=False)
    admit(attention, "timesformer", monkeypatch)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    before = run(copy.deepcopy(attention), {"x": x})
    assert len(vidattn.accelerate(attention).swapped) == 1
    after = run(attention, {"x": x})
    assert after.ops.forward == 1
    assert_as_before(after, before, None)


class Wrapper(nn.Module):
    """Hands everything on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Call what is wrapped."""
        return 2 * self.module(x)


@pytest.mark.parametrize("name", ["temporal_attn", "attn", "norm1", "drop_path"])
@pytest.mark.parametrize("before", [False, True])
def test_a_part_that_somebody_wraps(block: Block, name: str, before: bool) -> None:
    other = copy.deepcopy(block)
    if not before:
        vidattn.accelerate(block)
    for each in (block, other):
        setattr(each, name, Wrapper(getattr(each, name)))
    if before:
        vidattn.accelerate(block)
    after = run(block, tokens())
    assert after.ops.calls["divided_attention"] == 2  # those of the two attentions, in the original's order
    assert_as_before(after, run(other, tokens()), None)


def test_rows_that_do_not_divide_are_the_originals_error(block: Block) -> None:
    vidattn.accelerate(block)
    arguments = tokens()
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        block(arguments["x"], 2, 4, 3)


def test_a_frozen_block_folds_two_layers(block: Block) -> None:
    with pytest.raises(ValueError, match=r"the first is temporal_attn\.proj\.weight"):
        vidattn.accelerate(block, frozen=True)
    block.requires_grad_(False)
    arguments = {**tokens(), "x": tokens()["x"].detach()}
    before = block(**arguments)
    with vidattn.accelerate(block, frozen=True):
        assert torch.allclose(block(**arguments), before, atol=1e-5)
        assert len(_folded) == 1
        block.temporal_fc.weight.mul_(2)
        after = block(**arguments)
    assert not _folded and torch.allclose(block(**arguments), after, atol=1e-5)


def test_another_attention_of_that_name_is_no_candidate() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_drop = nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn_drop(x)

    report = vidattn.accelerate(Attention())
    assert not report.swapped and not report.skipped
