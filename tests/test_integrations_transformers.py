"""transformers' models with their attention swapped, and its attention interface."""

from __future__ import annotations

import copy
import pickle
import weakref
from functools import partial
from typing import Any

import torchvision_swin  # noqa: F401  (before what imports torchvision, which cannot be imported by itself here)

# isort: split
import peft
import pytest
import torch
import transformers
from integration_cases import Integration, Ops, Results, Target, assert_as_before, run, spread
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.swin import modeling_swin
from transformers.models.swinv2 import modeling_swinv2
from transformers.models.timesformer import modeling_timesformer

import vidattn
from vidattn.backends import tensor_leaves
from vidattn.integrations.transformers import attention_forward, register
from vidattn.nn import parts
from vidattn.nn.divided import _folded

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32, "num_labels": 5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OF_SWIN = {"image_size": 36, "patch_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [3, 3], "window_size": 4,
           "drop_path_rate": 0.2, "num_labels": 5}  # fmt: skip
OF_TIMESFORMER = {**SIZES, **NO_DROPOUT, "patch_size": 8, "image_size": 24, "num_frames": 3}
OF_VIVIT = {**SIZES, **NO_DROPOUT, "image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8]}
OF_VIDEOMAE = {**SIZES, **NO_DROPOUT, "image_size": 16, "num_frames": 4, "tubelet_size": 2, "patch_size": 8}


def build(model: str, **options: Any) -> nn.Module:
    """Make a model, whose name tells that of its configuration."""
    config = getattr(transformers, model.partition("For")[0].removesuffix("Model") + "Config")
    return getattr(transformers, model)(config(**options))


def pixels(*shape: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(shape)}


def timesformer(**options: Any) -> nn.Module:
    return build("TimesformerForVideoClassification", **OF_TIMESFORMER, **options)


@pytest.fixture(autouse=True)
def _as_if_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is built the reference does the work of the kernels here, not PyTorch's attention."""
    if vidattn.why_not("spatial_attention", backend="cpu"):
        monkeypatch.setattr(parts, "find_backend", lambda *_: "cpu")


_target = partial(Target, "transformers", integration="transformers")
TARGETS = [
    _target(
        "TimeSformer",
        timesformer,
        partial(pixels, 2, 3, 3, 24, 24),
        ("TimesformerSelfAttention",),
    ),
    _target(
        "ViViT",
        partial(build, "VivitForVideoClassification", **OF_VIVIT, attn_implementation="sdpa"),
        partial(pixels, 2, 4, 3, 16, 16),
        ("VivitAttention",),
    ),
    _target(
        "VideoMAE",
        partial(build, "VideoMAEForVideoClassification", **OF_VIDEOMAE, attn_implementation="sdpa"),
        partial(pixels, 2, 4, 3, 16, 16),
        ("VideoMAESelfAttention",),
    ),
    # Stages of 9 x 9 and 5 x 5 tokens in windows of 4 x 4: padded and shifted.
    _target(
        "Swin",
        partial(build, "SwinForImageClassification", **OF_SWIN, attn_implementation="sdpa"),
        partial(pixels, 2, 3, 36, 36),
        ("SwinAttention",),
        integration="transformers_swin",
    ),
    _target(
        "Swin V2",
        partial(build, "Swinv2ForImageClassification", **OF_SWIN),
        partial(pixels, 2, 3, 36, 36),
        ("Swinv2SelfAttention",),
        integration="transformers_swin",
    ),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
class TestTargets(Integration):
    pass


BY_NAME = {target.model: target for target in TARGETS}
EAGER = ("ViViT", "VideoMAE", "Swin")  # those with a choice
models = pytest.mark.parametrize("name", BY_NAME)
F64 = torch.float64


def make(name: str, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: Any = BY_NAME[name].make(dtype)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def both(model: nn.Module, arguments: dict[str, Any], *, needs_ops: bool = True) -> tuple[Results, Results]:
    """Run a model as it is and a copy that is accelerated, and compare them."""
    before = run(copy.deepcopy(model), arguments)
    accelerated = copy.deepcopy(model)
    vidattn.accelerate(accelerated)
    after = run(accelerated, arguments)
    assert_as_before(after, before, None)
    assert (after.ops.forward > 0) == needs_ops
    return after, before


@pytest.mark.parametrize("name", ["ViViT", "VideoMAE"])
def test_no_call_is_left_to_the_reference_where_pytorch_attended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "find_backend", lambda *_: "reference")
    for implementation in ("sdpa", "eager"):
        model, arguments = make(name, implementation), BY_NAME[name].arguments()
        before = run(copy.deepcopy(model), arguments)
        vidattn.accelerate(model)
        after = run(model, arguments)
        assert (after.ops.forward == 0) == (implementation == "sdpa")
        assert_as_before(after, before, None)


# What somebody asks for, or hangs on the parts of a model


@pytest.mark.parametrize("name", [*EAGER, "TimeSformer", "Swin V2"])
def test_attention_maps_are_those_of_the_original(name: str) -> None:
    model = make(name, "eager" if name in EAGER else None)
    arguments = BY_NAME[name].inputs()
    with torch.no_grad():
        before = model(**arguments, output_attentions=True)
        plain = model(**arguments).logits
        vidattn.accelerate(model)
        with Ops() as ops:
            after = model(**arguments, output_attentions=True)
        assert len(after.attentions) == 2
        if name == "TimeSformer":  # which returns those over space, and computes those over time as ever
            assert ops.calls["divided_attention"] == 2
            assert all(map(torch.allclose, after.attentions, before.attentions))
        else:
            assert ops.forward == 0 and torch.equal(after.logits, before.logits)
            assert all(map(torch.equal, after.attentions, before.attentions))
        with Ops() as ops:  # the hooks that record the maps are still there
            hidden = model(**arguments, output_hidden_states=True)
        assert ops.forward > 0 and len(hidden.hidden_states) >= 3
        assert torch.allclose(hidden.logits, plain, atol=1e-5)


@pytest.mark.parametrize("name", EAGER)
def test_hooks_are_given_the_weights(name: str) -> None:
    model, arguments = make(name, "eager"), BY_NAME[name].inputs()
    seen: list[Tensor] = []
    attention = next(part for part in model.modules() if type(part).__name__ == BY_NAME[name].attention[0])
    attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with torch.no_grad():
        model(**arguments)
        vidattn.accelerate(model)
        model(**arguments)
    assert len(seen) == 2 and torch.equal(*seen)


@models
def test_every_part_is_called_as_before_if_somebody_watches(name: str) -> None:
    model, arguments = make(name), BY_NAME[name].inputs()
    layer = next(key for key, part in model.named_modules() if type(part).__name__.endswith("Layer"))
    for part in [key for key, _ in model.named_modules() if key.startswith(layer)]:
        seen: list[list[Tensor]] = []
        for accelerated in (False, True):
            watched = copy.deepcopy(model)
            if accelerated:
                vidattn.accelerate(watched)
            calls: list[Tensor] = []
            watched.get_submodule(part).register_forward_hook(
                lambda module, args, output, calls=calls: calls.extend(tensor_leaves(output)[:1])
            )
            with torch.no_grad():
                calls.append(watched(**arguments).logits)
            seen.append(calls)
        assert [x.shape for x in seen[0]] == [x.shape for x in seen[1]], part
        assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(*seen, strict=True)), part


@pytest.mark.parametrize("name", ["Swin", "Swin V2"])
def test_a_layer_whose_helpers_are_replaced(name: str) -> None:
    model, arguments = make(name), BY_NAME[name].arguments()
    vidattn.accelerate(model)
    layers: Any = [part for part in model.modules() if hasattr(part, "get_attn_mask")]
    layers[1].get_attn_mask = lambda *args, **kwargs: None
    after = run(model, arguments)
    assert after.ops.calls["window_attention"] == 1
    other = make(name)
    layers = [part for part in other.modules() if hasattr(part, "get_attn_mask")]
    layers[1].get_attn_mask = lambda *args, **kwargs: None
    assert_as_before(after, run(other, arguments), None)


@pytest.mark.parametrize("name", EAGER)
def test_another_implementation_chosen_later(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which attention runs is looked up at each call; one that is not known here is left alone."""
    model: Any = make(name, "eager")
    arguments = BY_NAME[name].arguments()
    vidattn.accelerate(model)
    model.set_attn_implementation("sdpa")
    assert run(model, arguments, grad=False).ops.forward > 0

    def doubled(module: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = sdpa_attention_forward(module, *args, **kwargs)
        return 2 * out, weights

    transformers.AttentionInterface.register("doubled", doubled)
    try:
        for implementation in ("doubled", "sdpa"):
            if implementation == "sdpa":
                monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", doubled)
            model.set_attn_implementation(implementation)
            original: Any = make(name)
            original.set_attn_implementation(implementation)
            after, before = (run(each, arguments, grad=False) for each in (model, original))
            assert after.ops.forward == 0 and torch.equal(after.outputs[0], before.outputs[0])
    finally:
        transformers.AttentionInterface._global_mapping.pop("doubled")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_of_vivit(implementation: str) -> None:
    model = make("ViViT", implementation).vivit
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    both(model, {**BY_NAME["ViViT"].arguments(), "attention_mask": mask}, needs_ops=False)


# Numbers


KINDS = [{"attention_type": "space_only"}, {"attention_type": "joint_space_time"}, {"qkv_bias": False}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_timesformers(options: dict[str, Any]) -> None:
    target = BY_NAME["TimeSformer"]._replace(build=partial(timesformer, **options))
    target = target._replace(inputs=partial(pixels, 1, 3, 3, 40, 24))  # a rectangle
    after, _ = both(target.make(F64), target.arguments(F64))
    assert after.ops.calls["divided_attention"] >= 2


def test_frames_that_the_configuration_does_not_know() -> None:
    """The original divides by the frames of its configuration, whatever it is given: 6 are 3 of twice the sites."""
    target = BY_NAME["TimeSformer"]
    both(target.make(F64), BY_NAME["TimeSformer"]._replace(inputs=partial(pixels, 1, 6, 3, 24, 24)).arguments(F64))
    model = target.make()
    vidattn.accelerate(model)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        model(**pixels(1, 4, 3, 16, 24))


SWIN_GRIDS = [(4, 4), (4, 9), (9, 4), (5, 8), (8, 8), (7, 13)]


@pytest.mark.parametrize("partition", [False, True])
@pytest.mark.parametrize("grid", [(3, 3), (2, 9), *SWIN_GRIDS], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_grids_of_swin(grid: tuple[int, int], shift: int, partition: bool, qkv_bias: bool) -> None:
    """A layer clips both axes of its window by the shorter one and remembers it; without clipping it pads."""
    config = transformers.SwinConfig(**OF_SWIN, qkv_bias=qkv_bias, attn_implementation="sdpa")
    layer = modeling_swin.SwinLayer(config, 12, (9, 9), 3, shift_size=shift)
    x = torch.randn(2, grid[0] * grid[1], 12, dtype=F64, requires_grad=True)
    arguments = {"hidden_states": x, "input_dimensions": grid, "always_partition": partition}
    layer = spread(layer).double().eval()
    if min(grid) < 4 and not partition:  # the original cannot: its bias is that of the larger window
        vidattn.accelerate(layer)
        with pytest.raises(RuntimeError, match="must match"):
            layer(**arguments)
        return
    after, _ = both(layer, arguments)
    on_grid = min(grid) > 4 or (min(grid) == 4 and (shift == 0 or not partition))
    assert after.ops.calls["window3d_attention" if on_grid else "window_attention"] == 1


def test_swin_stays_clipped() -> None:
    model, wide = make("Swin"), BY_NAME["Swin"].arguments()
    small = pixels(1, 3, 32, 36)
    other = copy.deepcopy(model)
    vidattn.accelerate(other)
    for each in (model, other):
        each(**small)
    assert [part.shift_size for part in model.modules() if hasattr(part, "shift_size")] == [
        part.shift_size for part in other.modules() if hasattr(part, "shift_size")
    ]
    assert_as_before(run(other, wide), run(model, wide), None)


@pytest.mark.parametrize("grid", SWIN_GRIDS, ids=str)
@pytest.mark.parametrize(("shift", "options"), [(0, {}), (2, {}), (2, {"qkv_bias": False})], ids=str)
def test_grids_of_swin_v2(grid: tuple[int, int], shift: int, options: dict[str, Any]) -> None:
    config = transformers.Swinv2Config(**OF_SWIN, **options)
    layer = modeling_swinv2.Swinv2Layer(config, 12, (9, 9), 3, shift_size=shift, pretrained_window_size=7)
    layer = spread(layer).double().eval()
    x = torch.randn(2, grid[0] * grid[1], 12, dtype=F64, requires_grad=True)
    after, _ = both(layer, {"hidden_states": x, "input_dimensions": grid})
    on_grid = min(grid) > 4 or shift == 0
    assert after.ops.calls["window3d_attention" if on_grid else "window_attention"] == 1


@pytest.mark.parametrize("name", ["Swin", "Swin V2"])
def test_a_permuted_position_index_is_honoured(name: str) -> None:
    model = make(name, dtype=F64)
    first = next(part for part in model.modules() if "relative_position_index" in part._buffers)
    index: Any = first.relative_position_index
    index.copy_(index.flip(0).clone())
    after, _ = both(model, BY_NAME[name].arguments(F64))
    assert after.ops.calls["window_attention"] == 1 and after.ops.calls["window3d_attention"] == 2


# Random numbers


@pytest.mark.parametrize("name", ["TimeSformer", "ViViT", "Swin"])
def test_dropout_and_stochastic_depth_draw_the_same_numbers(name: str) -> None:
    model = make(name, dtype=F64).train()
    for key, part in model.named_modules():
        if isinstance(part, nn.Dropout) and not key.endswith("attn_drop"):
            part.p = 0.3
        if type(part).__name__ == "TimesformerLayer":
            part.drop_path = modeling_timesformer.TimesformerDropPath(0.4)
    both(model, BY_NAME[name].arguments(F64))


@models
def test_dropout_of_attention_weights(name: str) -> None:
    """It has a generator of its own; one that leaves nothing is the original's."""
    for p in (0.4, 1.0):
        model = make(name).train()
        for part in model.modules():
            for key in ("attention_dropout", "dropout_prob"):
                if hasattr(part, key):
                    setattr(part, key, p)
            if type(part).__name__ in ("TimesformerSelfAttention", "Swinv2SelfAttention"):
                next(each for each in part.children() if isinstance(each, nn.Dropout)).p = p
        if p == 1.0:
            both(model, BY_NAME[name].arguments(), needs_ops=False)
            continue
        still = run(copy.deepcopy(model).eval(), BY_NAME[name].arguments())
        vidattn.accelerate(model)
        drawn = [run(model, BY_NAME[name].arguments()) for _ in range(2)]
        assert drawn[0].ops.forward > 0
        assert torch.equal(drawn[0].outputs[0], drawn[1].outputs[0])  # from one seed
        assert (drawn[0].outputs[0] - still.outputs[0]).abs().max() > 1e-3


# What else people do with a model


@models
def test_gradient_checkpointing(name: str) -> None:
    model: Any = make(name, dtype=F64).train()
    model.gradient_checkpointing_enable()
    after, _ = both(model, BY_NAME[name].arguments(F64))
    plain = make(name).train()
    vidattn.accelerate(plain)
    assert after.ops.forward > run(plain, BY_NAME[name].arguments()).ops.forward  # the recomputation


ADAPTED = {
    "TimeSformer": ["qkv", "temporal_dense"],
    "ViViT": ["q_proj", "v_proj"],
    "Swin": ["q_proj", "o_proj"],
    "Swin V2": ["query", "value"],
}


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_low_rank_adapters(name: str, dropout: float) -> None:
    config = peft.LoraConfig(r=2, target_modules=ADAPTED[name], lora_dropout=dropout, init_lora_weights=False)
    model, plain = make(name), make(name)
    vidattn.accelerate(model)
    torch.manual_seed(3)
    accelerated = peft.get_peft_model(model, config).double().train()
    torch.manual_seed(3)
    original = peft.get_peft_model(plain, config).double().train()
    arguments = BY_NAME[name].arguments(F64)
    after, before = run(accelerated, arguments), run(original, arguments)
    assert after.ops.forward > 0
    if dropout == 0.0 or name != "TimeSformer":  # there each token is projected once, not once a frame
        assert_as_before(after, before, None)


def test_a_frozen_timesformer_folds_two_layers() -> None:
    model, arguments = make("TimeSformer"), BY_NAME["TimeSformer"].inputs()
    with pytest.raises(ValueError, match=r"is .*temporal_attention\.output\.dense\.weight"):
        vidattn.accelerate(model, frozen=True)
    model.requires_grad_(False)
    before = model(**arguments).logits
    with vidattn.accelerate(model, frozen=True):
        assert torch.allclose(model(**arguments).logits, before, atol=1e-5)
        assert len(_folded) == 2
    assert not _folded and torch.equal(model(**arguments).logits, before)


@models
def test_a_pickle_is_read_where_nothing_was_accelerated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = make(name), BY_NAME[name].arguments()
    vidattn.accelerate(model)
    after, data = run(model, arguments), pickle.dumps(model)
    monkeypatch.setattr(vidattn.twins, "_made", weakref.WeakKeyDictionary())
    again = run(pickle.loads(data), arguments)
    assert again.ops.calls == after.ops.calls and torch.equal(again.outputs[0], after.outputs[0])


def test_compiles_as_one_graph_after_hidden_states_were_asked_for() -> None:
    torch._dynamo.reset()
    model, arguments = make("ViViT", "eager"), BY_NAME["ViViT"].inputs()
    model(**arguments, output_hidden_states=True)  # its hooks stay
    before = model(**arguments).logits
    vidattn.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(**arguments).logits, before, atol=1e-5)


def test_the_report_knows_how_wide_a_head_is() -> None:
    wide = {**OF_VIVIT, "hidden_size": 320, "num_attention_heads": 2}
    assert set(vidattn.accelerate(build("VivitModel", **wide)).backends.values()) == {"reference"}  # 160 channels


# The attention interface


def test_the_interface() -> None:
    register()
    register()
    for name, masked in (("ViViT", False), ("ViViT", True), ("VideoMAE", False), ("Swin", False)):
        model: Any = make(name, "sdpa")
        arguments = BY_NAME[name].arguments()
        if masked:
            model = model.vivit
            arguments["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
        before = run(model, arguments)
        model.set_attn_implementation("vidattn")
        after = run(model, arguments)
        assert_as_before(after, before, None)
        assert after.ops.forward == (0 if masked or name == "Swin" else 2)  # Swin has a mask in each layer
        assert vidattn.accelerate(model).swapped
        accelerated = run(model, arguments)
        assert_as_before(accelerated, before, None)
        assert accelerated.ops.forward == (0 if masked else 3 if name == "Swin" else 2)


def test_causal_models_with_the_interface() -> None:
    register()
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=31,
    )  # fmt: skip
    model: Any = spread(transformers.LlamaForCausalLM(config)).eval()
    tokens = torch.randint(31, (2, 7))
    for mask in (None, torch.tensor([[1] * 7, [0] * 3 + [1] * 4])):
        found = []
        for implementation in ("sdpa", "vidattn"):
            model.set_attn_implementation(implementation)
            found.append(model(tokens, attention_mask=mask).logits)
            found.append(model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0))
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_what_the_interface_refuses_and_hands_on() -> None:
    module = nn.Module()
    query, key, value = torch.randn(3, 2, 2, 5, 4)
    with pytest.raises(ValueError, match="s_aux: expected a model without attention sinks"):
        attention_forward(module, query, key, value, None, s_aux=torch.zeros(2))
    for is_causal in (None, True, False):  # a module that does not say is causal
        with Ops() as ops:
            out, weights = attention_forward(module, query, key, value, None, scaling=0.3, is_causal=is_causal)
        expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3, is_causal=is_causal)
        assert weights is None and torch.allclose(out, expected, atol=1e-6)
        assert ops.forward == (is_causal is False)
    bias = torch.randn(1, 2, 5, 5)
    out, _ = attention_forward(module, query, key, value, None, is_causal=False, position_bias=bias)
    assert torch.equal(
        out, sdpa_attention_forward(module, query, key, value, None, is_causal=False, position_bias=bias)[0]
    )
