"""The twins of TimeSformer and ViViT: equal to the originals in outputs, gradients and random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import device_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from twin_cases import CalledOps, assert_same, results, spread

import vidattn
import vidattn.backends
from vidattn.models import create_model, timesformer
from vidattn.models.timesformer import Attention, Block
from vidattn.models.vivit import MultiHeadDotProductAttention
from vidattn.nn import FusedAttention, FusedBlock, FusedMultiHeadDotProductAttention
from vidattn.nn.parts import SDPA_TOKENS
from vidattn.twins import Twin

BACKENDS = [name for name in vidattn.list_backends() if not vidattn.why_not("spatial_attention", backend=name)]
BACKENDS_WITH_FLOAT64 = [name for name in BACKENDS if name != "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)

TIMESFORMER: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "num_frames": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "drop_path_rate": 0.0,
}
VIVIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 48,
    "num_classes": 5,
    "patches": (8, 8, 2),
    "num_frames": 8,
    "image_size": 32,
}
ATTENTION_TYPES = ("divided_space_time", "joint_space_time", "space_only")
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: timesformer.TimeSformer(**TIMESFORMER, attention_type=kind) for kind in ATTENTION_TYPES},
    **{
        name: lambda name=name: create_model(name, **VIVIT)
        for name in ("vivit_b_joint", "vivit_b_factorized_encoder", "vivit_b_factorized_dot_product")
    },
    **{
        order: lambda order=order: create_model("vivit_b_factorized_self_attention", **VIVIT, attention_order=order)
        for order in ("time_space", "space_time")
    },
}
models = pytest.mark.parametrize("name", MODELS)


def video_for(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4 if name in ATTENTION_TYPES else 8, 32, 32)


def make_model(name: str) -> nn.Module:
    return spread(MODELS[name]()).eval()


def make_block(**options: Any) -> Block:
    return spread(Block(**{"dim": 24, "num_heads": 2, "qkv_bias": True, "drop_path": 0.0, **options})).eval()


def tokens(batch: int = 2, frames: int = 4, sites: int = 6, dim: int = 24) -> Tensor:
    return torch.randn(batch, 1 + frames * sites, dim)


# Models


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, torch.float32) for name in BACKENDS] + [(name, torch.float64) for name in BACKENDS_WITH_FLOAT64],
)
@models
def test_a_model_computes_the_same(name: str, dtype: torch.dtype, backend: str) -> None:
    """Outputs and every gradient, twice; the state dict stays, and after revert() every bit is as before."""
    model = make_model(name).to(device_of(backend), dtype)
    video = video_for(name).to(device_of(backend), dtype)
    before = results(model, video)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        acceleration = vidattn.accelerate(model, backend=backend)
        assert acceleration.skipped == []
        twins = [FusedBlock, FusedAttention, *[FusedAttention] * (name == "divided_space_time")] * 2
        if name.startswith("vivit"):
            twins = [FusedMultiHeadDotProductAttention] * (6 if name.endswith("encoder") else 2)
        elif name not in ATTENTION_TYPES:
            twins = [FusedMultiHeadDotProductAttention] * 4
        assert [type(module) for module in model.modules() if isinstance(module, Twin)] == twins
        with CalledOps() as called:
            assert_same(results(model, video), before, 2e-5 if dtype == torch.float32 else 1e-12)
        assert "vidattn::divided_attention" in called.names and "aten::_softmax" not in called.names
        assert list(model.state_dict()) == list(state)
        acceleration.revert()
        assert not any(isinstance(module, Twin) for module in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(results(model, video), before, strict=True))


@models
def test_verify(name: str) -> None:
    acceleration = vidattn.accelerate(make_model(name), verify=video_for(name))
    assert acceleration.max_difference is not None and acceleration.swapped


@pytest.mark.parametrize("size", [(1, 24, 40), (6, 32, 32), (3, 16, 64)], ids=str)
def test_clips_of_other_sizes(size: tuple[int, int, int]) -> None:
    model = make_model("divided_space_time")
    video = torch.randn(2, 3, *size)
    before = results(model, video)
    with vidattn.accelerate(model):
        assert_same(results(model, video), before)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["divided_space_time", "time_space", "vivit_b_factorized_dot_product"])
def test_low_precision_and_autocast(name: str, dtype: torch.dtype, backend: str) -> None:
    """As near to float64 as the original is, with the folded projections too; float32 stands for autocast here."""
    device = device_of(backend)
    exact_model = make_model(name).to(device).double()
    video = video_for(name).to(device)
    with torch.no_grad():
        exact = exact_model(video.double())
    model = copy.deepcopy(exact_model).to(dtype)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.float32)
    with autocast, torch.no_grad():
        plain = model(video.to(dtype))
    with vidattn.accelerate(model, backend=backend), autocast:
        with torch.no_grad():
            fused = [model(video.to(dtype))]
        fused.append(model(video.to(dtype)))
    allowed = 2 * (plain.double() - exact).abs().max() + 4 * torch.finfo(plain.dtype).eps * exact.abs().max()
    for out in fused:
        assert out.dtype == plain.dtype
        assert (out.double() - exact).abs().max() <= allowed
    with vidattn.accelerate(model.train(), backend=backend):
        with autocast:
            loss = model(video.to(dtype)).float().square().mean()
        loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


# Blocks and attentions


@backends
@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 1, 9), (3, 7, 1), (2, 33, 2), (1, 1, 1), (2, 2, 35)], ids=str)
def test_divided_blocks(shape: tuple[int, int, int], backend: str) -> None:
    batch, frames, sites = shape
    block = make_block().to(device_of(backend))
    x = tokens(batch, frames, sites).to(device_of(backend))
    before = results(block, x, batch, frames, 1)
    with vidattn.accelerate(block, backend=backend) as acceleration:
        assert [row.name for row in acceleration.swapped] == ["", "attn", "temporal_attn"]
        assert_same(results(block, x, batch, frames, 1), before)
        with torch.no_grad():
            assert_same([block(x, batch, frames, 1)], before[:1])


@backends
@pytest.mark.parametrize("qk_scale", [None, 0.0, 0.7, -0.3])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_projection_options(qkv_bias: bool, qk_scale: float | None, backend: str) -> None:
    block = make_block(qkv_bias=qkv_bias, qk_scale=qk_scale, num_heads=3).to(device_of(backend))
    x = tokens().to(device_of(backend))
    before = results(block, x, 2, 4, 1)
    with vidattn.accelerate(block, backend=backend):
        assert_same(results(block, x, 2, 4, 1), before)


def test_a_cls_token_alone_and_wrong_shapes() -> None:
    block = make_block()
    cls_token, x = tokens(2, 4, 0), tokens(2, 4, 6)
    before = block(cls_token, 2, 4, 1)
    with vidattn.accelerate(block):
        assert_same([block(cls_token, 2, 4, 1)], [before])
        for batch, frames in ((2, 5), (1, 4), (2, 0)):
            with pytest.raises(ValueError, match=f"for B={batch} and T={frames}"):
                block(x, batch, frames, 1)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("with_qkv", [True, False])
@pytest.mark.parametrize("length", [1, 7, SDPA_TOKENS, SDPA_TOKENS + 1])
def test_attention_of_whole_sequences(
    length: int, with_qkv: bool, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a kernel PyTorch's attention takes long ones, unless a backend is named or there is dropout."""
    if not built:
        monkeypatch.setitem(vidattn.backends._kernel_missing, ("spatial_attention", "cpu"), lambda: "not built")
    has_kernel = not vidattn.why_not("spatial_attention", backend="cpu")
    attention = spread(Attention(24, 2, qkv_bias=True, qk_scale=0.4, with_qkv=with_qkv))
    x = torch.randn(2, length, 24) * 0.3
    before = results(attention, x)
    for backend in (None, "auto", "reference"):
        with vidattn.accelerate(attention, backend=backend), CalledOps() as called:
            assert_same(results(attention, x), before)
        ours = length <= SDPA_TOKENS or backend == "reference" or has_kernel
        assert ("vidattn::divided_attention" in called.names) == ours
    attention.attn_drop.p = 0.5
    with vidattn.accelerate(attention.train()), CalledOps() as called:
        attention(x)
    assert "vidattn::divided_attention" in called.names


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)], ids=str)
def test_joint_attention_of_vivit(shape: tuple[int, ...]) -> None:
    attention = spread(MultiHeadDotProductAttention(24, 3))
    x = torch.randn(*shape, 24)
    before = results(attention, x)
    with vidattn.accelerate(attention):
        assert type(attention) is FusedMultiHeadDotProductAttention
        assert_same(results(attention, x), before)


