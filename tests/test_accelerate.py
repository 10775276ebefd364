"""accelerate: what is swapped, what is left alone and why, and that nothing but the speed changes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from attention_cases import BACKENDS_WITH_FLOAT32, device_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from twin_cases import assert_same, results, spread

import vidattn
from vidattn.models.video_swin import (
    BasicLayer,
    PatchMerging,
    SwinTransformer3D,
    SwinTransformerBlock3D,
    WindowAttention3D,
    compute_mask,
)
from vidattn.models.video_swin_windows import fit_window
from vidattn.nn import (
    FusedBasicLayer,
    FusedSwinTransformerBlock3D,
    FusedWindowAttention3D,
    RegionMask,
)
from vidattn.twins import Twin
from vidattn.verify import Verification

backends = pytest.mark.parametrize("backend", BACKENDS_WITH_FLOAT32)
SMALL: dict[str, Any] = {
    "patch_size": (2, 4, 4),
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": (2, 3, 3),
    "patch_norm": True,
    "drop_path_rate": 0.0,
}


def _model(**options: Any) -> SwinTransformer3D:
    return spread(SwinTransformer3D(**{**SMALL, **options}))


def _block(grid_window: tuple[int, int, int] = (2, 3, 3), **options: Any) -> SwinTransformerBlock3D:
    shift = tuple(extent // 2 for extent in grid_window)
    return spread(SwinTransformerBlock3D(16, 2, grid_window, **{"shift_size": shift, **options})).eval()


VIDEO = torch.randn(2, 3, 8, 36, 41)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_computes_the_same(backend: str, dtype: torch.dtype) -> None:
    """Outputs and every gradient; padding, clipping, shifts in each stage; twice in one process, bit for bit."""
    model = _model().to(device_of(backend), dtype).eval()
    video = VIDEO.to(device_of(backend), dtype)
    before = results(model, video)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        acceleration = vidattn.accelerate(model, backend=backend)
        assert [type(module) for module in model.modules() if isinstance(module, Twin)] == [
            FusedBasicLayer, FusedSwinTransformerBlock3D, FusedWindowAttention3D, FusedSwinTransformerBlock3D,
            FusedWindowAttention3D,
        ] * 2  # fmt: skip
        assert len(acceleration.swapped) == 10 and acceleration.skipped == []
        assert list(model.state_dict()) == list(state)
        assert_same(results(model, video), before, 2e-5 if dtype == torch.float32 else 1e-12)
        acceleration.revert()
        assert not any(isinstance(module, Twin) for module in model.modules())
        assert all("attention_backend" not in vars(module) for module in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(results(model, video), before, strict=True))


@backends
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_scale", [None, 0.0, 0.7])
def test_projection_options(backend: str, qkv_bias: bool, qk_scale: float | None) -> None:
    model = _model(qkv_bias=qkv_bias, qk_scale=qk_scale).to(device_of(backend)).eval()
    video = VIDEO.to(device_of(backend))
    before = results(model, video)
    with vidattn.accelerate(model, backend=backend):
        assert_same(results(model, video), before)


@backends
@pytest.mark.parametrize("video", [(1, 3, 1, 5, 5), (2, 3, 4, 30, 14), (1, 3, 9, 24, 24), (1, 3, 3, 13, 50)], ids=str)
def test_any_clip(backend: str, video: tuple[int, ...]) -> None:
    model = _model().to(device_of(backend)).eval()
    clip = torch.randn(video, device=device_of(backend))
    before = results(model, clip)
    with vidattn.accelerate(model, backend=backend):
        assert_same(results(model, clip), before)


def test_context_manager_and_report() -> None:
    model = _model().eval()
    with vidattn.accelerate(model, verify=VIDEO) as acceleration:
        assert isinstance(model.layers[0], FusedBasicLayer)
        assert acceleration.max_difference is not None and 0 <= acceleration.max_difference < 1e-4
    assert type(model.layers[0]) is BasicLayer
    lines = str(acceleration).splitlines()
    assert lines[0] == "accelerate(SwinTransformer3D): 10 swapped, 0 skipped"
    assert "  layers.1.blocks.0.attn  WindowAttention3D -> FusedWindowAttention3D" in lines
    assert lines[-1].startswith("  verified: largest difference of the outputs ")
    assert repr(acceleration) == str(acceleration)
    acceleration.revert()  # once more is no harm


def test_nothing_to_swap() -> None:
    acceleration = vidattn.accelerate(nn.Sequential(nn.Linear(3, 3)), verify=torch.randn(2, 3))
    assert acceleration.swapped == [] and acceleration.skipped == [] and acceleration.max_difference == 0.0
    lines = str(acceleration).splitlines()
    assert lines[0] == "accelerate(Sequential): nothing to swap"
    assert lines[1].startswith("  classes that have a twin: vidattn.models.video_swin.BasicLayer, ")
    assert lines[2:] == ["  no module of the model looks like attention"]


def test_nothing_to_swap_names_what_looks_like_attention() -> None:
    acceleration = vidattn.accelerate(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2))
    assert str(acceleration).splitlines()[2:] == [
        "  looks like attention, but has none: torch.nn.modules.activation.MultiheadAttention"
        " (2, the first is layers.0.self_attn)"
    ]


def test_twice_is_once() -> None:
    model = _model().eval()
    first = vidattn.accelerate(model, backend="reference")
    second = vidattn.accelerate(model)
    assert second.swapped == [] and {row.reason for row in second.skipped} == {"accelerated already"}
    second.revert()
    assert isinstance(model.layers[0], FusedBasicLayer)
    with vidattn.accelerate(model, backend="auto") as third:  # another backend is a change, which reverts as well
        assert len(third.swapped) == 10
        assert model.layers[0].blocks[0].attention_backend == "auto"
    assert model.layers[0].blocks[0].attention_backend == "reference"
    first.revert()
    assert type(model.layers[0]) is BasicLayer


def test_a_root_module_is_swapped_too() -> None:
    block = _block()
    x = torch.randn(1, 3, 5, 7, 16)
    before = block(x, None)
    with vidattn.accelerate(block) as acceleration:
        assert type(block) is FusedSwinTransformerBlock3D
        assert [row.name for row in acceleration.swapped] == ["", "attn"]
        torch.testing.assert_close(block(x, None), before)
    attention = spread(WindowAttention3D(16, (2, 3, 3), 2))
    with vidattn.accelerate(attention):
        assert type(attention) is FusedWindowAttention3D


class _Sub(WindowAttention3D):
    pass


def test_skipped_modules_say_why() -> None:
    model = _model().eval()
    first, second = model.layers[0].blocks
    third, fourth = model.layers[1].blocks
    first.attn.__class__ = _Sub
    second.forward = lambda x, mask: x
    third.attn.relative_position_index.copy_(third.attn.relative_position_index.flip(0))
    fourth.attn.forward = fourth.attn.forward
    before = results(model, VIDEO)
    acceleration = vidattn.accelerate(model, verify=VIDEO)
    reasons = {row.name: row.reason for row in acceleration.skipped}
    assert reasons == {
        "layers.0.blocks.0": "its attn is a _Sub",
        "layers.0.blocks.0.attn": "a subclass of WindowAttention3D, which may differ",
        "layers.0.blocks.1": "the instance overrides forward",
        "layers.1.blocks.0": "its relative_position_index is not the standard one",
        "layers.1.blocks.1": "its attn: the instance overrides forward",
        "layers.1.blocks.1.attn": "the instance overrides forward",
    }
    assert [row.name for row in acceleration.swapped] == [
        "layers.0",
        "layers.0.blocks.1.attn",
        "layers.1",
        "layers.1.blocks.0.attn",
    ]
    assert all(reason in str(acceleration) for reason in reasons.values())
    assert_same(results(model, VIDEO), before)


def test_a_stage_with_one_plain_block_still_gets_its_mask() -> None:
    model = _model().eval()
    before = results(model, VIDEO)
    model.layers[0].blocks[1].forward_part1 = model.layers[0].blocks[1].forward_part1
    with vidattn.accelerate(model):
        assert type(model.layers[0].blocks[1]) is SwinTransformerBlock3D
        assert_same(results(model, VIDEO), before)


def test_backends() -> None:
    model = _model().eval()
    with pytest.raises(ValueError, match="backend 'cuda' cannot run window"):
        vidattn.accelerate(model, backend="cuda")
    for nothing_to_swap in (model, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"accelerate: backend: expected one of auto, cpu, .* got 'gpu'"):
            vidattn.accelerate(nothing_to_swap, backend="gpu")
    assert type(model.layers[0]) is BasicLayer
    with vidattn.accelerate(model), vidattn.use_backend("triton"), pytest.raises(ValueError, match="triton"):
        model(VIDEO)
    with vidattn.accelerate(model, backend="reference"), vidattn.use_backend("triton"):
        model(VIDEO)  # the model's own choice goes first
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got type"):
        vidattn.accelerate(SwinTransformer3D)  # type: ignore[arg-type]


class _Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, scale: float = 1.0) -> dict[str, Any]:
        features = self.model(video) * scale
        return {"features": features, "pooled": [features.mean((2, 3, 4))], "top": features.argmax(1)}


@pytest.mark.parametrize(
    "batch", [VIDEO, (VIDEO, 2.0), [VIDEO], {"video": VIDEO, "scale": 0.5}], ids=["1", "2", "3", "4"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_takes_any_batch(batch: Any, dtype: torch.dtype) -> None:
    model = _Wrapper(_model()).to(dtype).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    cast = torch.utils._pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, batch)
    acceleration = vidattn.accelerate(model, verify=cast)
    assert acceleration.max_difference is not None
    assert [module.training for module in model.modules()] == modes


def test_verify_does_not_ask_for_the_luck_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 run that happens to be exact is not what every correct float32 run has to be."""
    prepare = Verification.__init__

    def lucky(self: Verification, *args: Any) -> None:
        prepare(self, *args)
        self.before = {name: self.exact[name].to(row.dtype) for name, row in self.before.items()}

    monkeypatch.setattr(Verification, "__init__", lucky)
    model = _model()
    with vidattn.accelerate(model, verify=VIDEO, verify_gradients=True) as acceleration:
        assert acceleration.max_difference is not None
    monkeypatch.setattr("vidattn.verify._ROUNDINGS", 0)
    with pytest.raises(RuntimeError, match="accelerate: verify: expected"):
        vidattn.accelerate(model, verify=VIDEO, verify_gradients=True)


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1.001, torch.float32), (math.nan, torch.float32), (1.3, torch.bfloat16)], ids=str
)
def test_verify_catches_a_difference(factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is left as it was. A unit in the last place of bfloat16 is nearly a hundredth."""
    model, video = _model().eval().to(dtype), VIDEO.to(dtype)
    part1 = FusedSwinTransformerBlock3D.forward_part1

    def off(self: Any, x: Tensor, mask: Any) -> Tensor:
        return part1(self, x, mask) * factor

    monkeypatch.setattr(FusedSwinTransformerBlock3D, "forward_part1", off)
    with pytest.raises(RuntimeError, match="accelerate: verify: expected output 0 within"):
        vidattn.accelerate(model, verify=video)
    assert type(model.layers[0]) is BasicLayer
    monkeypatch.undo()
    model(video)


def test_hooks_state_and_modes_survive() -> None:
    model = _model().train()
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (BasicLayer, SwinTransformerBlock3D)):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    acceleration = vidattn.accelerate(model)
    model(VIDEO).sum().backward()
    optimizer.step()
    assert seen == [
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.0",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
        "layers.1",
    ]
    assert model.training and model.eval() is model and not model.layers[0].blocks[0].attn.training
    plain = _model()
    plain.load_state_dict(model.state_dict())
    assert_same([model(VIDEO)], [plain.eval()(VIDEO)])
    for moved in (model.double(), model.float()):
        assert isinstance(moved.layers[0], FusedBasicLayer)
    acceleration.revert()


@pytest.mark.parametrize("watched", ["attn", "attn.softmax", "attn.attn_drop", "attn.qkv", "attn.proj"])
def test_hooks_inside_the_attention_still_fire(watched: str) -> None:
    """Also those on what the fused path has no use for: it gives way to the original."""
    model = _model().eval()
    before = model(VIDEO)
    shapes: list[torch.Size] = []
    module = model.layers[0].blocks[1].get_submodule(watched)
    handle = module.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    model(VIDEO)
    with vidattn.accelerate(model):
        assert_same([model(VIDEO)], [before])
        count = len(shapes)
        handle.remove()
        assert_same([model(VIDEO)], [before])
    assert len(shapes) == count
    if watched in ("attn", "attn.softmax", "attn.attn_drop"):
        assert len(shapes) == 2 and shapes[0] == shapes[1]
    else:
        assert len(shapes) >= 2


@backends
@pytest.mark.parametrize("grid", [(3, 5, 7), (4, 6, 6), (2, 5, 7), (3, 3, 7), (3, 2, 2), (1, 1, 1)], ids=str)
def test_blocks_with_any_mask(backend: str, grid: tuple[int, int, int]) -> None:
    """The standard mask, none, one of the caller's own, and every form of them: always the original's numbers."""
    block = _block().to(device_of(backend))
    x = torch.randn(2, *grid, 16, device=device_of(backend))
    window, shift, padded = fit_window(grid, block.window_size, block.shift_size)
    standard = compute_mask(*padded, window, shift, x.device)
    almost = standard.clone()
    almost[-1, -1, 0] -= 1.0
    own = torch.randn_like(standard)
    masks = [None, standard, standard.clone(), standard.double(), almost, own, torch.zeros_like(standard)]
    masks.append(standard.transpose(1, 2).contiguous().transpose(1, 2))
    before = [results(block, x, mask) for mask in masks]
    with vidattn.accelerate(block, backend=backend):
        for mask, expected in zip(masks, before, strict=True):
            assert_same(results(block, x, mask), expected)
        marker = RegionMask(padded, window, shift)
        assert_same(results(block, x, marker), before[1])
    assert not any(shift) or not torch.allclose(before[0][0], before[1][0]) or not standard.any()


def test_a_mask_that_changes_in_place_is_read_again() -> None:
    block = _block()
    x = torch.randn(1, 3, 5, 7, 16)
    window, shift, padded = fit_window((3, 5, 7), block.window_size, block.shift_size)
    mask = compute_mask(*padded, window, shift, x.device).clone()
    expected = block(x, mask)
    halved = block(x, mask / 2)
    with vidattn.accelerate(block):
        for factor, right in ((1.0, expected), (0.5, halved), (2.0, expected)):
            mask.data.mul_(factor)  # not counted by PyTorch
            torch.testing.assert_close(block(x, mask), right)


def test_masks_of_unusual_kinds() -> None:
    """Made in inference mode, or learned: computed as they are."""
    block = _block()
    x = torch.randn(1, 3, 5, 7, 16)
    window, shift, padded = fit_window((3, 5, 7), block.window_size, block.shift_size)
    with torch.inference_mode():
        inferred = compute_mask(*padded, window, shift, x.device).clone()
        expected = block(x, inferred)
    learned = torch.randn_like(compute_mask(*padded, window, shift, x.device)).requires_grad_()
    (grad,) = torch.autograd.grad(block(x, learned).square().sum(), learned)
    with vidattn.accelerate(block):
        with torch.inference_mode():
            torch.testing.assert_close(block(x, inferred), expected)
        (fused_grad,) = torch.autograd.grad(block(x, learned).square().sum(), learned)
        torch.testing.assert_close(fused_grad, grad)
        with pytest.raises(ValueError, match="mask"):
            block(x, inferred[:, :-1])


def test_a_marker_of_another_geometry_is_built() -> None:
    """A block whose shift is not its stage's receives the stage's mask, as the original does."""
    model = _model().eval()
    model.layers[0].blocks[1].shift_size = (1, 0, 2)
    before = results(model, VIDEO)
    with vidattn.accelerate(model):
        assert_same(results(model, VIDEO), before)


@backends
def test_attention_module(backend: str) -> None:
    """Whole and short windows, with and without masks, and a mask of another dtype."""
    attention = spread(WindowAttention3D(16, (2, 3, 3), 2, qkv_bias=True)).to(device_of(backend)).eval()
    for tokens in (18, 11, 1):
        x = torch.randn(6, tokens, 16, device=device_of(backend))[:, None].squeeze(1)
        for mask in (
            None,
            torch.randn(3, tokens, tokens, device=x.device),
            torch.zeros(2, tokens, tokens, device=x.device),
        ):
            expected = attention(x, mask)
            with vidattn.accelerate(attention, backend=backend):
                torch.testing.assert_close(attention(x, mask), expected)
    with vidattn.accelerate(attention), pytest.raises(ValueError, match="19 tokens"):
        attention(torch.randn(6, 19, 16, device=device_of(backend)))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(backend: str, dtype: torch.dtype) -> None:
    """Pure half precision and autocast work in shifted blocks, and are as near to float64 as the original is."""
    device = device_of(backend)
    exact_model = _model().to(device).double().eval()
    exact = exact_model(VIDEO.to(device).double())
    model = copy.deepcopy(exact_model).float()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.float32):
        model = model.to(dtype)
        plain = model(VIDEO.to(device, dtype))
        with vidattn.accelerate(model, backend=backend):
            fused = model(VIDEO.to(device, dtype))
    assert fused.dtype == plain.dtype
    allowed = 2 * (plain.double() - exact).abs().max() + 4 * torch.finfo(fused.dtype).eps * exact.abs().max()
    assert (fused.double() - exact).abs().max() <= allowed
    trained = copy.deepcopy(exact_model).to(dtype).train()
    with vidattn.accelerate(trained, backend=backend):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.float32):
            loss = trained(VIDEO.to(device, dtype)).float().square().mean()
        loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in trained.parameters())


@backends
def test_dropout_and_stochastic_depth(backend: str) -> None:
    """Off in eval mode, on in training, and repeated by activation checkpointing."""
    options = {"attn_drop_rate": 0.3, "drop_rate": 0.2, "drop_path_rate": 0.3}
    model = _model(**options).to(device_of(backend))
    video = VIDEO.to(device_of(backend))
    plain = model.eval()(video)
    with vidattn.accelerate(model, backend=backend):
        assert_same([model(video)], [plain])
        model.train()
        outs = [model(video) for _ in range(2)]
        assert not torch.equal(*outs)
    checkpointed = _model(**options, use_checkpoint=True).to(device_of(backend))
    checkpointed.load_state_dict(model.state_dict())
    both = []
    for each in (model, checkpointed):
        with vidattn.accelerate(each, backend=backend):
            both.append(results(each.train(), video))
    assert_same(both[1], both[0])


def test_attention_dropout_alone_is_active() -> None:
    block = _block(attn_drop=0.5)
    x = torch.randn(1, 3, 5, 7, 16)
    with vidattn.accelerate(block):
        assert torch.equal(block(x, None), block(x, None))
        block.attn.attn_drop.train()  # the dropout's own mode counts, as in the original
        assert not torch.equal(block(x, None), block(x, None))
        block.attn.attn_drop.p = 1.0  # everything dropped: the original's business
        assert torch.isfinite(block(x, None)).all()


class _LowRank(nn.Module):
    """A projection with an added low-rank path, as fine-tuning libraries insert."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def test_a_replaced_projection_pads_with_its_own_zero() -> None:
    block = _block()
    block.attn.qkv = _LowRank(block.attn.qkv)  # type: ignore[assignment]
    x = torch.randn(1, 3, 5, 7, 16)
    before = results(block, x, None)
    with vidattn.accelerate(block):
        assert_same(results(block, x, None), before)


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_copies_and_pickles(accelerated_first: bool) -> None:
    model = _model().eval()
    before = model(VIDEO)
    acceleration = vidattn.accelerate(model, backend="reference")
    if not accelerated_first:
        model(VIDEO)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.layers[0], FusedBasicLayer)
        assert other.layers[0].blocks[0].attention_backend == "reference"
        assert_same([other(VIDEO)], [before])
    copied = copy.deepcopy(model)
    acceleration.revert()
    assert isinstance(copied.layers[0], FusedBasicLayer) and type(model.layers[0]) is BasicLayer


