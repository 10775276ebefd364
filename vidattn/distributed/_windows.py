"""Video Swin of which each rank computes some frames: whole windows, with the shifted part of a window as a halo.

A shift rolls the grid of tokens, padding at its end included, by some steps of time. Cut over ranks, that is: each rank
gives its first steps to the rank before it, the first rank to the last, and the results of them come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidattn.distributed._exchange import Ranks
from vidattn.distributed._sharding import Part, ShardedModel, ShardedModule
from vidattn.models import video_swin
from vidattn.models.video_swin_windows import (
    Triple,
    compute_mask,
    fit_window,
    get_window_size,
    window_partition,
    window_reverse,
)


def _pass_on(ranks: Ranks, x: Tensor, step: int) -> Tensor:
    """Give a tensor of one shape to the rank ``step`` after this one, around the end; get that of the rank before."""
    target, source = (ranks.rank + step) % ranks.size, (ranks.rank - step) % ranks.size
    pieces, shapes = [x.new_empty(0)] * ranks.size, [[0]] * ranks.size
    pieces[target], shapes[source] = x, list(x.shape)
    return torch.cat([piece.reshape(-1) for piece in ranks.exchange(pieces, shapes)]).view(x.shape)


class _Windows(NamedTuple):
    """The windows of a stage at a rank; goes to its blocks in place of a mask.

    Attributes:
        window: effective window.
        shift: effective shift of the shifted blocks.
        padded: this rank's grid, padded to whole windows.
        mask: float32, of this rank's shifted windows, as ``compute_mask`` makes it; None if nothing is masked.
    """

    window: Triple
    shift: Triple
    padded: Triple
    mask: Tensor | None


class ShardedStage(ShardedModule):
    """Video Swin's stage."""

    def make_mask(self: Any, grid: Sequence[int], device: torch.device) -> _Windows:
        """Fit windows to the whole clip, of which this rank has the grid (depth, height, width)."""
        layout = self.layout
        window, shift, padded = fit_window((layout.total, *grid[1:]), self.window_size, self.shift_size)
        rows = -(-grid[0] // window[0])
        own = (rows * window[0], *padded[1:])
        if self.depth < 2 or not any(shift):
            return _Windows(window, shift, own, None)
        # Time is masked in the last windows alone, so all others of a clip share one row of masks, or none at all.
        within = (0, *shift[1:])
        mask = compute_mask(window[0], *padded[1:], window, within, device) if any(within) else None
        if shift[0] and layout.rank == len(layout.tokens) - 1:
            last_two = compute_mask(2 * window[0], *padded[1:], window, shift, device)
            first, last = last_two.chunk(2)
            mask = torch.cat([*[first] * (rows - 1), last])
        return _Windows(window, shift, own, mask)


class ShardedBlock(ShardedModule):
    """Video Swin's block."""

    def forward_part1(self: Any, x: Tensor, mask_matrix: _Windows) -> Tensor:
        """Normalise and attend: this rank's tokens (B, own D, H, W, C) to the same shape."""
        ranks = self.clip.ranks
        batch, depth, height, width, _ = x.shape
        window, shift, padded, mask = mask_matrix
        if not any(self.shift_size):
            shift = (0, 0, 0)
        steps = shift[0]
        x = functional.pad(self.norm1(x), (0, 0, 0, 0, 0, 0, 0, padded[0] - depth))
        if steps:
            x = torch.cat((x[:, steps:], _pass_on(ranks, x[:, :steps], -1)), dim=1)
        x = functional.pad(x, (0, 0, 0, padded[2] - width, 0, padded[1] - height))
        x = x.roll((-shift[1], -shift[2]), dims=(2, 3))
        x = self.attn(window_partition(x, window), mask=mask if any(shift) else None)
        x = window_reverse(x, window, batch, *padded)
        x = x.roll((shift[1], shift[2]), dims=(2, 3))[:, :, :height, :width]
        if steps:
            x = torch.cat((_pass_on(ranks, x[:, -steps:], 1), x[:, :-steps]), dim=1)
        return x[:, :depth].contiguous()


class ShardedRecognizer(ShardedModel):
    """``Recognizer3D`` whose clip is cut."""

    def parts(self: Any) -> Iterator[Part]:
        """List the modules inside the model that have to change."""
        for stage in self.backbone.layers:
            yield Part(stage, video_swin.BasicLayer, ShardedStage)
            for block in stage.blocks:
                yield Part(block, video_swin.SwinTransformerBlock3D, ShardedBlock)

    def tokens_of(self: Any, frames: int) -> int:
        """Tell how many tokens along time a number of frames becomes."""
        return -(-frames // self.backbone.patch_size[0])

    def unit(self: Any, frames: int) -> int:
        """Tell how many frames of a clip may not be cut apart: those of a window."""
        configured = self.backbone.window_size
        depth, _, _ = get_window_size((self.tokens_of(frames), *configured[1:]), configured)
        return depth * self.backbone.patch_size[0]

    def after_the_ranks(self: Any) -> tuple[nn.Module, ...]:
        """Name the modules that see the same on every rank: the head."""
        return (self.cls_head,)

    def logits(self: Any, part: Tensor) -> Tensor:
        """Map this rank's frames to the logits of the whole clip."""
        ranks, layout = self.clip.ranks, self.layout
        features = self.backbone(part)  # (B, C, own D, h, w)
        if self.cls_head.avg_pool is None:
            return self.cls_head(ranks.gather(features, 2, layout.tokens))
        mean = ranks.sum(features.mean(dim=(2, 3, 4), keepdim=True) * layout.share)
        return self.cls_head(mean)  # whose own mean, of one token, changes nothing
