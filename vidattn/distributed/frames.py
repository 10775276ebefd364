"""Clips that no single device holds: each rank computes some of the frames, and the model computes what it always did.

``shard_frames`` turns the modules of a bundled model that look across frames into subclasses of what they are, in
place; all others work on a rank's frames as they would on a whole clip. What a subclass does differently is in a file
for each family: ``_divided``, ``_mixing``,
``_windows``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call

from vidattn.distributed import _divided, _mixing, _windows
from vidattn.distributed._exchange import Ranks, evenly
from vidattn.distributed._sharding import Layout, Part, ShardedModel
from vidattn.messages import describe
from vidattn.models.timesformer import TimeSformer
from vidattn.models.video_swin import Recognizer3D
from vidattn.models.vivit import SpaceTimeViViT, ViViT
from vidattn.models.xvit import XViT
from vidattn.twins import Twin, why_overridden

__all__ = ["ShardedClip", "shard_frames"]


class _Body(nn.Module):
    """The model with its parameters in one place, for ``functional_call``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Tensor) -> Tensor:
        logits: Tensor = self.model.logits(part)  # type: ignore[operator]
        return logits


class ShardedClip:
    """What ``shard_frames`` made of a model: how its clips are cut, and the way back.

    Attributes:
        mesh: the ranks that hold the parts, in the order of the frames.
        ranks: what they exchange goes through here.
        layout: which frames of the last clip each rank holds; None before there was one.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.ranks = Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())
        self.layout: Layout | None = None
        self._model: Any = model
        self._undo: list[tuple[nn.Module, type, type]] = []

    def split(self, video: Tensor) -> Tensor:
        """Cut out this rank's frames.

        Parts are as equal as they can be in units of what may not be cut apart: a frame, the frames of a ViViT tubelet,
        a Video Swin window. The first ranks have one unit more where it does not go evenly; a unit that is not whole,
        and frames that fill no tubelet, are on the last rank. Of models that sample frames uniformly, it takes the
        sampled ones.

        Args:
            video: the whole clip (B, channels, T, H, W); or whatever else has T numbers along axis 2 of five, such as
                the numbers of the frames, which says what to read from a file.

        Returns:
            This rank's frames, as a view of the clip where no frames are sampled.

        Raises:
            TypeError: ``video`` is no tensor.
            ValueError: it has not five axes, or some rank would hold no frame: the message says how many ranks are
                possible.
        """
        if not isinstance(video, Tensor):
            raise TypeError(f"split: video: expected a tensor, got {describe(video)}")
        if video.ndim != 5:
            raise ValueError(f"split: video: expected (batch, channels, frames, height, width), got {describe(video)}")
        video = self._model.frames_used(video)
        return video.split(self._cut(self._model, video.shape[2]), dim=2)[self.ranks.rank]

    def revert(self) -> None:
        """Make the model what it was.

        Raises:
            RuntimeError: somebody changed a module's class since; nothing is reverted.
        """
        changed = [type(module).__name__ for module, sharded, _ in self._undo if type(module) is not sharded]
        if changed:
            raise RuntimeError(
                f"revert: {len(changed)} modules are of another class since shard_frames, the first is a {changed[0]}: "
                "undo that first"
            )
        for module, _, previous in self._undo:
            module.__class__ = previous
        self._undo.clear()

    def _shard(self) -> None:
        sharded = _MODELS[type(self._model)]
        parts = [Part(self._model, type(self._model), sharded), *sharded.parts(self._model)]
        names = {module: name for name, module in self._model.named_modules()}
        for module, original, _ in parts:
            kind: Any = type(module)
            known = kind.replaced if issubclass(kind, Twin) else kind
            reason = why_overridden(module)
            if known is not original or reason is not None:
                raise ValueError(
                    f"shard_frames: model: expected {names[module] or 'it'} to be a {original.__name__} as it is "
                    f"bundled, got {reason or _qualified_name(kind)}"
                )
        for module, _, sharded in parts:
            previous: Any = type(module)
            kind = type(f"Sharded{previous.__name__}", (sharded, previous), {"__module__": __name__, "clip": self})
            self._undo.append((module, kind, previous))
            module.__class__ = kind

    def _cut(self, model: Any, frames: int) -> list[int]:
        """Tell how many frames each rank gets."""
        unit = model.unit(frames)
        units = -(-model.tokens_of(frames) // max(model.tokens_of(unit), 1))
        if units < self.ranks.size:
            raise ValueError(
                f"shard_frames: mesh: expected at most {units} ranks for {frames} frames, which may be cut after each "
                f"{unit}, got {self.ranks.size}"
            )
        sizes = [share * unit for share in evenly(units, self.ranks.size)]
        sizes[-1] = frames - sum(sizes[:-1])
        return sizes

    def _agree(self, model: Any, part: Tensor) -> Layout:
        """Find out what the other ranks hold. What is wrong with any part is an error on every rank."""
        if not isinstance(part, Tensor):
            raise TypeError(f"part: expected a tensor, got {describe(part)}")
        seed = int(torch.randint(2**62, ())) if _draws(model) else 0
        numbers = self.ranks.integers([seed, part.ndim, *(*part.shape, 0, 0, 0, 0, 0)[:5]], part.device)
        seed, shapes = numbers[0][0], [row[1:] for row in numbers]
        frames = [shape[3] for shape in shapes]
        if any(shape[0] != 5 or shape[:3] + shape[4:] != shapes[0][:3] + shapes[0][4:] for shape in shapes):
            found = ", ".join(str(tuple(shape[1 : 1 + shape[0]])) for shape in shapes)
            raise ValueError(
                f"part: expected (batch, channels, frames, height, width), alike on all ranks but for the frames, "
                f"got {found}"
            )
        expected = self._cut(model, sum(frames))
        if frames != expected:
            raise ValueError(f"part: expected {expected} frames on the ranks, as split() cuts them, got {frames}")
        return Layout(self.ranks.rank, tuple(frames), tuple(model.tokens_of(size) for size in frames), seed)

    def run(self, model: Any, part: Tensor) -> Tensor:
        """Map this rank's frames to the logits of the whole clip, and tie the gradients of the ranks together."""
        self.layout = self._agree(model, part)
        body = _Body(model)
        sharded = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
        if sharded:  # a DTensor; to import its class takes seconds
            raise ValueError(
                f"shard_frames: model: expected every rank to have all parameters, got {len(sharded)} that are sharded "
                f"themselves, the first is {sharded[0]}"
            )
        learned = {name: p for name, p in body.named_parameters() if p.requires_grad and torch.is_grad_enabled()}
        shared = dict(zip(learned, self.ranks.sum_gradients(list(learned.values())), strict=True)) if learned else {}
        with _same_numbers(self.layout.seed, part.device):
            logits: Tensor = functional_call(body, shared, (part,))
        return self.ranks.share_gradient(logits)


