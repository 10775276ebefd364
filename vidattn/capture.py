"""Attention maps of a model whose attention never has a map in memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from vidattn.accelerate import accelerate
from vidattn.messages import describe
from vidattn.ops import _library, temporal_shift
from vidattn.ops._tensors import separate
from vidattn.reference.attention import accumulator_dtype

__all__ = ["AttentionCapture", "CapturedCall", "capture_attention"]


class CapturedCall(NamedTuple):
    """The attention map of one call.

    Attributes:
        module: name of the module that made it.
        function: name of the public function.
        map: (B, heads, queries, keys) in float32 (float64 for float64), on the device of the call.
        grid: (T, H, W) of the tokens; one more query and key come first where there is a cls token.
    """

    module: str
    function: str
    map: Tensor
    grid: tuple[int, int, int]


class AttentionCapture:
    """What [`capture_attention`][] caught so far.

    Attributes:
        calls: every call, in the order in which they ran.
    """

    def __init__(self, grid: tuple[int, int, int] | None, queries: Sequence[int] | None) -> None:
        self.calls: list[CapturedCall] = []
        self._grid = grid
        self._queries = queries

    @property
    def maps(self) -> dict[str, Tensor]:
        """The maps (B, heads, queries, keys) by module, the last of each.

        A module that calls several functions, over time and over space say, has one for each, under
        ``"<module>.<function>"``.
        """
        return {name: call.map for name, call in self._named().items()}

    @property
    def grids(self) -> dict[str, tuple[int, int, int]]:
        """The grid (T, H, W) of each map, under the same names."""
        return {name: call.grid for name, call in self._named().items()}

    def _named(self) -> dict[str, CapturedCall]:
        functions: dict[str, set[str]] = {}
        for call in self.calls:
            functions.setdefault(call.module, set()).add(call.function)
        several = {module for module, names in functions.items() if len(names) > 1}
        return {f"{x.module}.{x.function}" if x.module in several else x.module: x for x in self.calls}

    def _record(self, module: str, function: str, op: str, inputs: Any, options: Any) -> None:
        with torch.no_grad(), torch.autocast(inputs.q.device.type, enabled=False):
            rows = _attention_map(op, inputs, options, self._queries)
            self.calls.append(CapturedCall(module, function, rows, self._grid_of(inputs, options)))

    def _grid_of(self, inputs: Any, options: Any) -> tuple[int, int, int]:
        """Tell how tokens lie: as the op knows, else as the caller said, else frames of a square, else a row."""
        *_, tokens = first = separate(inputs)[0].shape[1:-2]
        if len(first) == 3:
            return first[0], first[1], first[2]
        if self._grid is not None and tokens - math.prod(self._grid) in (0, 1):
            return self._grid
        frames = getattr(options, "num_frames", 1) if hasattr(options, "cls_token") else 1
        sites = (tokens - (getattr(options, "cls_token", None) is not None)) // frames
        side = math.isqrt(sites)
        return (frames, side, side) if side * side == sites else (frames, 1, sites)


@contextlib.contextmanager
def capture_attention(
    model: nn.Module, *, grid: Sequence[int] | None = None, queries: Sequence[int] | None = None
) -> Iterator[AttentionCapture]:
    """Keep the attention maps of the calls that a model makes inside a ``with`` block.

    The model computes what it computes otherwise. The maps come from the reference, beside that: an attention of
    S tokens costs S / d more of them, so this is for looking at a model, not for training it. A model that is not
    accelerated is so inside the block. A module whose own code runs, because a hook looks at its probabilities, say,
    has no map.

    Args:
        model: any module that [`vidattn.accelerate`][] knows.
        grid: (T, H, W) in tokens, for families that do not know it: frames of divided attention are taken for squares,
            sequences for one frame.
        queries: numbers of the query tokens to keep; all by default. A map of all S tokens has S^2 numbers a head:
            25,088^2 for the first stage of a Video Swin.

    Yields:
        An [`AttentionCapture`][]: ``maps`` and ``grids`` by the name of the module. A map is (B, heads, queries,
        keys), keys and queries in the order of the tokens, 0 between tokens that do not attend to each other. Rows sum
        to 1, to less where padding tokens of a window or frames beyond a clip take a share. The row of a cls token that
        all frames share is the mean over the frames. Attention in partitioned windows has windows for a batch, mixing
        frames.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the grid or a query is none.
        RuntimeError: the model is compiled.

    Example:
        >>> import torch, vidattn
        >>> from vidattn.models.timesformer import TimeSformer
        >>> model = TimeSformer(img_size=32, num_frames=4, embed_dim=24, depth=1, num_heads=2).eval()
        >>> with vidattn.capture_attention(model) as captured:
        ...     logits = model(torch.randn(1, 3, 4, 32, 32))
        >>> {name: tuple(rows.shape) for name, rows in captured.maps.items()}
        {'model.blocks.0.temporal_attention': (1, 2, 16, 16), 'model.blocks.0.spatial_attention': (1, 2, 17, 17)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture_attention: model: expected a torch.nn.Module, got {type(model).__name__}")
    if grid is not None and (len(grid) != 3 or not all(isinstance(size, int) and size > 0 for size in grid)):
        raise ValueError(f"capture_attention: grid: expected (T, H, W) in tokens, got {describe(grid)}")
    if queries is not None and not (queries and all(isinstance(query, int) for query in queries)):
        raise ValueError(f"capture_attention: queries: expected numbers of tokens, got {describe(queries)}")
    capture = AttentionCapture(None if grid is None else (grid[0], grid[1], grid[2]), queries)
    names = {id(module): name for name, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            running.append(names[id(module)])

    def leave(module: nn.Module, *_: Any) -> None:
        if id(module) in names and running:
            running.pop()

    def listen(function: str, op: str, inputs: Any, options: Any) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("capture_attention: model: expected one that is not compiled")
        if running:
            capture._record(running[-1], function, op, inputs, options)

    # Hooks on all modules: one of a module itself would make a twin leave the work to its parts.
    handles = (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    )
    try:
        with accelerate(model), _library.listening(listen):
            yield capture
    finally:
        for handle in handles:
            handle.remove()


def _attention_map(op: str, inputs: Any, options: Any, queries: Sequence[int] | None) -> Tensor:
    """Compute the map of a call by attending to values that say which key they belong to."""
    q, k, _ = separate(inputs)
    batch, *grid, heads, head_dim = q.shape
    tokens, dtype = math.prod(grid), accumulator_dtype(q.dtype)
    q, k = q.to(dtype), k.to(dtype)
    changes: dict[str, Any] = {"dropout_p": 0.0}
    if op == "space_time_mixing_attention":  # its values would come from other frames too
        shifts = list(zip(*(options.channel_shifts[first::3] for first in range(3)), strict=True))
        k = temporal_shift(k.flatten(2), options.num_frames, shifts, backend="reference").unflatten(-1, q.shape[-2:])
        op, inputs, options, changes = _as_sequences(inputs, options)
    if getattr(options, "cls_token", None) == "per_frame":
        changes["cls_token"] = "mean"
    more: dict[str, Any] = {}
    if getattr(inputs, "pad_qkv", None) is not None:
        more["pad_qkv"] = inputs.pad_qkv.to(dtype) * inputs.pad_qkv.new_tensor([1, 1, 0])[:, None, None].to(dtype)
    rows = torch.arange(tokens, device=q.device) if queries is None else torch.tensor(queries, device=q.device)
    if not bool(((rows >= -tokens) & (rows < tokens)).all()):
        raise ValueError(f"capture_attention: queries: expected numbers below {tokens}, got {list(queries or ())}")
    parts = []
    for first in range(0, tokens, head_dim):
        here = torch.arange(first, first + head_dim, device=q.device)
        values = (torch.arange(tokens, device=q.device)[:, None] == here).to(dtype)  # (S, d)
        values = values.view(1, *grid, 1, head_dim).expand(batch, *grid, heads, head_dim)
        given = inputs._replace(q=q, k=k, v=values, seed=None, **more)
        out = _library.call_op(op, *given, *options._replace(**changes), "reference")[0]
        out = out.reshape(batch, tokens, heads, head_dim)[:, rows]
        parts.append(out[..., : tokens - first].transpose(1, 2))
    return torch.cat(parts, -1)


def _as_sequences(inputs: Any, options: Any) -> tuple[str, Any, Any, dict[str, Any]]:
    """Describe mixing whose keys were shifted already: attention over space, one frame a clip."""
    from vidattn.ops import divided

    plain = divided.Options(1, "thw", 0, None, options.scale, 0.0)
    return "divided_attention", divided.Inputs(inputs.q, inputs.k, inputs.v), plain, {}
