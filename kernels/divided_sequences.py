"""The sequences of a call of divided attention: over time, over space, or the frames of space-time mixing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from vidattn.calls import DividedCall

__all__ = ["Mixing", "Sequences", "sequences_of"]


@dataclass(frozen=True)
class Mixing:
    """Channels that keys and values of a sequence take from other sequences; each clip is one sequence, a frame.

    Attributes:
        segment: frames across whose ends nothing is mixed.
        shifts: (first, last, frame offset) of ranges of concatenated channels, in ascending order.
    """

    segment: int
    shifts: tuple[tuple[int, int, int], ...]

    def head_groups(self, heads: int, head_dim: int, itemsize: int) -> list[tuple[int, int, Mixing]]:
        """Cut the heads into groups of neighbours: (first head, heads, what they take from elsewhere).

        Ranges that start or end off 16 bytes cannot be loaded 16 bytes at a time, and then nothing of their launch is.
        """
        cuts = [cut for first, last, _ in self.shifts for cut in (first, last)]
        odd = {cut // head_dim for cut in cuts if cut % head_dim * itemsize % 16 != 0}
        groups = []
        for _, members in itertools.groupby(range(heads), key=lambda head: head in odd):
            first_head, *more = members
            count = 1 + len(more)
            begin, end = first_head * head_dim, (first_head + count) * head_dim
            taken = tuple(shift for shift in self.shifts if shift[0] < end and shift[1] > begin)
            groups.append((first_head, count, replace(self, shifts=taken)))
        return groups


@dataclass(frozen=True)
class Sequences:
    """The sequences of one kind, and the heads that attend in them.

    Attributes:
        length: tokens of a sequence, a cls token included.
        has_cls: whether a cls token is among them.
        clips: clips of the batch.
        places: sequences of a clip.
        place_step: rows from one sequence to the next.
        slot_step: rows from one token of a sequence to the next.
        first_head: the first head.
        heads: their number.
        mixing: what their keys and values take from other sequences; None for nothing.
    """

    length: int
    has_cls: bool
    clips: int
    places: int
    place_step: int
    slot_step: int
    first_head: int
    heads: int
    mixing: Mixing | None = None

    @property
    def groups(self) -> int:
        """Sequences of the whole batch."""
        return self.clips * self.places

    @property
    def shifts(self) -> tuple[int, ...] | None:
        """Ranges of channels that come from other sequences, flat; None without."""
        return None if self.mixing is None else tuple(itertools.chain(*self.mixing.shifts)) or None


def sequences_of(call: DividedCall, rows: int, mixing: Mixing | None) -> list[Sequences]:
    """List the kinds of sequences in a call.

    Args:
        call: the call.
        rows: tokens of a clip besides the cls token.
        mixing: what keys and values take from other sequences; None for nothing.

    Returns:
        Those over time, then those over space; with ``mixing``, one for each group of heads.
    """
    if call.cls_sees_all:
        raise NotImplementedError("a cls token whose query sees the whole clip")
    batch, tokens, heads, head_dim = call.q.shape
    frames, sites, has_cls = call.num_frames, rows // call.num_frames, tokens > rows
    if mixing is not None:
        groups = mixing.head_groups(heads, head_dim, call.q.itemsize)
        return [Sequences(sites, False, batch, 1, sites, 1, *group) for group in groups]
    frame_step, site_step = (1, frames) if call.time_fastest else (sites, 1)
    over_time = Sequences(
        length=frames,
        has_cls=False,
        clips=batch,
        places=sites,
        place_step=site_step,
        slot_step=frame_step,
        first_head=0,
        heads=call.temporal_heads,
    )
    over_space = Sequences(
        length=sites + has_cls,
        has_cls=has_cls,
        clips=batch,
        places=frames,
        place_step=frame_step,
        slot_step=site_step,
        first_head=call.temporal_heads,
        heads=heads - call.temporal_heads,
    )
    return [kind for kind in (over_time, over_space) if kind.heads > 0]