@backends
@pytest.mark.parametrize("shape", [(2, 4, 9), (1, 1, 5), (2, 7, 1)], ids=str)
@pytest.mark.parametrize("attention", ["time", "space", "factorized"])
def test_frames_of_vivit(attention: str, shape: tuple[int, int, int], backend: str) -> None:
    module = spread(MultiHeadDotProductAttention(24, 4, attention, qkv_bias=False)).to(device_of(backend))
    x = torch.randn(*shape, 24, device=device_of(backend))
    before = results(module, x)
    strided = torch.randn(*shape, 48, device=device_of(backend))[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    expected = module(strided)
    with vidattn.accelerate(module, backend=backend):
        assert_same(results(module, x), before)
        assert_same([module(strided)], [expected])
        with pytest.raises(ValueError, match=r"x must be \(batch, frames, tokens, channels\)"):
            module(x[0])


# Random numbers


@backends
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_training_draws_the_same_numbers(drop: float, drop_path: float, backend: str) -> None:
    """Stochastic depth and dropout drop what the original drops, from the same seed, and leave the same state."""
    device = device_of(backend)
    block = make_block(drop=drop, drop_path=drop_path).to(device).train()
    x = tokens(3, 5, 7).to(device)
    before = [results(block, x, 3, 5, 1, seed=seed) for seed in range(4)]
    following = torch.rand(1)
    if drop or drop_path:
        assert not torch.allclose(before[0][0], before[1][0])
    with vidattn.accelerate(block, backend=backend), CalledOps() as called:
        for seed, expected in enumerate(before):
            assert_same(results(block, x, 3, 5, 1, seed=seed), expected)
        assert torch.equal(torch.rand(1), following)
        with torch.no_grad():  # without a gradient too nothing may be folded
            torch.manual_seed(1)
            assert_same([block(x, 3, 5, 1)], before[1][:1])
    assert "vidattn::divided_attention" in called.names


@pytest.mark.parametrize("part", ["drop_path", "temporal_attn.proj_drop", "attn.proj_drop"])
def test_each_random_part_by_itself(part: str) -> None:
    """Their own mode counts, in a block in eval mode too."""
    block = make_block(drop=0.4, drop_path=0.4)
    block.get_submodule(part).train()
    x = tokens(3, 5, 7)
    before = [results(block, x, 3, 5, 1, seed=seed) for seed in (0, 1)]
    assert not torch.allclose(before[0][0], before[1][0])
    with vidattn.accelerate(block):
        for seed, expected in enumerate(before):
            assert_same(results(block, x, 3, 5, 1, seed=seed), expected)
            with torch.no_grad():
                torch.manual_seed(seed)
                assert_same([block(x, 3, 5, 1)], expected[:1])


def test_a_model_trains_the_same() -> None:
    """Ten steps with stochastic depth."""
    losses = []
    options = {**TIMESFORMER, "drop_path_rate": 0.3, "drop_rate": 0.1}
    torch.manual_seed(3)
    initial = timesformer.TimeSformer(**options)
    video, labels = video_for("divided_space_time", 4), torch.arange(4)
    for accelerated in (False, True):
        model = copy.deepcopy(initial).train()
        if accelerated:
            vidattn.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(4)
        losses.append([])
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(video), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]


