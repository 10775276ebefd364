"""What a model is made of whose ranks compute some frames each; :mod:`~vidattn.distributed.frames` puts it together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from vidattn.twins import Twin

__all__ = ["Layout", "Part", "ShardedModel", "ShardedModule", "backend_of"]


class Layout(NamedTuple):
    """Which frames each rank holds.

    Attributes:
        rank: this rank.
        frames: frames of the video at each rank.
        tokens: what they are along the time axis of the tokens.
    """

    rank: int
    frames: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens along time of the whole clip."""
        return sum(self.tokens)

    @property
    def own(self) -> slice:
        """Where this rank's tokens are on the time axis of the whole clip."""
        times = self.times(self.rank)
        return slice(times.start, times.stop)

    def times(self, rank: int) -> range:
        """Give the places of a rank's tokens on the time axis of the whole clip."""
        start = sum(self.tokens[:rank])
        return range(start, start + self.tokens[rank])


class Part(NamedTuple):
    """A module to change: it must be of the class ``original``, accelerated or not; ``sharded`` goes before it."""

    module: nn.Module
    original: type[nn.Module]
    sharded: type


class ShardedModule:
    """What a module becomes: a subclass of this one and of what it was.

    Attributes:
        clip: the :class:`~vidattn.distributed.ShardedClip` that it is part of.
    """

    clip: ClassVar[Any]

    @property
    def layout(self) -> Layout:
        """Which frames of the clip that runs each rank holds."""
        layout: Layout | None = self.clip.layout
        if layout is None:
            raise RuntimeError("after shard_frames call the whole model, of which this is a part")
        return layout


class ShardedModel(ShardedModule):
    """What a whole model becomes; the classes of the families are its subclasses."""

    def parts(self) -> Iterator[Part]:
        """List the modules inside the model that have to change."""
        raise NotImplementedError

    def frames_used(self, video: Tensor) -> Tensor:
        """Select the frames of a video that the model looks at."""
        return video

    def tokens_of(self, frames: int) -> int:
        """Tell how many tokens along time a number of frames becomes."""
        return frames

    def unit(self, frames: int) -> int:
        """Tell how many frames of a clip may not be cut apart."""
        return 1

    def logits(self, part: Tensor) -> Tensor:
        """Map this rank's frames to the logits of the whole clip."""
        raise NotImplementedError

    def forward(self: Any, part: Tensor) -> Tensor:
        """Map this rank's frames (B, channels, frames, H, W) to the logits of the whole clip, on every rank."""
        return self.clip.run(self, part)

    def forward_features(self: Any, *_: Any) -> Tensor:
        """Refuse: no rank has the features of a clip."""
        raise RuntimeError("forward_features: a model after shard_frames gives logits alone; revert() it first")


def backend_of(module: nn.Module) -> str | None:
    """Choose the backend of attention that a module, accelerated or not, has no function of its own for."""
    return module.attention_backend if isinstance(module, Twin) else "reference"
