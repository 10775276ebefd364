"""What people do to a model after it was accelerated: every change counts, as it does in the original.

Each change is made to a plain model and to its accelerated copy. Outputs, all gradients, and what hooks see have to be
the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision_swin  # noqa: F401  (before transformers, which peft imports)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from twin_cases import CalledOps, results, spread
from twin_cases import assert_same as assert_within
from xvit_cases import tiny

import vidattn
from vidattn.models import create_model, timesformer, video_swin, vivit_layers, xvit_layers
from vidattn.models.timesformer import TimeSformer
from vidattn.models.video_swin import BasicLayer, SwinTransformer3D, WindowAttention3D
from vidattn.models.video_swin_windows import compute_mask, fit_window
from vidattn.nn import RegionMask

assert_same = partial(assert_within, tolerance=1e-9)
Change = Callable[[nn.Module], None]


def video_swin_model() -> nn.Module:
    """Padded and shifted in the first stage, clipped in the second."""
    return SwinTransformer3D(
        patch_size=(2, 4, 4), embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=(2, 3, 3), drop_path_rate=0.0
    )


def timesformer_model() -> nn.Module:
    return TimeSformer(
        img_size=32, patch_size=8, num_classes=5, num_frames=4, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.0
    )


def vivit_model() -> nn.Module:
    return create_model(
        "vivit_b_factorized_self_attention", hidden_size=24, num_layers=2, num_heads=2, mlp_dim=48, num_classes=5,
        patches=(8, 8, 2), num_frames=8, image_size=32,
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "video_swin": video_swin_model,
    "timesformer": timesformer_model,
    "vivit": vivit_model,
    "xvit": tiny,
}
FRAMES = {"video_swin": 4, "timesformer": 4, "vivit": 8, "xvit": 8}
models = pytest.mark.parametrize("name", MODELS)


def video(name: str) -> Tensor:
    return torch.randn(2, 3, FRAMES[name], 32, 32, dtype=torch.float64)


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A plain model and its accelerated copy, in eval mode and float64."""
    plain = spread(MODELS[name]()).double().eval()
    fast = copy.deepcopy(plain)
    assert vidattn.accelerate(fast, **options).swapped
    return plain, fast


def assert_still_the_same(name: str, change: Change) -> None:
    plain, fast = pair(name)
    x = video(name)
    before = results(plain, x)
    for model in (plain, fast):
        torch.manual_seed(3)
        change(model)
    assert_same(results(fast, x), results(plain, x))
    assert not torch.allclose(results(plain, x)[0], before[0])


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "qkv", None), nn.Module)]


def parts_of(model: nn.Module) -> set[str]:
    """Names, inside a block, of everything that a twin may have to do with."""
    names = {"norm1", "drop_path", "temporal_norm1", "temporal_fc", "attn", "temporal_attn", "attn_time", "attn_space"}
    blocks = {name: module for name, module in model.named_modules() if set(dict(module.named_children())) & names}
    found = set()
    for block in blocks.values():
        for child, _ in block.named_modules():
            if child.partition(".")[0] in names:
                found.add(child)
    return found


def each(model: nn.Module, part: str) -> list[nn.Module]:
    """The modules of a name in all blocks."""
    return [module for name, module in model.named_modules() if f".{name}".endswith(f".{part}")]


PARTS = [(name, part) for name, make in MODELS.items() for part in sorted(parts_of(make()))]


# Hooks, forwards and classes


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_forward_of_the_instance(name: str, part: str) -> None:
    """Steering, tracing and offloading put one on modules; a fused parent must not pass it by."""

    def change(model: nn.Module) -> None:
        for module in each(model, part):
            module.forward = lambda *args, forward=module.forward, **kw: 0.5 * forward(*args, **kw)

    assert_still_the_same(name, change)


@models
def test_hooks_see_calls_of_the_original(name: str) -> None:
    """As often, in this order, with these shapes in and out; forward hooks, and hooks before the call."""
    plain, fast = pair(name)
    for part in sorted(parts_of(plain)):
        seen: list[list[Any]] = []
        for model in (plain, fast):
            calls: list[Any] = []
            handles = []
            for number, module in enumerate(each(model, part)):
                handles += [
                    module.register_forward_pre_hook(
                        lambda _, args, number=number, calls=calls: calls.append((number, [x.shape for x in args]))
                    ),
                    module.register_forward_hook(
                        lambda _, __, out, number=number, calls=calls: calls.append((number, out.shape))
                    ),
                ]
            with torch.no_grad():
                model(torch.ones(2, 3, FRAMES[name], 32, 32, dtype=torch.float64))
            for handle in handles:
                handle.remove()
            seen.append(calls)
        assert seen[0] == seen[1] and seen[0], part


