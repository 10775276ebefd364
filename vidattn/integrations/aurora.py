"""Aurora (microsoft-aurora): attention of windows of the atmosphere, with its low-rank adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.integrations._windows import has_parts, takes_mask
from vidattn.ops import window_attention
from vidattn.twins import Twin


class FusedAuroraWindowAttention(Twin):
    """``WindowAttention`` of Aurora on ``vidattn.window_attention``: no mask is repeated over the batch.

    ``use_fp16_safe_attention`` has nothing to do here, for scores of float16 are float32.
    """

    ops = ("window_attention",)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None, rollout_step: int = 0) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (G, N, C).
            mask: additive mask (nW, N, N), or None; window g takes ``mask[g % nW]``.
            rollout_step: which step of a forecast this is, for the adapters.

        Returns:
            Windows (G, N, C).
        """
        dropout_p = self.attn_drop if self.training else 0.0
        if not self.is_intact() or not takes_mask(mask, *x.shape[:2]) or not 0.0 <= dropout_p < 1.0:
            return self.replaced.forward(self, x, mask, rollout_step)
        context = window_attention(
            _adapted(self.qkv(x), self.lora_qkv(x, rollout_step)).unflatten(-1, (3, self.num_heads, -1)),
            None,
            mask,
            dropout_p=dropout_p,
            backend=self.attention_backend,
        )
        return self.proj_drop(_adapted(self.proj(context), self.lora_proj(context, rollout_step)))


def _adapted(x: Tensor, change: Tensor | int) -> Tensor:
    """Add what an adapter gives, which is the number 0 where there is none in this step."""
    return x + change if isinstance(change, Tensor) else x


COUNTERPARTS = (
    Counterpart(
        "WindowAttention",
        None,
        FusedAuroraWindowAttention,
        code=("WindowAttention.forward",),
        tested={
            "c51c65e3a14885fc": "microsoft-aurora 1.0.0, 1.3.0, 1.5.2, 1.6.0, 1.7.0",
            "769343925676314a": "microsoft-aurora 1.8.0",
        },
        resembles=lambda module: has_parts(module, "lora_qkv", "lora_proj", "head_dim"),
    ),
    Counterpart(
        "WindowAttention",
        None,
        FusedAuroraWindowAttention,
        code=("WindowAttention.forward", "fp16_safe_scaled_dot_product_attention"),
        tested={"07a812afe8ab7d0d": "microsoft-aurora 2.0.1"},
        resembles=lambda module: has_parts(module, "lora_qkv", "lora_proj", "use_fp16_safe_attention"),
    ),
)
