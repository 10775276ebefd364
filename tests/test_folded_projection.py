"""In inference a block of TimeSformer folds two linear layers into one: for a call, or, frozen by name, for longer."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twin_cases import assert_same, results, spread

import vidattn
from vidattn.models.timesformer import Attention, Block
from vidattn.nn import FusedBlock
from vidattn.nn.divided import _FOLD_TOKENS, _folded

CHANNELS = 24
FEW, MANY = (torch.randn(batch, 1 + 4 * 6, CHANNELS) for batch in (1, 3))  # 24 and 72 tokens: 48 are worth it
FRAMES = 4


def make_block(**options: Any) -> Block:
    return spread(Block(CHANNELS, 2, **{"qkv_bias": True, "drop_path": 0.2, **options})).eval()


@pytest.fixture
def block() -> Block:
    """An accelerated block."""
    plain = make_block()
    vidattn.accelerate(plain)
    return plain


@pytest.fixture
def frozen() -> Iterator[Block]:
    """An accelerated block that may keep what it folds."""
    plain = make_block().requires_grad_(False)
    vidattn.accelerate(plain, frozen=True)
    yield plain
    _folded.clear()


@torch.no_grad()
def infer(block: Block, x: Tensor = MANY) -> Tensor:
    return block(x, len(x), FRAMES, 1)


def plain_result(block: Block, x: Tensor = MANY) -> Tensor:
    """What the original computes with the parameters as they are now."""
    other = copy.deepcopy(block)
    other.__class__ = Block
    for attention in (other.attn, other.temporal_attn):
        attention.__class__ = Attention
    return infer(other, x)


def linear_calls(block: Block, call: Callable[[], Any]) -> int:
    """Linear layers that are called: 7 as published, 5 where the two are folded, 8 where frames are dropped."""
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    call()
    handle.remove()
    return called.count("Linear")


def test_it_depends_on_what_is_asked_for(block: Block) -> None:
    """Enough tokens, no gradient, nothing drawn in between."""
    assert FEW.shape[1] - 1 < _FOLD_TOKENS * CHANNELS <= 3 * (MANY.shape[1] - 1)
    assert linear_calls(block, lambda: infer(block, MANY)) == 5
    assert linear_calls(block, lambda: infer(block, FEW)) == 7
    assert linear_calls(block, lambda: block(MANY, 3, FRAMES, 1)) == 7
    assert len(results(block, MANY, 3, FRAMES, 1)) == 2 + len(list(block.parameters()))
    block.drop_path.train()
    assert linear_calls(block, lambda: infer(block)) == 8
    block.drop_path.eval()
    block.temporal_attn.proj_drop.p = 0.1
    block.temporal_attn.proj_drop.train()
    assert linear_calls(block, lambda: infer(block)) == 7
    assert block not in _folded


def test_it_is_as_exact_as_two_layers(block: Block) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        exact = plain_result(copy.deepcopy(block).double(), MANY.double())
        block.to(dtype)
        assert linear_calls(block, lambda dtype=dtype: infer(block, MANY.to(dtype))) == 5
        fused, plain = infer(block, MANY.to(dtype)), plain_result(block, MANY.to(dtype))
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert fused.dtype == dtype
        assert (fused.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor
    block.temporal_fc.double()  # one of them alone: the original's error
    with pytest.raises(RuntimeError, match="dtype"):
        infer(block, MANY.to(dtype))


def test_autocast(block: Block) -> None:
    exact = plain_result(copy.deepcopy(block).double(), MANY.double())
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = infer(block), plain_result(block)
    assert fused.dtype == plain.dtype
    floor = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (fused.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


class _LowRank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("keep", [False, True])
def test_other_layers_are_called(keep: bool) -> None:
    """A layer of another kind, an instance's own method, a hook, no bias, inference tensors, a parametrization."""
    changes: dict[str, Callable[[Block], Any]] = {
        "class": lambda block: setattr(block.temporal_fc, "__class__", _LowRank),
        "method": lambda block: setattr(block.temporal_attn.proj, "forward", lambda x: 2 * x),
        "hook": lambda block: block.temporal_fc.register_forward_hook(lambda *args: 2 * args[-1]),
        "no bias": lambda block: setattr(block.temporal_fc, "bias", None),
        "parametrized": lambda block: nn.utils.parametrize.register_parametrization(
            block.temporal_fc, "weight", nn.Hardtanh(-0.1, 0.1)
        ),
    }
    for name, change in changes.items():
        block = make_block().requires_grad_(False)
        vidattn.accelerate(block, frozen=keep)
        before = infer(block)
        change(block)
        assert_same([infer(block)], [plain_result(block)])
        assert not torch.allclose(infer(block), before), name
    with torch.inference_mode():
        inferred = make_block().requires_grad_(False)
        vidattn.accelerate(inferred, frozen=keep)
        assert_same([infer(inferred)], [plain_result(inferred)])
    assert inferred not in _folded
    _folded.clear()


# Frozen by name


def assert_kept(block: Block) -> None:
    """The two layers are not called, and the result is the original's."""
    for x in (FEW, MANY):
        assert linear_calls(block, lambda x=x: infer(block, x)) == 5
        assert_same([infer(block, x)], [plain_result(block, x)])
    assert block in _folded


def add_in_place(block: Block) -> None:
    block.temporal_fc.weight.add_(0.1)