def test_hooks_of_a_block_see_the_mask_itself() -> None:
    plain, fast = pair("video_swin")
    x = video("video_swin")
    seen: list[list[Any]] = []
    for model in (plain, fast):
        masks: list[Any] = []
        model.layers[0].blocks[1].register_forward_pre_hook(lambda _, args, masks=masks: masks.append(args[1]))
        model(x)
        seen.append(masks)
    assert torch.equal(seen[0][0], seen[1][0])
    assert_same(results(fast, x), results(plain, x))


@models
def test_backward_hooks_change_gradients(name: str) -> None:
    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            attention.register_full_backward_hook(lambda _, grads, __: (3 * grads[0], *grads[1:]))
            attention.proj.register_full_backward_pre_hook(lambda _, grads: (0.5 * grads[0],))

    plain, fast = pair(name)
    x = video(name)
    for model in (plain, fast):
        change(model)
    assert_same(results(fast, x), results(plain, x))


@models
def test_global_hooks_divert_nothing(name: str) -> None:
    """Those of profilers and FLOP counters, which look at all modules."""
    _, fast = pair(name)
    x = video(name)
    with torch.no_grad():
        with CalledOps() as expected:
            fast(x)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        with CalledOps() as called:
            fast(x)
        handle.remove()
    assert called.names == expected.names and not called.names & {"aten::softmax", "aten::_softmax"}


@models
def test_another_class(name: str) -> None:
    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            kind = type(attention)
            forward = kind.forward
            attention.__class__ = type(
                f"Halved{kind.__name__}",
                (kind,),
                {"forward": lambda *args, forward=forward, **kw: 0.5 * forward(*args, **kw)},
            )

    assert_still_the_same(name, change)


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("video_swin", video_swin.WindowAttention3D, "forward"),
        ("video_swin", video_swin.SwinTransformerBlock3D, "forward_part1"),
        ("video_swin", nn.Softmax, "forward"),
        ("timesformer", timesformer.Attention, "forward"),
        ("timesformer", timesformer.Block, "_attend_divided"),
        ("timesformer", nn.LayerNorm, "forward"),
        ("vivit", vivit_layers.MultiHeadDotProductAttention, "forward"),
        ("xvit", xvit_layers.Attention, "forward"),
        ("xvit", xvit_layers.TemporalShift, "forward"),
    ],
)
def test_a_method_of_the_class(name: str, kind: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools replace the method for all instances at once."""
    original = getattr(kind, method)

    def change(model: nn.Module) -> None:
        monkeypatch.setattr(kind, method, lambda *args, **kw: 0.5 * original(*args, **kw))

    assert_still_the_same(name, change)


# Parts of other kinds


class _Adapter(nn.Module):
    """Not linear, and mixes the tokens of whatever it is given."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.bend = base, nn.Linear(base.out_features, base.out_features)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + torch.relu(self.bend(y)) - 0.1 * y.mean(-2, keepdim=True)


@pytest.mark.parametrize("layer", ["qkv", "proj"])
@models
def test_adapters_that_are_not_linear(name: str, layer: str) -> None:
    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            setattr(attention, layer, spread(_Adapter(getattr(attention, layer)).double()))

    assert_still_the_same(name, change)


@pytest.mark.parametrize("training", [False, True])
@models
def test_spectral_norm_iterates_once(name: str, training: bool) -> None:
    """In training each use of the weight turns its vectors on."""

    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            for layer in (attention.qkv, attention.proj):
                parametrizations.spectral_norm(layer).train(training)

    plain, fast = pair(name)
    x = video(name)
    for model in (plain, fast):
        torch.manual_seed(3)
        change(model)
    for _ in range(2):
        assert_same([fast(x)], [plain(x)])
    assert_same(fast.state_dict().values(), plain.state_dict().values())


def test_a_parametrized_table() -> None:
    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            parametrize.register_parametrization(attention, "relative_position_bias_table", nn.Tanh())

    assert_still_the_same("video_swin", change)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@models
def test_weight_norm_by_hooks(name: str) -> None:
    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            for layer in (attention.qkv, attention.proj):
                torch.nn.utils.weight_norm(layer)
                layer.weight_g.data.mul_(1.5)

    assert_still_the_same(name, change)


class _OverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(1, keepdim=True)


@pytest.mark.parametrize("part", ["norm1", "temporal_norm1", "drop_path", "attn.proj_drop", "temporal_attn.proj_drop"])
def test_parts_that_mix_tokens(part: str) -> None:
    def change(model: nn.Module) -> None:
        for block in model.model.blocks:
            owner, _, name = part.rpartition(".")
            setattr(block.get_submodule(owner), name, _OverTokens())

    assert_still_the_same("timesformer", change)


def add_lora(model: nn.Module, dropout: float = 0.0, **options: Any) -> None:
    config = LoraConfig(target_modules=["qkv", "proj"], r=4, lora_dropout=dropout, **options)
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


FUSED_OPS = {
    "video_swin": "vidattn::window3d_attention",
    "timesformer": "vidattn::divided_attention",
    "vivit": "vidattn::divided_attention",
    "xvit": "vidattn::space_time_mixing_attention",
}


@pytest.mark.parametrize("kind", ["lora", "dora", "with bias", "merged", "disabled"])
@models
def test_adapters_of_peft(name: str, kind: str) -> None:
    """Low-rank adapters keep the op of the block, whether the grid is padded or not."""
    plain, fast = pair(name)
    x = video(name)
    before = results(plain, x)
    for model in (plain, fast):
        torch.manual_seed(3)
        add_lora(model, use_dora=kind == "dora", lora_bias=kind == "with bias", init_lora_weights=True)
        for module in model.modules():
            if hasattr(module, "lora_A") and kind == "merged":
                module.merge()
            if hasattr(module, "lora_A") and kind == "disabled":
                module.enable_adapters(False)
    expected = results(plain, x)
    with CalledOps() as called:
        assert_same(results(fast, x), expected)
    assert torch.allclose(before[0], expected[0], 1e-3, 1e-4) == (kind == "disabled")
    if kind in ("lora", "merged", "disabled"):
        assert FUSED_OPS[name] in called.names
        assert not called.names & {"vidattn::window_attention", "aten::_softmax"}


@models
def test_adapters_of_peft_draw(name: str) -> None:
    """With dropout in front of the adapter the mean over many draws is the original's."""
    plain, fast = pair(name)
    x = video(name)
    for model in (plain, fast):
        torch.manual_seed(3)
        add_lora(model, 0.5)
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p == 0.5:
                module.train()
    with torch.no_grad():
        draws = torch.stack([fast(x) for _ in range(3)])
        assert not torch.equal(draws[0], draws[1])
        means = [torch.stack([model(x) for _ in range(60)]).mean(0) for model in (plain, fast)]
        spread_of_means = torch.stack([plain(x) for _ in range(60)]).std(0) / 60**0.5
    assert ((means[0] - means[1]).abs() / (spread_of_means + 1e-3)).mean() < 2.0


# Attributes


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3), nn.Parameter(torch.tensor(0.3))], ids=["float", "0", "1"])
@pytest.mark.parametrize("name", ["video_swin", "timesformer", "xvit"])
def test_a_scale_that_is_assigned(name: str, scale: Any) -> None:
    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            del attention.scale
            attention.scale = copy.deepcopy(scale)

    assert_still_the_same(name, change)