@backends
def test_attention_dropout(backend: str) -> None:
    device = device_of(backend)
    modules: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (make_block(attn_drop=0.5), (tokens(), 2, 4, 1)),
        (spread(Attention(24, 2, attn_drop=0.5)), (tokens(),)),
        *(
            (spread(MultiHeadDotProductAttention(24, 2, kind, dropout_rate=0.5)), (torch.randn(2, 3, 5, 24),))
            for kind in ("joint", "time", "space", "factorized")
        ),
    ]
    for module, (x, *rest) in modules:
        module.to(device).eval()
        x = x.to(device)
        before = module(x, *rest)
        with vidattn.accelerate(module, backend=backend):
            assert_same([module(x, *rest)], [before])
            module.train()
            first, second, third = (results(module, x, *rest, seed=seed)[0] for seed in (0, 0, 1))
            assert torch.equal(first, second) and not torch.equal(first, third) and not torch.equal(first, before)
            with torch.no_grad():
                mean = torch.stack([module(x, *rest) for _ in range(400)]).mean(0)
            if not isinstance(module, Block):  # a block is not linear in the context
                assert (mean - before).abs().mean() < 0.2 * (first - before).abs().mean()


@pytest.mark.parametrize("dropped", ["temporal_attn", "attn"])
def test_each_attention_of_a_block_drops(dropped: str) -> None:
    block = make_block().train()
    block.get_submodule(dropped).attn_drop.p = 0.5
    with vidattn.accelerate(block), CalledOps() as called:
        first, second = (results(block, tokens(), 2, 4, 1, seed=seed)[0] for seed in (0, 1))
    assert not torch.allclose(first, second) and "aten::_softmax" not in called.names


