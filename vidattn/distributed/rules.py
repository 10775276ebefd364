"""How DTensor shards the ops: by batch, by heads, or not at all.

Importing this file registers the rules. ``vidattn`` does so when it first meets a DTensor, so nobody has to.

What a call depends on along a sequence (windows that are shifted, frames, sites) stays on one process: inputs that are
sharded there, or unevenly over heads, are redistributed first. Sharded by batch, the gradient of what the batch shares
(bias table, padding) is ``Partial``; sharded by heads, everything that has heads is ``Shard``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from vidattn.ops._transforms import call_op

# Dimension of the heads, alone or merged with the head dimension, of what has any.
_HEADS = {
    "q": -2, "k": -2, "v": -2, "out": -1, "cls": -1, "lse": -1, "bias_table": -1, "bias": -3, "pad_qkv": -2,
}  # fmt: skip
# Whose first dimension is the batch.
_BATCH = ("q", "k", "v", "out", "cls", "lse", "x")
_GRADIENTS = {"grad_pad": "pad_qkv"}


class _Call(NamedTuple):
    """A call of an op, with its arguments by the names that the schema gives them.

    Attributes:
        given: values by name; a tensor is anything that has a shape, placements and a mesh.
    """

    given: dict[str, Any]

    @classmethod
    def of(cls, name: str, args: Sequence[Any]) -> _Call:
        """Name the arguments of an op; raise where a sharded call would not compute what one process does."""
        given = dict(zip(_arguments[name], args))
        if given.get("seed") is not None:
            raise ValueError(
                f"{name}: dropout_p: expected 0.0 for DTensors, got {given['dropout_p']}: the mask of the dropout"
                " numbers heads and groups, and a process does not know the numbers of its own"
            )
        return cls(given)

    @property
    def tokens(self) -> Any:
        """The tensor that is sharded first of all."""
        return self.given["q"] if "q" in self.given else self.given["x"]

    def original(self, name: str) -> str:
        """Name the tensor that a tensor of the schema is the gradient of; any other keeps its name."""
        if name == "grad_bias":
            return "bias_table" if "bias_table" in self.given else "bias"
        return _GRADIENTS.get(name, name.removeprefix("grad_"))

    def placement(self, name: str, mode: str, *, is_output: bool) -> Placement | None:
        """Say how a tensor of the schema lies on the processes of a mesh dimension; None where there is none."""
        original = self.original(name)
        tokens, packed = self.tokens, self.given.get("k", self.tokens) is None
        if is_output:
            needed = self.given.get(name.replace("grad", "needs"), True)
            if name.startswith("grad_") and (self.given[original] is None or not needed):
                return None
        elif not hasattr(self.given[name], "placements"):
            return None
        if mode == "batch" and original in _BATCH:
            return Shard(0)
        if mode == "batch" and is_output:
            return Partial()  # a sum over the batch
        if mode == "heads" and original in _HEADS:
            merged = original in ("out", "cls", "lse")
            ndim = tokens.ndim - (2 if packed else 1) if merged else self.given[original].ndim
            return Shard(_HEADS[original] % ndim)
        return Replicate()

    def modes(self) -> list[str]:
        """List in which ways the call may be cut into calls that compute the same."""
        found = ["replicate"]
        tokens, given = self.tokens, self.given
        whole = given["num_frames"] if "channel_shifts" in given else 1  # rows that belong together
        for name in ("mask", "window_types"):
            if "bias" in given and given.get(name) is not None:  # window g takes number g % nW
                whole = math.lcm(whole, given[name].shape[0])
        if whole == 1 or tokens.shape[0] % (whole * _shards(tokens, 0)) == 0:
            found.append("batch")
        if "q" in given and tokens.shape[-2] % _shards(tokens, tokens.ndim - 2) == 0:
            found.append("heads")
        return found

    def tells_heads_apart(self) -> bool:
        """Whether an option counts heads, or channels of all heads together."""
        return "q" in self.given and bool(self.given.get("channel_shifts") or self.given.get("temporal_heads"))

    def options_of(self, first: int, count: int) -> dict[str, Any]:
        """Say the options that name heads as they are for some heads alone, numbered from 0."""
        head_dim = self.tokens.shape[-1]
        if "temporal_heads" in self.given:
            return {"temporal_heads": min(max(self.given["temporal_heads"] - first, 0), count)}
        start, stop = first * head_dim, (first + count) * head_dim
        flat = iter(self.given["channel_shifts"])
        ranges = [(max(begin, start), min(end, stop), offset) for begin, end, offset in zip(flat, flat, flat)]
        kept = [(begin - start, end - start, offset) for begin, end, offset in ranges if begin < end]
        return {"channel_shifts": [value for row in kept for value in row]}


def _shards(tokens: Any, dim: int) -> int:
    """Count the parts that a dimension is in now, or would be in if all processes took part."""
    shape = tokens.device_mesh.shape
    count = math.prod([size for size, place in zip(shape, tokens.placements, strict=True) if place.is_shard(dim)])
    return count if count > 1 else math.prod(shape)


def call_by_heads(name: str, args: Sequence[Any]) -> Any:
    """Call an op on DTensors of which each process has some of the heads, where an option tells heads apart.

    DTensor hands the same options to every process. Here each gets those of its own heads.

    Args:
        name: name of the op.
        args: all its arguments.

    Returns:
        What the op returns; None where DTensor's own way is as good, or the tensors are none.

    Raises:
        ValueError: the call has dropout.
    """
    if not isinstance(args[0], DTensor):
        return None
    call = _Call.of(name, args)
    if not call.tells_heads_apart():
        return None
    tokens, mesh = call.tokens, call.tokens.device_mesh
    known = call.modes()
    if tokens.shape[0] % _shards(tokens, 0) != 0:  # from_local takes equal parts
        known = [mode for mode in known if mode != "batch"]
    wanted = {Shard(0): "batch", Shard(tokens.ndim - 2): "heads"}
    modes = [wanted.get(place, "replicate") for place in tokens.placements]
    modes = [mode if mode in known else "replicate" for mode in modes]
    if "heads" not in modes:
        return None

    def placements(row: str, is_output: bool) -> list[Any]:
        return [call.placement(row, mode, is_output=is_output) for mode in modes]

    first, count = 0, tokens.shape[-2]
    for dim, mode in enumerate(modes):
        if mode == "heads":
            count //= mesh.size(dim)
            first += count * mesh.get_local_rank(dim)
    local = {
        row: value.redistribute(placements=placements(row, False)).to_local() if isinstance(value, DTensor) else value
        for row, value in call.given.items()
    }
    results = call_op(name, *(local | call.options_of(first, count)).values())
    rows = zip(_outputs[name], results, strict=True)
    return [DTensor.from_local(result, mesh, placements(row, True), run_check=False) for row, result in rows]


# Names by op, read once: a compiler that follows a call cannot read schemas.
_arguments: dict[str, list[str]] = {}
_outputs: dict[str, list[str]] = {}


def _register(name: str) -> None:
    op = getattr(torch.ops.vidattn, name).default
    _arguments[name] = [row.name for row in op._schema.arguments]
    _outputs[name] = [row.name or "x" for row in op._schema.returns]  # what temporal_shift returns lies as its input

    def rule(*args: Any) -> list[tuple[list[Placement | None], list[Placement | None]]]:
        call = _Call.of(name, args)
        modes = [mode for mode in call.modes() if mode != "heads" or not call.tells_heads_apart()]
        return [
            (
                [call.placement(row, mode, is_output=True) for row in _outputs[name]],
                [call.placement(row, mode, is_output=False) for row in call.given],
            )
            for mode in modes
        ]

    register_sharding(op)(rule)
    # What was found is kept by the arguments from here on too: which gradients there are is among them.
    first = next(place for place, row in enumerate(op._schema.arguments) if "Tensor" not in str(row.type))
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op].static_argnum = first


for family in ("window3d_attention", "window_attention", "divided_attention", "space_time_mixing_attention"):
    _register(family)
    _register(f"{family}_backward")
_register("temporal_shift")
