"""What the twins of several families share: questions about the parts of a module, and attention of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from vidattn.backends import AttentionCall, current_backend, find_backend
from vidattn.ops import spatial_attention
from vidattn.twins import Twin

# Longer sequences are what PyTorch's attention on GPUs is made for: the products take nearly all of the time there.
SDPA_TOKENS = 512


def as_defined(*kinds: type[nn.Module]) -> dict[type, Callable[..., Any]]:
    """Remember the ``forward`` of classes, so that one that somebody replaces later is noticed."""
    return {kind: kind.forward for kind in kinds}


LINEAR = as_defined(nn.Linear)
SOFTMAX = as_defined(nn.Softmax)
DROPOUT = as_defined(nn.Dropout, nn.Identity)
# Classes of weights that are no more than their numbers. vidattn.distributed adds DTensor.
PLAIN_TENSORS: set[type] = {nn.Parameter, Tensor, FakeTensor}
# Whose hooks make DTensors of tensors, and tensors of DTensors, and change no number.
_PLACING = ("torch.distributed.tensor.", "vidattn.distributed.")
PER_TOKEN_NORM = as_defined(nn.LayerNorm, nn.RMSNorm, nn.Identity)


def is_plain(module: Any, kinds: dict[type, Callable[..., Any]]) -> bool:
    """Whether calling a module does what its class, one of ``kinds``, was written to do, and nothing besides.

    A wrapper, a parametrization or an adapter in its place is of another class; hooks, and a ``forward`` that was put
    on the instance or into the class, show here too. Asked at every call, since all of that may come after
    ``vidattn.accelerate``. Hooks on all modules (``register_module_forward_hook``) divert nothing.
    """
    kind: Any = type(module)
    state = module.__dict__
    return (
        kinds.get(kind) is kind.forward
        and "forward" not in state
        and not (
            (state["_forward_hooks"] and _divert(state["_forward_hooks"]))
            or (state["_forward_pre_hooks"] and _divert(state["_forward_pre_hooks"]))
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        )
    )


def _divert(hooks: dict[int, Callable[..., Any]]) -> bool:
    """Whether one of the hooks may do more than place tensors on the processes of a mesh."""
    return not all(getattr(hook, "__module__", "").startswith(_PLACING) for hook in hooks.values())


def is_part(module: Any, twin: Any) -> bool:
    """Whether calling a module does what a twin does in its place, and nothing besides.

    Args:
        module: part of the twin, of any class.
        twin: an instance that ``vidattn.twins.make_twin`` made the class of. The functions that it does the work of
            (whose being intact it asks for itself) name the classes that are known.
    """
    kind: Any = type(module)
    known = kind.replaced if issubclass(kind, Twin) and "forward" not in vars(kind) else kind
    return any(row.namespace is known and row.name == "forward" for row in twin._watched) and is_plain(
        module, {kind: kind.forward}
    )


class Affine(NamedTuple):
    """A layer that maps each token by itself, x to W x + b, however the tokens are arranged.

    Attributes:
        linear: the layer that has b.
        draws: whether inputs are dropped at random now.
    """

    linear: nn.Linear
    draws: bool

    @property
    def constant(self) -> Tensor | None:
        """What a zero token becomes, b; None for zeros."""
        return self.linear.bias


def affine(layer: Any) -> Affine | None:
    """Describe a layer that is known to be affine: ``nn.Linear``, or a low-rank adapter of peft on one.

    Args:
        layer: any module; one that hooks, patches or foreign parameters may make something else is unknown.

    Returns:
        What is known; None if it may be anything.
    """
    if is_plain(layer, LINEAR):
        return Affine(layer, False) if _has_plain_weight(layer) else None
    kind = type(layer)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
        return None
    adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
    dropouts = list(layer.lora_dropout.values())
    base = layer.base_layer
    if (
        not is_plain(layer, {kind: kind.forward})
        or not (is_plain(base, LINEAR) and _has_plain_weight(base))
        or not all(is_plain(adapter, LINEAR) and adapter.bias is None for adapter in adapters)
        or not all(is_plain(dropout, DROPOUT) for dropout in dropouts)
        or layer.lora_variant  # DoRA and others
    ):
        return None
    return Affine(base, any(rate_in_use(dropout) > 0.0 for dropout in dropouts))


def _has_plain_weight(linear: nn.Linear) -> bool:
    """Whether the weight is no tensor of another class, which may be quantised with scales of its input's."""
    weight = linear._parameters.get("weight")
    if weight is None:  # FSDP and DataParallel put a view there
        weight = linear.__dict__.get("weight")
    return type(weight) in PLAIN_TENSORS


def rate_in_use(dropout: nn.Module) -> float:
    """Tell the probability with which a dropout drops now."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def draws(part: Any) -> bool:
    """Whether a dropout, or a stochastic depth of rate ``drop_prob``, draws random numbers now."""
    return bool(part.training and (part.p if type(part) is nn.Dropout else getattr(part, "drop_prob", 0.0)))


def can_drop(dropout: nn.Module) -> bool:
    """Whether the ops can stand in for the dropout of the attention probabilities: a plain one that keeps some."""
    return is_plain(dropout, DROPOUT) and rate_in_use(dropout) < 1.0


def is_number(scale: Any) -> bool:
    """Whether a scale is no tensor, which may be learned: the ops have no gradient for it."""
    return not isinstance(scale, Tensor)


def why_not_number(module: nn.Module) -> str | None:
    """Say why the ops cannot take the ``scale`` of an attention module; None if they can."""
    scale: Any = module.scale
    return None if is_number(scale) else f"its scale is a {type(scale).__name__}, for which the ops have no gradient"


def attend(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
    in_place_of_sdpa: bool = False,
) -> Tensor:
    """Attend over all tokens of each sequence.

    Args:
        qkv: (B, S, 3, h, d), or a tuple (q, k, v) of (B, S, h, d).
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight.
        backend: backend of the call, strict; None for the one in force. Where that is "auto", long sequences without
            dropout go to PyTorch's own attention, which computes the same, unless a kernel for the CPU takes them.
        in_place_of_sdpa: whether the original calls PyTorch's attention, to which the reference would be a step back:
            where no kernel takes the call, sequences of all lengths go there.

    Returns:
        Context (B, S, h * d).
    """
    first = qkv if isinstance(qkv, Tensor) else qkv[0]
    long = first.shape[1] > SDPA_TOKENS
    if (long or in_place_of_sdpa) and dropout_p == 0.0 and (backend or current_backend()) == "auto":
        call = AttentionCall("spatial_attention", first.device.type, first.dtype, first.shape[-1])
        chosen = find_backend(call, "auto")
        # The kernels for the CPU were faster at 197 to 3137 tokens (d = 64, 1 and 2 threads): 1.1 to 7 times.
        if chosen == "reference" or (long and chosen != "cpu"):
            query, key, value = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            by_head = functional.scaled_dot_product_attention(query, key, value, scale=scale)
            return by_head.transpose(1, 2).flatten(2)
    context = spatial_attention(qkv, 1, scale=scale, dropout_p=dropout_p, backend=backend)
    assert isinstance(context, Tensor)  # there is no cls token
    return context
