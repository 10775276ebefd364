"""The collectives of a clip that is cut over ranks; autograd sees through them.

One convention makes all gradients right: **the gradient of anything is the sum of what the ranks have of it.** A tensor
that only one rank holds has its whole gradient there. Of one that every rank holds (a parameter, a cls token, a mean of
all frames) each rank has a share, from what that rank computed with it. So whatever every rank computes alike counts
once: at the very end each rank takes one part in ``ranks`` of the gradient of the logits, and at the very beginning the
shares of the parameters are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Ranks", "evenly"]


def evenly(count: int, ranks: int) -> tuple[int, ...]:
    """Deal ``count`` things out to ranks: the first ranks get one more where it does not go evenly.

    Example:
        >>> evenly(7, 3)
        (3, 2, 2)
    """
    share, more = divmod(count, ranks)
    return tuple(share + (rank < more) for rank in range(ranks))


class Ranks(NamedTuple):
    """The processes that hold the parts of a clip, in the order of its frames.

    Attributes:
        group: their process group.
        rank: the number of this process among them.
        size: how many they are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def exchange(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send each rank a piece, and receive one from each.

        Args:
            pieces: what each rank gets, any shapes, one dtype. The own piece is returned as it is.
            shapes: of what comes from each rank.

        Returns:
            What came from each rank. Use all of it, empty pieces too: the way back needs every rank.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        flat = torch.cat([pieces[rank].reshape(-1) for rank in others]) if others else pieces[0].new_empty(0)
        send = [0 if rank == self.rank else piece.numel() for rank, piece in enumerate(pieces)]
        receive = [0 if rank == self.rank else math.prod(shape) for rank, shape in enumerate(shapes)]
        arrived = _Exchange.apply(self.group, send, receive, flat).split(receive)
        return [
            pieces[rank] if rank == self.rank else piece.view(shape)
            for rank, (piece, shape) in enumerate(zip(arrived, shapes, strict=True))
        ]

    def reshard(self, x: Tensor, gathered: int, sizes: Sequence[int], cut: int, parts: Sequence[int]) -> Tensor:
        """Turn a tensor that is cut along one axis into one that is cut along another: an all-to-all.

        Args:
            x: this rank's part, whole along ``cut``.
            gathered: axis that is cut now, and whole afterwards.
            sizes: what each rank holds of it.
            cut: axis that is whole now, and cut afterwards.
            parts: what each rank will hold of it.

        Returns:
            This rank's part, contiguous, whole along ``gathered``.
        """
        shapes = []
        for size in sizes:
            shape = list(x.shape)
            shape[gathered], shape[cut] = size, parts[self.rank]
            shapes.append(shape)
        return torch.cat(self.exchange(x.split(parts, cut), shapes), gathered)

    def gather(self, x: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """Join what the ranks hold along an axis; every rank gets all of it.

        Args:
            x: this rank's part.
            axis: axis that is cut.
            sizes: what each rank holds of it.
        """
        shapes = [[*x.shape[:axis], size, *x.shape[axis + 1 :]] for size in sizes]
        return torch.cat(self.exchange([x] * self.size, shapes), axis)

    def sum(self, x: Tensor) -> Tensor:
        """Add up tensors of one shape; every rank gets the sum."""
        return _Sum.apply(self.group, x)

    @torch.no_grad()
    def maximum(self, x: Tensor) -> Tensor:
        """Give the maximum, number by number, of tensors of one shape. It has no gradient."""
        largest = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest

    def integers(self, mine: Sequence[int], device: torch.device) -> list[list[int]]:
        """Tell every rank as many integers as every other; give those of all ranks."""
        own = torch.tensor(mine, dtype=torch.int64, device=device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        return torch.stack(every).tolist()

    def share_gradient(self, x: Tensor) -> Tensor:
        """Leave a tensor that every rank holds as it is; each rank passes on one part in ``size`` of its gradient."""
        return _ShareGradient.apply(self.size, x)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Leave parameters as they are; once the backward pass has all their gradients, the ranks add them up."""
        return _SumGradients.apply(self.group, *parameters)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, send: list[int], receive: list[int], flat: Tensor) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        arrived = flat.new_empty(sum(receive))
        dist.all_to_all_single(arrived, flat, receive, send, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, None, None, _Exchange.apply(ctx.group, ctx.receive, ctx.send, gradient.contiguous())


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, _Sum.apply(ctx.group, gradient)


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, x: Tensor) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, gradient / ctx.size


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.shapes = [parameter.shape for parameter in parameters]
        ctx.set_materialize_grads(False)  # a parameter that is not used shall have no gradient, not zeros
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        # Which parameters are used does not depend on the rank, so the ranks agree on what is sent.
        summed: list[Tensor | None] = [None] * len(gradients)
        used = [number for number, gradient in enumerate(gradients) if gradient is not None]
        for dtype in dict.fromkeys(gradients[number].dtype for number in used):  # type: ignore[union-attr]
            numbers = [number for number in used if gradients[number].dtype == dtype]  # type: ignore[union-attr]
            flat = torch.cat([gradients[number].reshape(-1) for number in numbers])  # type: ignore[union-attr]
            dist.all_reduce(flat, group=ctx.group)
            pieces = flat.split([ctx.shapes[number].numel() for number in numbers])
            for number, piece in zip(numbers, pieces, strict=True):
                summed[number] = piece.view(ctx.shapes[number])
        return None, *summed