@pytest.mark.parametrize("name", ["video_swin", "timesformer", "xvit"])
def test_a_learned_scale_is_refused(name: str) -> None:
    model = spread(MODELS[name]()).double().eval()
    for attention in attentions(model):
        del attention.scale
        attention.scale = nn.Parameter(torch.tensor(0.3))
    before = results(model, video(name))
    torch.manual_seed(0)
    report = vidattn.accelerate(model)
    assert {row.name for row in report.skipped if "its scale is a Parameter" in row.reason} >= {
        key for key, module in model.named_modules() if module in attentions(model)
    }
    torch.manual_seed(0)
    assert len(results(model, video(name))) == len(before)


@pytest.mark.parametrize("how", ["assigned", "loaded", "in place", "loaded for itself"])
def test_a_position_index_of_its_own(how: str) -> None:
    def change(model: nn.Module) -> None:
        for attention in attentions(model):
            index = attention.relative_position_index.flip(0)
            if how == "assigned":
                attention.relative_position_index = index
            elif how == "in place":
                attention.relative_position_index.copy_(index.clone())
            elif how == "loaded for itself":
                attention.load_state_dict({**attention.state_dict(), "relative_position_index": index})
        if how == "loaded":
            state = model.state_dict()
            keys = [key for key in state if key.endswith("relative_position_index")]
            model.load_state_dict({**state, **{key: state[key].flip(0) for key in keys}})

    assert_still_the_same("video_swin", change)


def test_a_position_index_is_read_once() -> None:
    _, fast = pair("video_swin")
    x = video("video_swin")
    fast(x)
    with torch.no_grad(), CalledOps() as called:
        fast(x)
    assert "aten::equal" not in called.names and "vidattn::window3d_attention" in called.names


# Weights


def fused_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()


