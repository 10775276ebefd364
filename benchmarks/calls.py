"""What contenders of several families share: calls to time, kernels of SDPA that are pinned, who is here.

The calls are of ops that take a packed qkv alone: inputs made once, forward, and forward with backward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import vidattn

Attend = Callable[[Tensor], Tensor]
# The contender that all others are compared with: the reference, in float64 on the numbers that the others are given.
EXACT = "exact"
# On a GPU, SDPA with its kernels pinned: it raises where they do not take a call.
SDPA = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
PACKAGES = {
    "flash_attn": "flash_attn",
    "natten": "natten",
    "cuequivariance": "cuequivariance_torch",
    "xformers": "xformers",
}
COMPILED = ("compiled", "compiled_sdpa", "flex", "vidattn_compiled")  # each takes many seconds to get ready


def installed(*contenders: str) -> tuple[str, ...]:
    """Keep of contenders those whose package is installed."""
    return tuple(name for name in contenders if importlib.util.find_spec(PACKAGES[name]) is not None)


# Who attends in sequences: over time, over space, and over space and time mixed.
CONTENDERS = ("eager", "sdpa", "compiled", "compiled_sdpa", "flex", *installed("xformers", "flash_attn"), "vidattn")
GPU_CONTENDERS = ("vidattn", "triton", "eager", *SDPA, "flash_attn", "xformers", "compiled", "flex")
GPU_COMPILED = tuple(name for name in COMPILED if name in GPU_CONTENDERS)


def contenders(direction: str, dtype: str) -> list[str]:
    """Name those of ``CONTENDERS`` that make sense: FlexAttention has no backward on a CPU."""
    return [name for name in CONTENDERS if name != "flex" or direction == "forward"]


def pinned_sdpa(contender: str) -> Callable[..., Tensor]:
    """Give SDPA with the kernels that the name of a contender pins, else with those that it chooses itself."""
    if contender not in SDPA:
        return F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        with sdpa_kernel(SDPA[contender]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    return attend


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call the package flash-attention on (G, h, n, d), as SDPA is called."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)  # type: ignore[no-any-return]


def xformers(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Call the package xFormers on (G, h, n, d), as SDPA is called; a mask (1 or G, h, n, n) may be given."""
    from xformers.ops import memory_efficient_attention

    bias = None if attn_mask is None else attn_mask.expand(q.shape[0], -1, -1, -1)
    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias).transpose(1, 2)  # type: ignore[no-any-return]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a contender for one case, without dynamic shapes; whoever starts a case resets the compiler."""
    return torch.compile(function, dynamic=False, fullgraph=True)  # type: ignore[no-any-return]


def why_absent(contender: str, function: str, *arguments: Any, **options: Any) -> str | None:
    """Say why a contender cannot run here, or is no other than "vidattn"; None if it takes part.

    Args:
        contender: its name.
        function: the public function of the call.
        *arguments: what vidattn takes; tensors without memory will do.
        **options: further arguments.
    """
    package = PACKAGES.get(contender)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"not installed: {package}"
    if contender == "triton" and vidattn.why_not(function, *arguments, **options, backend="cuda"):
        return "it is what vidattn takes here"
    return None


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in (G, h, n, d) as plain module code does."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def rival(contender: str, arranged: Callable[..., Tensor]) -> Attend | None:
    """Give a rival's function of qkv; None if a contender is ours.

    Args:
        contender: of ``CONTENDERS`` or ``GPU_CONTENDERS``.
        arranged: takes qkv and ``attend``, a function of q, k, v (G, h, n, d), and brings the tokens to it and back.
    """
    attend = {
        "eager": softmax_attention,
        "compiled": softmax_attention,
        "flex": flex_attention,
        "flash_attn": flash_attention,
        "xformers": xformers,
    }.get(contender)
    if "sdpa" in contender:
        attend = pinned_sdpa(contender)
    if attend is None:
        return None
    function = partial(arranged, attend=attend)
    return compiled(function) if contender in COMPILED else function


def build_calls(
    attend: Attend, qkv_shape: Sequence[int], direction: str, dtype: str, device: str, copies: int, exact: bool = False
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Make inputs, the same ones for every contender, and the calls to time.

    Args:
        attend: function of qkv that gives the context.
        qkv_shape: (..., 3, h, d); the context is (..., h * d).
        direction: "forward" | "forward_backward".
        dtype: "float32" | "bfloat16" | "float16".
        device: where the inputs are.
        copies: how many calls, each with a qkv and an output gradient of its own.
        exact: hand the numbers of that dtype over in float64.

    Returns:
        Functions that return (context,), or (context, gradient of qkv).
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        numbers = torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))
        return numbers.double() if exact else numbers

    def forward(qkv: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(qkv),)

    def forward_backward(qkv: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        context = attend(qkv)
        return (context, *torch.autograd.grad(context, qkv, gradient))

    *tokens, _, heads, head_dim = qkv_shape
    calls: list[Callable[[], tuple[Tensor, ...]]] = []
    for _ in range(copies):
        qkv, gradient = random(*qkv_shape), random(*tokens, heads * head_dim)
        if direction == "forward":
            calls.append(partial(forward, qkv, gradient))
        else:
            calls.append(partial(forward_backward, qkv.requires_grad_(), gradient))
    return calls
