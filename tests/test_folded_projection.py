"""In inference a block of TimeSformer folds two linear layers into one: never visibly, and never a stale one."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from twin_cases import assert_same, results, spread

import vidattn
from vidattn.models.timesformer import Block
from vidattn.nn.timesformer import FusedBlock, _folded

X = torch.randn(2, 1 + 4 * 6, 24)
BLOCK = (2, 4, 1)


def make_block() -> Block:
    return spread(Block(24, 2, qkv_bias=True, drop_path=0.2)).eval()


@pytest.fixture
def block() -> Iterator[Block]:
    """An accelerated block."""
    plain = make_block()
    vidattn.accelerate(plain)
    yield plain
    _folded.clear()


@torch.no_grad()
def infer(block: Block, x: Tensor = X) -> Tensor:
    return block(x, *BLOCK)


def plain_result(block: Block, x: Tensor = X) -> Tensor:
    """What the original computes with the parameters as they are now."""
    other = copy.deepcopy(block)
    other.__class__ = Block
    for attention in (other.attn, other.temporal_attn):
        attention.__class__ = type(make_block().attn)
    return infer(other, x)


def assert_folded(block: Block) -> None:
    """The parts are not called, and the result is the original's."""
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    out = infer(block)
    handle.remove()
    assert called.count("Linear") == 5  # qkv twice, proj once, the MLP's two
    assert block in _folded
    assert_same([out], [plain_result(block)])


def add_in_place(block: Block) -> None:
    with torch.no_grad():
        block.temporal_fc.weight.add_(0.1)


def replace_parameter(block: Block) -> None:
    block.temporal_attn.proj.bias = nn.Parameter(torch.randn(24))


def replace_data(block: Block) -> None:
    block.temporal_attn.proj.weight.data = torch.randn(24, 24)


def load_state(block: Block) -> None:
    block.load_state_dict(make_block().state_dict())


def step(block: Block) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    block(X, *BLOCK).sum().backward()
    optimizer.step()


def average_in_eval_mode(block: Block) -> None:
    """Averages of weights are kept like this; PyTorch does not count it."""
    for parameter in block.parameters():
        parameter.data.mul_(0.9).add_(torch.randn_like(parameter), alpha=0.1)
    block.eval()


def replace_layer(block: Block) -> None:
    block.temporal_fc = nn.Linear(24, 24)


CHANGES: list[Callable[[Block], None]] = [
    add_in_place, replace_parameter, replace_data, load_state, step, average_in_eval_mode, replace_layer
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(block: Block, change: Callable[[Block], None]) -> None:
    assert_folded(block)
    before = infer(block)
    change(block)
    assert_folded(block)
    assert not torch.allclose(infer(block), before)


def test_it_is_made_once(block: Block) -> None:
    infer(block)
    first = _folded[block]
    infer(block)
    with torch.inference_mode():
        block(X, *BLOCK)
    assert _folded[block] is first
    add_in_place(block)
    infer(block)
    assert _folded[block] is not first


def test_memory_that_is_used_again_is_noticed(block: Block) -> None:
    """Averages of weights assign new tensors in turn, which soon lie where older ones lay."""
    weight = block.temporal_fc.weight
    for _ in range(20):
        weight.data = weight.data * 0.9 + 0.1 * torch.randn(24, 24)
        assert_same([infer(block)], [plain_result(block)])


def test_dtypes_and_moves(block: Block) -> None:
    infer(block)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        x = X.to(dtype)
        block.to(dtype)
        out = infer(block, x)
        assert out.dtype == dtype and _folded[block].weight.dtype == dtype
        if dtype != torch.bfloat16:
            assert_same([out], [plain_result(block, x)], 2e-5 if dtype == torch.float32 else 1e-12)
    block.temporal_fc.double()  # one of them alone: the original's error
    with pytest.raises(RuntimeError, match="dtype"):
        infer(block)


def test_it_is_as_exact_as_two_layers(block: Block) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        exact = plain_result(copy.deepcopy(block).double(), X.double())
        block.to(dtype)
        fused, plain = infer(block, X.to(dtype)), plain_result(block, X.to(dtype))
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (fused.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


def test_gradients_and_drawn_numbers_take_both_layers(block: Block) -> None:
    infer(block)
    _folded.clear()
    assert len(results(block, X, *BLOCK)) == 2 + len(list(block.parameters()))
    assert block not in _folded
    with torch.no_grad():
        block.drop_path.train()
        block(X, *BLOCK)
        assert block not in _folded
        block.drop_path.eval()
        block.temporal_attn.proj_drop.p = 0.1
        block.temporal_attn.proj_drop.train()
        block(X, *BLOCK)
    assert block not in _folded


class _LowRank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def test_other_layers_are_called(block: Block) -> None:
    """A layer of another kind, an instance's own method, parameters without a version, tied to a parametrization."""
    adapted = copy.deepcopy(block)
    adapted.temporal_fc.__class__ = _LowRank
    overridden = copy.deepcopy(block)
    overridden.temporal_attn.proj.forward = lambda x: 2 * x
    with torch.inference_mode():
        inferred = spread(Block(24, 2, drop_path=0.0)).eval()
    vidattn.accelerate(inferred)
    halved = copy.deepcopy(block)
    nn.utils.parametrize.register_parametrization(halved.temporal_fc, "weight", nn.Hardtanh(-0.1, 0.1))
    for other in (adapted, overridden, inferred, halved):
        with torch.inference_mode():
            out = other(X, *BLOCK)
        assert other not in _folded
        if other is not inferred:
            assert_same([out], [plain_result(other)])
            assert not torch.allclose(out, infer(block))


def test_copies_pickles_and_states_hold_nothing_of_it(block: Block) -> None:
    size, names = len(pickle.dumps(block)), list(block.state_dict())
    infer(block)
    assert block in _folded and len(pickle.dumps(block)) == size and list(block.state_dict()) == names
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is FusedBlock and other not in _folded
        add_in_place(other)
        assert_folded(other)
    count = len(_folded)
    del other
    gc.collect()
    assert len(_folded) < count


class _WithFixedShape(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, *BLOCK)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", ["compile", "jit", "export"])
def test_what_is_recorded_follows_the_parameters(block: Block, trace: str) -> None:
    infer(block)
    with torch.no_grad():
        if trace == "compile":
            torch._dynamo.reset()
            recorded: Callable[..., Tensor] = torch.compile(block, fullgraph=True, backend="eager")
            recorded(X, *BLOCK)
        elif trace == "jit":
            recorded = torch.jit.trace(_WithFixedShape(block), X)
        else:
            recorded = torch.export.export(block, (X, *BLOCK)).module()
        add_in_place(block)
        out = recorded(X) if trace == "jit" else recorded(X, *BLOCK)
    assert_same([out], [plain_result(block)])