def test_twins_are_modules_of_their_own() -> None:
    """They have the original's constructor and load its state."""
    plain, fused = (
        WindowAttention3D(16, (2, 3, 3), 2, qkv_bias=True),
        FusedWindowAttention3D(16, (2, 3, 3), 2, qkv_bias=True),
    )
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(4, 18, 16)
    torch.testing.assert_close(fused(x), plain(x))
    stage = FusedBasicLayer(16, 2, 2, (2, 3, 3), downsample=PatchMerging)
    assert stage(torch.randn(1, 16, 3, 5, 7)).shape == (1, 32, 3, 3, 4)  # its blocks are plain: they get a real mask


@backends
def test_compile_of_an_accelerated_model(backend: str) -> None:
    """One graph each for two sizes, forward and backward; the third size compiles nothing."""
    torch._dynamo.reset()
    model = _model().to(device_of(backend)).train()
    counter = CompileCounter()
    with vidattn.accelerate(model, backend=backend):
        counted = torch.compile(model, fullgraph=True, backend=counter)
        for clip in ((1, 3, 8, 36, 44), (2, 3, 12, 52, 60), (3, 3, 10, 44, 68)):
            video = torch.randn(clip, device=device_of(backend))
            assert_same(results(counted, video), results(model, video))
    assert counter.frame_count == 2


