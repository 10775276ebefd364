"""What the twins of several families share: questions about the parts of a module, and attention of whole sequences."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from vidattn.backends import AttentionCall, choose_backend, current_backend
from vidattn.ops import spatial_attention

# Longer sequences are what PyTorch's attention on GPUs is made for: the products take nearly all of the time there.
SDPA_TOKENS = 512


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody looks at what goes in or out of one of the modules."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def rate_in_use(dropout: nn.Module) -> float:
    """Tell the probability with which a dropout drops now; NaN for a module of another kind."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout:
        return float("nan")
    return dropout.p if dropout.training else 0.0


def dropout_is_watched(dropout: nn.Module) -> bool:
    """Whether the dropout of the attention probabilities is none that the ops compute, or a hook sees what it does."""
    return not rate_in_use(dropout) < 1.0 or has_hooks(dropout)  # NaN compares false


def attend(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor], *, scale: float | None, dropout_p: float, backend: str | None
) -> Tensor:
    """Attend over all tokens of each sequence.

    Args:
        qkv: (B, S, 3, h, d), or a tuple (q, k, v) of (B, S, h, d).
        scale: factor of q k^T; d**-0.5 when None.
        dropout_p: probability of dropping an attention weight.
        backend: backend of the call, strict; None for the one in force. Where that is "auto", long sequences without
            dropout go to PyTorch's own attention, which computes the same, unless a kernel for the CPU takes them.

    Returns:
        Context (B, S, h * d).
    """
    first = qkv if isinstance(qkv, Tensor) else qkv[0]
    if (
        first.shape[1] > SDPA_TOKENS
        and dropout_p == 0.0
        and (backend or current_backend()) == "auto"
        and not _has_cpu_kernel(first)
    ):
        query, key, value = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        by_head = functional.scaled_dot_product_attention(query, key, value, scale=scale)
        return by_head.transpose(1, 2).flatten(2)
    context = spatial_attention(qkv, 1, scale=scale, dropout_p=dropout_p, backend=backend)
    assert isinstance(context, Tensor)  # there is no cls token
    return context


def _has_cpu_kernel(x: Tensor) -> bool:
    call = AttentionCall("spatial_attention", x.device.type, x.dtype, x.shape[-1])
    return x.device.type == "cpu" and choose_backend(call, "auto") == "cpu"