def _draws(model: Any) -> bool:
    """Whether something is dropped at random now; raises where that would be numbers of some ranks alone."""
    alike = {inner for module in model.after_the_ranks() for inner in module.modules()}
    drawing = False
    for name, module in model.named_modules():
        if not module.training:
            continue
        rates = {rate: getattr(module, rate, 0.0) for rate in ("p", "dropout_rate", "drop_prob")}
        drops = [rate for rate, value in rates.items() if isinstance(value, (int, float)) and value > 0]
        if drops and drops[0] != "drop_prob" and module not in alike:
            raise ValueError(
                f"shard_frames: model: expected dropout of 0 in training, because no rank could draw it for the tokens "
                f"of all, got {drops[0]}={rates[drops[0]]} of {name}"
            )
        drawing = drawing or bool(drops)
    return drawing


@contextlib.contextmanager
def _same_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers on all ranks, which are in the same places of the model; 0 for none."""
    if not seed:
        yield
        return
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(seed)
        yield


_MODELS: dict[type, Any] = {
    TimeSformer: _divided.ShardedTimeSformer,
    ViViT: _divided.ShardedViViT,
    SpaceTimeViViT: _divided.ShardedSpaceTimeViViT,
    XViT: _mixing.ShardedXViT,
    Recognizer3D: _windows.ShardedRecognizer,
}


def shard_frames(model: nn.Module, mesh: DeviceMesh) -> ShardedClip:
    """Cut the clips that a bundled model sees over the ranks of a mesh, in place.

    Each rank gets some frames of a clip, ``part = clip.split(video)``, and ``model(part)`` returns the logits of the
    whole clip on every rank, as one process would compute them. After the backward pass of a loss of those logits, the
    same loss on every rank, every rank holds the parameter gradients of one process; so optimizers keep the parameters
    alike, which they must be to begin with. (Of losses that differ, it is the gradients of their mean.) A gradient that
    ``part`` requires is that of this rank's frames.

    All ranks must call the model together, with gradients or all without. Stochastic depth, and dropout where every
    rank has the same numbers (the heads of X-ViT and Video Swin, the temporal encoder of ViViT model 2), are drawn as
    in one process, from a seed that the generator of rank 0 gives. Dropout of tokens raises in training, unless its
    rate is 0.
    Parameters, state dict, devices and modes stay as they are. An accelerated model stays accelerated: the kernels
    attend to what a rank holds. ``vidattn.accelerate`` may also come afterwards; it then swaps what was not changed
    here, which is all attention of Video Swin and of TimeSformer's divided blocks, while attention of ViViT and X-ViT
    that needs other ranks' frames stays plain. Revert in the reverse order.

    Args:
        model: a bundled video classifier, as ``vidattn.models.create_model`` builds it; the same on all ranks.
        mesh: the ranks, a mesh of one dimension on the model's kind of device. Part r of the clip belongs to rank r.

    Returns:
        The cut: ``split()`` gives this rank's frames, ``revert()`` makes the model what it was.

    Raises:
        TypeError: ``model`` is none of the bundled classifiers, or ``mesh`` no ``DeviceMesh``.
        ValueError: the mesh has more than one dimension or this rank is not in it, or a module of the model is not as
            it is bundled.

    Reference:
        The all-to-all between two ways to cut is that of DeepSpeed Ulysses, arXiv 2309.14509, section 3, there between
        tokens and heads.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from vidattn.models import create_model
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = create_model("timesformer_base", img_size=32, num_classes=5, embed_dim=24, depth=2, num_heads=2)
        >>> clip = shard_frames(model, init_device_mesh("cpu", (1,)))
        >>> model(clip.split(torch.zeros(1, 3, 8, 32, 32))).shape
        torch.Size([1, 5])
        >>> dist.destroy_process_group()
    """
    if type(model) not in _MODELS:
        known = ", ".join(kind.__name__ for kind in _MODELS)
        found = "one that is sharded already" if isinstance(model, ShardedModel) else _qualified_name(type(model))
        raise TypeError(f"shard_frames: model: expected one of {known}, as they are bundled, got {found}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"shard_frames: mesh: expected a DeviceMesh, got {describe(mesh)}")
    if mesh.ndim != 1:
        raise ValueError(f"shard_frames: mesh: expected one dimension, as mesh[name] gives, got {mesh.ndim}")
    if mesh.get_coordinate() is None:
        raise ValueError("shard_frames: mesh: expected this process to be in it, got one of other processes")
    clip = ShardedClip(model, mesh)
    clip._shard()
    return clip


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
