"""What a model is made of whose ranks compute some frames each; ``frames`` puts it together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from vidattn.twins import Twin

__all__ = ["Layout", "Part", "ShardedDrop", "ShardedModel", "ShardedModule", "backend_of"]


class Layout(NamedTuple):
    """Which frames each rank holds.

    Attributes:
        rank: this rank.
        frames: frames of the video at each rank.
        tokens: what they are along the time axis of the tokens.
        seed: the start of the random numbers of all ranks.
    """

    rank: int
    frames: tuple[int, ...]
    tokens: tuple[int, ...]
    seed: int

    @property
    def total(self) -> int:
        """Tokens along time of the whole clip."""
        return sum(self.tokens)

    @property
    def share(self) -> float:
        """Which share of the clip this rank holds: the weight of its mean in that of the clip."""
        return self.tokens[self.rank] / self.total

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
        clip: the ``ShardedClip`` that it is part of.
    """

    clip: ClassVar[Any]

    @property
    def layout(self) -> Layout:
        """Which frames of the clip that runs each rank holds."""
        layout: Layout | None = self.clip.layout
        if layout is None:
            raise RuntimeError("after shard_frames call the whole model, of which this is a part")
        return layout


class ShardedDrop(ShardedModule):
    """Stochastic depth or dropout of frames, which each rank draws for all frames of the clip."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Drop something of this rank's frames (B * own T, ...)."""
        if not self.training:
            return x
        layout = self.layout
        batch = x.shape[0] // layout.tokens[layout.rank]
        each = x.shape[1:] if isinstance(self, nn.Dropout) else (1,) * (x.ndim - 1)
        # What ones become is the factor of each number, or of each frame.
        factors = super().forward(x.new_ones(batch * layout.total, *each))  # type: ignore[misc]
        return x * factors.unflatten(0, (batch, layout.total))[:, layout.own].flatten(0, 1)


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

    def after_the_ranks(self) -> tuple[nn.Module, ...]:
        """Name the modules that see the same on every rank, so that what they drop at random is the same."""
        return ()

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