def test_dropping_everything_is_the_originals_business() -> None:
    block = make_block(attn_drop=1.0).train()
    attention = spread(MultiHeadDotProductAttention(24, 2, "time", dropout_rate=1.0)).train()
    for module, inputs in ((block, (tokens(), 2, 4, 1)), (attention, (torch.randn(2, 3, 5, 24),))):
        before = results(module, *inputs)
        with vidattn.accelerate(module):
            assert all(torch.equal(a, b) for a, b in zip(results(module, *inputs), before, strict=True))


# What somebody watches or has replaced


@pytest.mark.parametrize(
    "watched",
    [
        *(f"{name}{part}" for name in ("attn", "temporal_attn") for part in ("", ".qkv", ".proj", ".proj_drop")),
        *("attn.attn_drop", "temporal_attn.attn_drop", "temporal_norm1", "norm1", "drop_path", "temporal_fc", "mlp"),
    ],
)
def test_hooks_see_what_they_saw(watched: str) -> None:
    block = make_block(drop_path=0.2)
    x = tokens()
    seen: list[Tensor] = []
    handle = block.get_submodule(watched).register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        before = block(x, 2, 4, 1)
        expected = list(seen)
        seen.clear()
        with vidattn.accelerate(block):
            assert_same([block(x, 2, 4, 1)], [before])
            assert_same(seen, expected)
            handle.remove()
            with CalledOps() as called:
                assert_same([block(x, 2, 4, 1)], [before])
    assert len(seen) == len(expected) > 0
    assert "aten::_softmax" not in called.names


class _Sub(Attention):
    pass


class _OverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


def test_skipped_blocks_say_why() -> None:
    blocks = nn.ModuleList([make_block() for _ in range(6)])
    blocks[0].attn.__class__ = _Sub
    blocks[1].temporal_attn.forward = blocks[1].temporal_attn.forward
    blocks[2].norm1 = _OverTokens()
    blocks[3].temporal_norm1 = nn.LayerNorm((25, 24))
    blocks[4].attn = Attention(24, 2, with_qkv=False)
    acceleration = vidattn.accelerate(blocks)
    assert {row.name: row.reason for row in acceleration.skipped} == {
        "0": "its attn is a _Sub",
        "0.attn": "a subclass of Attention, which may differ",
        "1": "its temporal_attn: the instance overrides forward",
        "1.temporal_attn": "the instance overrides forward",
        "2": "its norm1 is a _OverTokens, which may look at several tokens",
        "3": "its temporal_norm1 is a LayerNorm, which may look at several tokens",
        "4": "its attn has no projections",
    }
    assert type(blocks[5]) is FusedBlock


