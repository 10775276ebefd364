"""MONAI's SwinUNETR with its blocks and stages swapped."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchvision_swin  # noqa: F401  (before monai, which imports torchvision)
from integration_cases import Integration, Target, assert_as_before, run
from monai.networks.nets import swin_unetr
from torch import nn

import vidattn
from vidattn.integrations.monai import FusedBasicLayer


def unetr(**options: Any) -> nn.Module:
    """Shrunken, with smooth activations: the slope of a leaky ReLU at zero is anybody's guess in float32."""
    model = swin_unetr.SwinUNETR(**{"in_channels": 1, "out_channels": 2, "spatial_dims": 2, **options})
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.GELU())
    return model


def encoder(window: tuple[int, ...] = (3, 4, 5), heads: int = 3, **options: Any) -> nn.Module:
    """SwinUNETR's Swin transformer, whose four stages all attend."""
    patch = (2,) * len(window)
    return swin_unetr.SwinTransformer(
        1, 12, window, patch, (2, 1, 1, 1), (heads,) * 4, spatial_dims=len(window), **{"drop_path_rate": 0.2, **options}
    )


def volume(name: str, *shape: int) -> dict[str, Any]:
    return {name: torch.randn(1, 1, *shape)}


_target = partial(Target, "monai", attention=("WindowAttention",), integration="monai")
TARGETS = [
    _target(
        "SwinUNETR in 2D",
        partial(unetr, feature_size=12, depths=(2, 2, 1, 1), num_heads=(3, 3, 3, 3), use_v2=True),
        partial(volume, "x_in", 64, 96),  # 32 x 48 tokens, then half each time, under a window of 7
        compiles=False,  # not as one graph: a check of the size depends on data
    ),
    _target(
        "SwinUNETR's transformer in 3D",
        encoder,
        partial(volume, "x", 16, 22, 34),  # 8 x 11 x 17 tokens, then half each time: padded, shifted, clipped
    ),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


def compared(build: partial[nn.Module], shape: tuple[int, ...], *, train: bool = False, grad: bool = True) -> Any:
    """Run a model before and after; return what ran."""
    target = TARGETS[1]._replace(build=build, inputs=partial(volume, "x", *shape))
    plain, fast = (target.make(torch.float64).train(train) for _ in range(2))
    report = vidattn.accelerate(fast)
    arguments = target.arguments(torch.float64)
    before, after = run(plain, arguments, grad=grad), run(fast, arguments, grad=grad)
    assert_as_before(after, before, None)
    return report, after


@pytest.mark.parametrize(
    ("window", "shape"),
    [
        ((7, 7, 7), (16, 18, 22)), ((2, 2, 2), (16, 16, 20)), ((1, 4, 6), (18, 20, 24)), ((4, 5), (22, 50)),
        ((7, 7), (16, 40)), ((6, 1), (22, 16)),
    ],
    ids=str,
)  # fmt: skip
def test_sizes(window: tuple[int, ...], shape: tuple[int, ...]) -> None:
    options = {"downsample": "mergingv2", "qkv_bias": window[0] != 7}
    report, after = compared(partial(encoder, window, heads=window[-1] % 3 + 1, **options), shape)
    assert len(report.swapped) == 14 and not report.skipped
    assert after.ops.calls["window3d_attention"] == 5 and not after.ops.calls["window_attention"]


@pytest.mark.parametrize(("train", "grad"), [(False, False), (False, True), (True, False)])
def test_the_flash_flag_drops_nothing(train: bool, grad: bool) -> None:
    """Without gradients the original drops nothing, not even in training mode."""
    options = {"use_flash_attention": True, "attn_drop_rate": 0.5, "drop_path_rate": 0.0}
    compared(partial(encoder, **options), (16, 16, 22), train=train, grad=grad)


def test_the_flash_flag_drops_with_gradients() -> None:
    model = encoder(use_flash_attention=True, attn_drop_rate=0.5, drop_path_rate=0.0).train()
    vidattn.accelerate(model)
    x = torch.randn(1, 1, 16, 16, 22)
    assert not torch.equal(model(x)[-1], model(x)[-1])
    with torch.no_grad():
        assert torch.equal(model(x)[-1], model(x)[-1])


@pytest.mark.parametrize("options", [{}, {"use_checkpoint": True}], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("window", "shape"), [((3, 4, 5), (16, 18, 22)), ((4, 5), (22, 50))], ids=str)
def test_dropout_draws_the_same_numbers(window: Any, shape: Any, options: dict[str, Any]) -> None:
    """Stochastic depth, and dropout after the projections, which the original applies to padded windows."""
    _, after = compared(partial(encoder, window, drop_rate=0.3, **options), shape, train=True)
    assert after.ops.calls["window3d_attention"] >= 5


def test_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TARGETS[1].make()
    vidattn.accelerate(model)
    shapes: list[Any] = []
    dispatch = torch.utils._python_dispatch.TorchDispatchMode

    class Shapes(dispatch):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            shapes.extend(x.shape for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with Shapes():
        model(**TARGETS[1].arguments())
    assert shapes and not [shape for shape in shapes if tuple(shape[-2:]) == (60, 60)]


def test_compiles_as_one_graph() -> None:
    """A stage, as the original does, activation checkpointing included."""

    def stage() -> nn.Module:
        options = {"drop_path": [0.0, 0.0], "qkv_bias": True, "use_checkpoint": True}
        return swin_unetr.BasicLayer(12, 2, 3, (3, 4, 5), **options)

    target = TARGETS[1]._replace(build=stage, inputs=lambda: {"x": torch.randn(1, 12, 4, 6, 7)})
    model, arguments = target.make(torch.float64), target.arguments(torch.float64)
    before = run(model, arguments)
    vidattn.accelerate(model)
    torch._dynamo.reset()
    after = run(torch.compile(model, backend="aot_eager", fullgraph=True), arguments, counted=False)
    gradients = {name.removeprefix("_orig_mod."): row for name, row in after.gradients.items()}
    assert_as_before(after._replace(gradients=gradients), before, None)


def _kept(model: nn.Module, arguments: dict[str, Any]) -> set[int]:
    """Run forward and backward; give the widths of the tokens that were kept in between."""
    widths: set[int] = set()

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dim() > 2:
            widths.add(x.shape[-1])
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(**arguments)
    out.sum().backward()
    return widths


def test_activations_of_the_mlp_are_not_kept() -> None:
    """They are four times as wide as the tokens. A hook on the MLP is called as often as before."""
    model = swin_unetr.BasicLayer(12, 2, 3, (3, 4, 5), drop_path=[0.0, 0.0], qkv_bias=True)
    arguments = {"x": torch.randn(1, 12, 4, 6, 7)}
    assert 48 in _kept(model, arguments)
    vidattn.accelerate(model)
    assert 48 not in _kept(model, arguments)
    calls = []
    hook = model.blocks[0].mlp.linear1.register_forward_hook(lambda *args: calls.append(args))
    assert 48 in _kept(model, arguments) and len(calls) == 1
    hook.remove()
    parameters = {name: row.detach() for name, row in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, kwargs=arguments).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    model.zero_grad()
    loss(dict(model.named_parameters())).backward()
    for name, row in model.named_parameters():
        torch.testing.assert_close(gradients[name], row.grad, rtol=1e-4, atol=1e-4)


class _Hyena(nn.Module):
    """In place of a block that needs a package of its own: it has no windows and gets no mask."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask: None) -> torch.Tensor:
        assert mask is None
        return x + self.mix(x)


def test_hyena_stages_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swin_unetr, "HyenaTransformerBlock", _Hyena)
    options = {"hyena_stages": (True, False, True, False), "drop_path_rate": 0.0}
    report, after = compared(partial(encoder, **options), (16, 16, 22))
    assert [row.name for row in report.swapped if issubclass(row.twin, FusedBasicLayer)] == ["layers2.0", "layers4.0"]
    assert len(report.swapped) == 6 and not report.skipped
    assert after.ops.calls["window3d_attention"] == 2


def _index(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "relative_position_index"):
            module.relative_position_index.copy_(module.relative_position_index.flip(0).clone())


def _maps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Softmax):
            module.register_forward_hook(lambda module, args, out: out**2)


def _masks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, swin_unetr.SwinTransformerBlock):
            module.register_forward_pre_hook(lambda module, args: (args[0], 0.01 * args[1]))


@pytest.mark.parametrize(("change", "ops"), [(_index, 5), (_maps, 0), (_masks, 5)])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_what_is_changed_afterwards_counts(target: Target, change: Any, ops: int) -> None:
    plain, fast = target.make(torch.float64), target.make(torch.float64)
    arguments = target.arguments(torch.float64)
    vidattn.accelerate(fast)
    unchanged = run(plain, arguments, grad=False)
    for model in (plain, fast):
        change(model)
    before, after = run(plain, arguments, grad=False), run(fast, arguments, grad=False)
    assert_as_before(after, before, None)
    assert after.ops.forward == (ops and sum(isinstance(row, nn.Softmax) for row in plain.modules()))
    assert not torch.allclose(before.outputs[-1], unchanged.outputs[-1])


def test_a_permuted_index_leaves_the_block() -> None:
    model = TARGETS[1].make()
    _index(model)
    report = vidattn.accelerate(model)
    assert {row.reason for row in report.skipped} == {"its relative_position_index is not the standard one"}
    assert len(report.swapped) == 9  # stages and attentions