@backends
def test_inductor_on_an_accelerated_model(backend: str) -> None:
    torch._dynamo.reset()
    model = _model(depths=(2,), num_heads=(2,)).to(device_of(backend)).train()
    video = torch.randn(1, 3, 8, 36, 44, device=device_of(backend))
    with vidattn.accelerate(model, backend=backend):
        assert_same(results(torch.compile(model, fullgraph=True), video), results(model, video))


def test_compile_follows_accelerate_and_revert() -> None:
    """A compiled model notices that its modules' classes change."""
    torch._dynamo.reset()
    model = _model().eval()
    compiled = torch.compile(model, backend="eager")
    before = compiled(VIDEO)
    with vidattn.accelerate(model):
        with vidattn.use_backend("triton"), pytest.raises(Exception, match="triton"):
            compiled(VIDEO)
        assert_same([compiled(VIDEO)], [before])
    assert_same([compiled(VIDEO)], [before])


def test_no_mask_is_built() -> None:
    """All blocks fused: nothing of size (windows, N, N) exists any more."""
    model = _model().eval()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == x.shape[-2] == 18:
                    largest = max(largest, x.numel())
            return out

    from vidattn.models import video_swin_windows

    video_swin_windows._mask_cache.clear()
    with torch.no_grad():
        with vidattn.accelerate(model), Watch():
            model(VIDEO)
        assert largest == 0 and not video_swin_windows._mask_cache
        with Watch():
            model(VIDEO)
        assert largest > 0


def test_flops_of_an_accelerated_model_on_meta() -> None:
    """The ops' formulas count what the original's matrix products count (no padding here, so nothing is saved)."""
    with torch.device("meta"):
        model = SwinTransformer3D(**SMALL).eval()
        video = torch.randn(1, 3, 8, 48, 48)
    counts = []
    for run in (lambda: model(video), lambda: model(video)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
        acceleration = vidattn.accelerate(model)
    assert len(acceleration.skipped) == 10
    assert counts[0] == counts[1] > 0