def test_unknown_parts_are_called_as_before() -> None:
    x = tokens()
    for part in ("drop_path", "attn.proj_drop", "temporal_attn.attn_drop"):
        block = make_block()
        owner, _, name = part.rpartition(".")
        setattr(block.get_submodule(owner), name, nn.Tanh())
        before = results(block, x, 2, 4, 1)
        with vidattn.accelerate(block):
            assert type(block) is FusedBlock
            assert_same(results(block, x, 2, 4, 1), before)


# Compilers


@backends
@pytest.mark.parametrize("name", ["divided_space_time", "joint_space_time", "time_space", "vivit_b_factorized_encoder"])
def test_compile_of_an_accelerated_model(name: str, backend: str) -> None:
    """One graph, forward and backward; another batch size makes one more, a third none."""
    torch._dynamo.reset()
    model = make_model(name).to(device_of(backend)).train()
    counter = CompileCounter()
    with vidattn.accelerate(model, backend=backend):
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for batch in (2, 3, 5):
            video = video_for(name, batch).to(device_of(backend))
            assert_same(results(compiled, video), results(model, video))
    assert counter.frame_count == 2


def test_compile_draws_and_infers() -> None:
    torch._dynamo.reset()
    block = make_block(drop=0.2, drop_path=0.3).train()
    x = tokens()
    with vidattn.accelerate(block):
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert_same(results(compiled, x, 2, 4, 1), results(block, x, 2, 4, 1))
        with torch.no_grad():
            assert_same([compiled.eval()(x, 2, 4, 1)], [block.eval()(x, 2, 4, 1)])


@backends
def test_inductor_on_an_accelerated_block(backend: str) -> None:
    torch._dynamo.reset()
    block = make_block(drop_path=0.2).to(device_of(backend))
    x = tokens().to(device_of(backend))
    with vidattn.accelerate(block, backend=backend):
        compiled = torch.compile(block, fullgraph=True)
        assert_same(results(compiled, x, 2, 4, 1), results(block, x, 2, 4, 1))


@pytest.mark.parametrize("name", ["divided_space_time", "vivit_b_factorized_dot_product"])
def test_export_holds_no_folded_weights(name: str) -> None:
    """What is exported follows its parameters."""
    model = make_model(name)
    video = video_for(name)
    with vidattn.accelerate(model), torch.no_grad():
        expected = model(video)
        program = torch.export.export(model, (video,))
        assert program.state_dict.keys() == model.state_dict().keys()
        assert not program.constants
        assert_same([program.module()(video)], [expected])


# Cost


def test_nothing_is_copied_or_put_in_order() -> None:
    block = make_block()
    x = tokens(1)
    copies = {"aten::clone", "aten::copy_", "aten::repeat", "aten::bmm", "aten::_softmax", "aten::_to_copy"}
    with torch.no_grad():
        with CalledOps() as called:
            block(x, 1, 4, 1)
        assert called.names & copies
        with vidattn.accelerate(block):
            block(x, 1, 4, 1)  # the first time two layers are folded
            with CalledOps() as called:
                block(x, 1, 4, 1)
    assert not called.names & copies
    attention = spread(MultiHeadDotProductAttention(24, 2, "factorized"))
    with vidattn.accelerate(attention), torch.no_grad(), CalledOps() as called:
        attention(torch.randn(2, 3, 5, 24))
    assert not called.names & (copies | {"aten::cat"})


def test_flops_on_meta() -> None:
    """The cls token is projected once and not once a frame; everything else costs what it did."""
    with torch.device("meta"):
        model = timesformer.TimeSformer(**TIMESFORMER).eval()
        video = torch.randn(2, 3, 4, 32, 32)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(video)
        counts.append(counter.get_total_flops())
        vidattn.accelerate(model)
    batch, frames, depth, width = 2, 4, 2, 24
    assert counts[0] - counts[1] == depth * batch * (frames - 1) * 2 * 4 * width**2
