"""Earth attention of weather models (Pangu-Weather, FengWu): windows in 3D and 2D, with a bias for each latitude band.

Of physicsnemo (``EarthAttention3D``, ``EarthAttention2D``), of WeatherLearn, which it follows, and of mfai
(``EarthAttention3D``). Windows of one pressure level and latitude have one bias, whatever their longitude.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidattn.integrations import Counterpart
from vidattn.integrations._windows import attend_by_type, can_attend, has_parts, takes_mask
from vidattn.nn.parts import rate_in_use, why_not_number
from vidattn.twins import Twin


class FusedEarthAttention(Twin):
    """``EarthAttention3D`` and ``EarthAttention2D`` of physicsnemo on ``vidattn.window_attention``."""

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (B * nLon, types, N, C), a row for each pressure level and latitude.
            mask: additive mask (nLon, types, N, N), or None.

        Returns:
            Windows (B * nLon, types, N, C).
        """
        rows, types, tokens, _ = x.shape
        table, index = self.earth_position_bias_table, self.earth_position_index
        windows = None if mask is None else mask.flatten(0, 1)
        if (
            not takes_mask(windows, rows * types, tokens)
            or (mask is not None and mask.shape[1] != types)
            or table.shape[1] != types
            or index.numel() != tokens**2
            or not can_attend(self)
        ):
            return self.replaced.forward(self, x, mask)
        context = attend_by_type(
            self,
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(0, 1),
            _bias_by_type(table, index, tokens),
            windows,
            dropout_p=rate_in_use(self.attn_drop),
        )
        return self.proj_drop(self.proj(context.unflatten(0, (rows, types))))


class FusedMfaiEarthAttention(Twin):
    """``EarthAttention3D`` of mfai on ``vidattn.window_attention``.

    The original leaves its scores on the module, as ``attention`` and ``attention2``. There are none here; what an
    earlier run of the original left is taken away, so that nobody takes it for those of the last call.
    """

    ops = ("window_attention",)

    @staticmethod
    def refuse(module: Any) -> str | None:
        """Say why a module cannot become this twin; None if it can."""
        return why_not_number(module)

    def forward(self: Any, x: Tensor, mask: Tensor | None, batch_size: int) -> Tensor:
        """Attend inside each window.

        Args:
            x: windows (B * types * nLon, N, C).
            mask: additive mask (types * nLon, N, N), or None.
            batch_size: B.

        Returns:
            Windows (B * types * nLon, N, C).
        """
        groups, tokens, _ = x.shape
        table, index, types = self.earth_specific_bias, self.position_index, self.num_windows
        repeats = groups // (batch_size * types)
        if (
            repeats < 1
            or groups != batch_size * types * repeats
            or not takes_mask(mask, groups, tokens)
            or (mask is not None and mask.shape[0] != types * repeats)
            or table.shape[1] != types
            or index.numel() != tokens**2
            or not can_attend(self, dropout="dropout")
        ):
            return self.replaced.forward(self, x, mask, batch_size)
        for name in ("attention", "attention2"):
            self.__dict__.pop(name, None)
        context = attend_by_type(
            self,
            self.linear1(x).unflatten(-1, (3, self.head_number, -1)),
            _bias_by_type(table, index, tokens),
            mask,
            repeats=repeats,
            dropout_p=rate_in_use(self.dropout),
        )
        return self.dropout(self.linear2(context))


def _bias_by_type(table: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Gather the bias (types, h, N, N) from a table (L, types, h)."""
    by_type = table.flatten(1).t().contiguous().index_select(1, index.reshape(-1))
    return by_type.unflatten(0, table.shape[1:]).unflatten(-1, (tokens, tokens))


def _resembles(module: Any) -> bool:
    return has_parts(module, "earth_position_bias_table", "earth_position_index", "type_of_windows", "attn_drop")


COUNTERPARTS = (
    Counterpart(
        "EarthAttention3D",
        None,
        FusedEarthAttention,
        code=("EarthAttention3D.forward",),
        tested={"4f2c79a9b93376a1": "physicsnemo 1.1.0, 1.3.0, 2.2.2, WeatherLearn 41333e1"},
        resembles=_resembles,
    ),
    Counterpart(
        "EarthAttention2D",
        None,
        FusedEarthAttention,
        code=("EarthAttention2D.forward",),
        tested={"343c8cdb90762ca5": "EarthAttention2D of physicsnemo 1.1.0, 1.3.0, 2.2.2"},
        resembles=_resembles,
    ),
    Counterpart(
        "EarthAttention3D",
        None,
        FusedMfaiEarthAttention,
        code=("EarthAttention3D.forward",),
        tested={"ebb59bff9f8b12cd": "mfai 6.2.1, 7.3.1, 8.0.2", "f09bbf27066acf2d": "mfai 9.0.1"},
        resembles=lambda module: has_parts(module, "earth_specific_bias", "position_index", "linear1", "linear2"),
    ),
)