def vector(model: nn.Module) -> None:
    """Evolution strategies perturb one flat vector that all parameters are views of."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())
    with torch.no_grad():
        model(torch.ones(2, 3, model.num_frames_of_test, 32, 32, dtype=torch.float64))
    flat.add_(0.1 * torch.randn_like(flat))


def data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def numpy_view(model: nn.Module) -> None:
    for parameter in model.parameters():
        view = parameter.detach().numpy()
        view *= 0.9


def shared(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().share_memory_()
        torch.from_numpy(parameter.detach().numpy())[...] *= 0.9


def swapped(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(0.9 * parameter.detach()))


@pytest.mark.parametrize("change", [fused_optimizer, vector, data, numpy_view, shared, swapped])
@models
def test_nothing_made_of_weights_outlives_a_call(name: str, change: Change) -> None:
    """In inference, where folding and keeping would pay: before a change and after it."""
    plain, fast = pair(name)
    x = video(name).repeat(6, 1, 1, 1, 1)  # enough tokens to fold
    plain.num_frames_of_test = fast.num_frames_of_test = FRAMES[name]
    with torch.no_grad():
        before = fast(x)
        assert_same([before], [plain(x)])
    for model in (plain, fast):
        torch.manual_seed(3)
        change(model)
    with torch.no_grad():
        assert_same([fast(x)], [plain(x)])
        assert not torch.allclose(fast(x), before)


@models
def test_functional_calls(name: str) -> None:
    plain, fast = pair(name)
    x = video(name)
    parameters = {key: 0.9 * value.detach() for key, value in plain.named_parameters()}
    with torch.no_grad():
        assert_same(
            [torch.func.functional_call(fast, parameters, (x,))], [torch.func.functional_call(plain, parameters, (x,))]
        )


# Wrappers that hand on


def test_wrapped_blocks_get_no_mask() -> None:
    """Activation checkpointing around a block does not look at the mask, so none is made."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    plain, fast = pair("video_swin")
    x = video("video_swin")
    for model in (plain, fast):
        apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, video_swin.SwinTransformerBlock3D)
        )
    with CalledOps() as called:
        actual = results(fast, x)
    assert_same(actual, results(plain, x))
    assert "vidattn::window_attention" not in called.names
    assert isinstance(fast.layers[0].make_mask((2, 8, 8), x.device), RegionMask)


@pytest.mark.parametrize("name", ["video_swin", "timesformer"])
def test_checkpointed_attentions_stay_checkpointed(name: str) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
    from torch.utils.checkpoint import checkpoint

    counts = []
    for model in pair(name):
        calls: list[int] = []

        def counted(function: Any, *args: Any, calls: list[int] = calls, **kwargs: Any) -> Any:
            calls.append(1)
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

        wrappers.apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda module, counted=counted: wrappers.checkpoint_wrapper(
                module, checkpoint_fn=counted
            ),
            check_fn=lambda module: isinstance(getattr(module, "qkv", None), nn.Module),
        )
        model(video(name)).sum().backward()
        counts.append(len(calls))
    assert counts[0] == counts[1] == len(attentions(MODELS[name]()))


@models
def test_cpu_offload(name: str) -> None:
    """Parameters are on the meta device but while a module that has hooks of its own runs."""
    from accelerate import cpu_offload

    plain, fast = pair(name)
    x = video(name)
    with torch.no_grad():
        expected = plain(x)
        for model in (plain, fast):
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert_same([model(x)], [expected])


# Reverting what was changed


def test_revert_says_what_it_cannot_give_back() -> None:
    plain = spread(video_swin_model()).double().eval()
    x = video("video_swin")
    report = vidattn.accelerate(plain)
    first, second = (block.attn for block in plain.layers[0].blocks)
    parametrize.register_parametrization(first, "relative_position_bias_table", nn.Tanh())
    second.forward = lambda *args, forward=second.forward, **kw: 0.5 * forward(*args, **kw)
    expected = plain(x)
    with pytest.warns(UserWarning, match=r"revert: 2 modules stay as they are: .*layers\.0\.blocks\.1\.attn: the inst"):
        report.revert()
    assert {row.name for row in report.kept} == {"layers.0.blocks.0.attn", "layers.0.blocks.1.attn"}
    assert "layers.0.blocks.0.attn  ParametrizedFusedWindowAttention3D not reverted: somebody made it" in str(report)
    assert type(plain.layers[0]) is BasicLayer and type(plain.layers[1].blocks[0].attn) is WindowAttention3D
    assert_same([plain(x)], [expected])
    report.revert()  # once more is no harm


def test_masks_of_a_stage_are_those_of_its_blocks() -> None:
    """A mask that stands for another geometry is built, not believed."""
    _, fast = pair("video_swin")
    block = fast.layers[0].blocks[1]
    x = torch.randn(1, 2, 8, 8, 16, dtype=torch.float64)
    window, shift, padded = fit_window((2, 8, 8), block.window_size, block.shift_size)
    mask = compute_mask(*padded, window, shift, x.device)
    assert_same([block(x, mask)], [block(x, RegionMask(padded, window, shift))])
    torch.testing.assert_close(block(x, mask), block(x, mask.double()))