def replace_parameter(block: Block) -> None:
    block.temporal_attn.proj.bias = nn.Parameter(torch.randn(CHANNELS), requires_grad=False)


def replace_data(block: Block) -> None:
    block.temporal_attn.proj.weight.data = torch.randn(CHANNELS, CHANNELS)


def load_state(block: Block) -> None:
    block.load_state_dict(make_block().state_dict())


def load_state_of_a_part(block: Block) -> None:
    block.temporal_fc.load_state_dict(make_block().temporal_fc.state_dict())


def change_and_set_mode(block: Block) -> None:
    """Averages of weights are kept like this; PyTorch does not count it."""
    for parameter in block.parameters():
        parameter.data.mul_(0.9).add_(torch.randn_like(parameter), alpha=0.1)
    block.train().eval()


def change_and_move(block: Block) -> None:
    for parameter in block.parameters():
        parameter.data.mul_(0.9)
    block.to("cpu")


def replace_layer(block: Block) -> None:
    block.temporal_fc = nn.Linear(CHANNELS, CHANNELS).requires_grad_(False)


CHANGES: list[Callable[[Block], None]] = [
    add_in_place, replace_parameter, replace_data, load_state, load_state_of_a_part, change_and_set_mode,
    change_and_move, replace_layer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(frozen: Block, change: Callable[[Block], None]) -> None:
    assert_kept(frozen)
    before = infer(frozen)
    change(frozen)
    assert_kept(frozen)
    assert not torch.allclose(infer(frozen), before)


@pytest.mark.parametrize(
    "drop",
    [
        lambda block: block.load_state_dict(block.state_dict()),
        lambda block: block.to(torch.float32),
        lambda block: block.train(),
        lambda block: block.eval(),
    ],
    ids=["load_state_dict", "to", "train", "eval"],
)
def test_what_drops_it(frozen: Block, drop: Callable[[Block], Any]) -> None:
    infer(frozen)
    assert frozen in _folded
    drop(frozen)
    assert frozen not in _folded


def test_revert_drops_it() -> None:
    block = make_block().requires_grad_(False)
    before = infer(block)
    with vidattn.accelerate(block, frozen=True):
        infer(block)
        assert block in _folded
    assert block not in _folded and "frozen" not in vars(block)
    assert torch.equal(infer(block), before)


def test_it_is_made_once(frozen: Block) -> None:
    infer(frozen)
    first = _folded[frozen]
    infer(frozen)
    frozen(MANY, 3, FRAMES, 1)  # with gradients enabled too: no parameter has one
    with torch.inference_mode():
        frozen(MANY, 3, FRAMES, 1)
    assert _folded[frozen] is first
    x = MANY.clone().requires_grad_()
    frozen(x, 3, FRAMES, 1).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    add_in_place(frozen)
    infer(frozen)
    assert _folded[frozen] is not first


def test_memory_that_is_used_again_is_noticed(frozen: Block) -> None:
    """Averages of weights assign new tensors in turn, which soon lie where older ones lay."""
    weight = frozen.temporal_fc.weight
    for _ in range(20):
        weight.data = weight.data * 0.9 + 0.1 * torch.randn(CHANNELS, CHANNELS)
        assert_same([infer(frozen)], [plain_result(frozen)])


def test_a_parameter_that_is_learned_is_refused() -> None:
    block = make_block().requires_grad_(False)
    block.temporal_fc.bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"accelerate: frozen: .*model\.requires_grad_\(False\).* 0\.temporal_fc\.bias"
    ):
        vidattn.accelerate(nn.Sequential(block), frozen=True)
    assert type(block) is Block
    vidattn.accelerate(block.requires_grad_(False), frozen=True)
    block.requires_grad_(True)  # afterwards: nothing is kept
    assert_same([infer(block)], [plain_result(block)])
    assert block not in _folded


def test_frozen_is_a_change_that_reverts(block: Block) -> None:
    block.requires_grad_(False)
    again = vidattn.accelerate(block, frozen=True)
    assert block.frozen and len(again.swapped) == 3
    again.revert()
    assert not block.frozen and type(block) is FusedBlock


def test_copies_pickles_and_states_hold_nothing_of_it(frozen: Block) -> None:
    size, names = len(pickle.dumps(frozen)), list(frozen.state_dict())
    infer(frozen)
    assert frozen in _folded and len(pickle.dumps(frozen)) == size and list(frozen.state_dict()) == names
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert type(other) is FusedBlock and other not in _folded
        add_in_place(other)
        assert_kept(other)
    count = len(_folded)
    del other
    gc.collect()
    assert len(_folded) < count


# Recorded programs


class _WithFixedShape(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, 3, FRAMES, 1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", ["compile", "jit", "export"])
def test_what_is_recorded_follows_the_parameters(frozen: Block, trace: str) -> None:
    infer(frozen)
    with torch.no_grad():
        if trace == "compile":
            torch._dynamo.reset()
            recorded: Callable[..., Tensor] = torch.compile(frozen, fullgraph=True, backend="eager")
            recorded(MANY, 3, FRAMES, 1)
        elif trace == "jit":
            recorded = torch.jit.trace(_WithFixedShape(frozen), MANY)
        else:
            recorded = torch.export.export(frozen, (MANY, 3, FRAMES, 1)).module()
        add_in_place(frozen)
        out = recorded(MANY) if trace == "jit" else recorded(MANY, 3, FRAMES, 1)
    assert_same([out], [plain_result(frozen)])
