"""Small video transformers learn which way a texture moves, with the reference attention and with the fused ops.

Run as ``python examples/train_motion.py`` (needs rich and matplotlib: ``pip install rich matplotlib``). A single frame
does not tell the direction, so a model must compare frames. Each model is trained twice side by side, from the same
weights on the same clips: what differs is only how its attention is computed, forward and backward. If the fused
gradients are right, the two loss curves are one.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import vidattn
import vidattn.models
from vidattn.backends import AttentionCall, choose_backend
from vidattn.cli import CommandError, Parser, check_picture, fail, need, positive, progress

RUNS = ("reference", "fused")
DIRECTIONS = ("right", "down", "left", "up")
SIZE, FRAMES, SPEED = 32, 8, 2  # pixels, frames of a clip, pixels a frame
# Cycles in SIZE pixels along x and y. They are whole numbers, so that a texture goes on beyond the edges, and come in
# pairs that mirror each other, so that no direction looks special.
WAVES = ((2, 0), (0, 2), (2, 2), (2, -2), (4, 0), (0, 4), (4, 4), (4, -4))
BATCH, HELD_OUT = 16, 512  # clips of a step, and of the test

# No dropout and no stochastic depth: the two runs shall differ in nothing but rounding.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "video_swin": (
        "video_swin_t",
        {
            "patch_size": (2, 4, 4),
            "embed_dim": 32,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": (4, 4, 4),
            "drop_path_rate": 0.0,
            "dropout_ratio": 0.0,
        },
    ),
    "timesformer": (
        "timesformer_base",
        {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "drop_path_rate": 0.0},
    ),
    "xvit": (
        "xvit_b16_8f",
        {
            "img_size": SIZE,
            "patch_size": 8,
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 4,
            "shift_div": 4,
            "consensus_type": "avg",
            "dropout_rate": 0.0,
        },
    ),
}
# Largest learning rate, steps: enough for each of the seeds that were tried (0, 1, 2).
SCHEDULES = {"video_swin": (1e-3, 120), "timesformer": (1e-3, 300), "xvit": (2e-3, 300)}


class Result(NamedTuple):
    """What the two trainings of a model gave, in the order of ``RUNS``.

    Attributes:
        losses: cross-entropy of each step, float64 (2, steps).
        seconds: median time of a step.
        accuracies: share of held-out clips whose direction is found.
        shuffled: the same with the frames of each clip in random order; at most half can be right, for that keeps the
            axis and hides the sign.
        frozen: the same with the first frame of each clip repeated: one in four, by chance.
    """

    losses: Tensor
    seconds: tuple[float, float]
    accuracies: tuple[float, float]
    shuffled: tuple[float, float]
    frozen: tuple[float, float]

    @property
    def difference(self) -> float:
        """Largest difference of the losses of a step, relative to the reference's."""
        return float(((self.losses[1] - self.losses[0]).abs() / self.losses[0]).max())

    @property
    def speedup(self) -> float:
        """How many times as fast the fused step is."""
        return self.seconds[0] / self.seconds[1]


def moving_textures(directions: Tensor, generator: torch.Generator) -> Tensor:
    """Renders textures that move: sums of plane waves with random phases.

    The phases are uniform and independent of the direction, so every frame by itself looks the same whatever the
    direction is; and a clip played backwards is one of the opposite direction.

    Args:
        directions: (B,) int64, indices of ``DIRECTIONS``.
        generator: draws the phases.

    Returns:
        Clips (B, 1, T, H, W) of mean 0 and variance 1.

    Example:
        >>> moving_textures(torch.tensor([0, 3]), torch.Generator()).shape
        torch.Size([2, 1, 8, 32, 32])
    """
    waves = torch.tensor(WAVES) * (2 * math.pi / SIZE)  # (waves, 2), radians a pixel
    velocities = SPEED * torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])[directions]  # (B, 2)
    start = 2 * math.pi * torch.rand(len(directions), len(waves), 1, generator=generator)
    phases = start - (velocities @ waves.T)[..., None] * torch.arange(FRAMES)  # (B, waves, T)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    angles = waves[:, 0, None, None] * columns + waves[:, 1, None, None] * rows  # (waves, H, W)
    # cos(angle + phase), taken apart so that the many values come from a matrix product
    video = torch.tensordot(phases.cos(), angles.cos(), ([1], [0]))
    video -= torch.tensordot(phases.sin(), angles.sin(), ([1], [0]))
    return video[:, None] * math.sqrt(2 / len(waves))


def draw_clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws clips of random directions: (count, 1, T, H, W) and (count,), see ``moving_textures``."""
    directions = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    return moving_textures(directions, generator), directions


def shuffle_frames(video: Tensor, generator: torch.Generator) -> Tensor:
    """Puts the frames of each clip (B, 1, T, H, W) into a random order of its own."""
    order = torch.rand(len(video), video.shape[2], generator=generator).argsort(1)
    return video.gather(2, order[:, None, :, None, None].expand_as(video))


def repeat_first_frame(video: Tensor) -> Tensor:
    """Shows the first frame of each clip (B, 1, T, H, W) all the time."""
    return video[:, :, :1].expand_as(video)


def build_model(name: str, seed: int) -> nn.Module:
    """Builds one of ``MODELS`` with random weights.

    The papers' deviation of 0.02 suits 768 channels, and their time embeddings start from zero because the images that
    they were trained on before have no time. A small model that starts from nothing learns sooner from weights that
    keep the variance and from frames that it can tell apart.

    Args:
        name: a key of ``MODELS``.
        seed: of the weights.

    Returns:
        The model in training mode, (B, 1, T, H, W) to (B, 4).
    """
    torch.manual_seed(seed)
    variant, overrides = MODELS[name]
    model = vidattn.models.create_model(variant, in_chans=1, num_classes=len(DIRECTIONS), **overrides)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    for key, parameter in model.named_parameters():
        if key.endswith(("time_embed", "temp_embed")):
            nn.init.normal_(parameter)
    return model.train()


def train(
    name: str,
    seed: int = 0,
    steps: int | None = None,
    transform: Callable[[Tensor], Tensor] = lambda video: video,
    advance: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
) -> Result:
    """Trains a model with the reference backend and with the fused ops, in turn step by step, and tests both.

    Args:
        name: a key of ``MODELS``.
        seed: of weights and clips.
        steps: optimizer steps; None for what the model needs.
        transform: applied to the clips that are trained on.
        advance: told the name, the steps done and the steps in total.

    Returns:
        Losses, times and accuracies of both.
    """
    rate, default_steps = SCHEDULES[name]
    steps = steps or default_steps
    model = build_model(name, seed)
    models = (model, copy.deepcopy(model))
    vidattn.accelerate(models[0], backend="reference")
    vidattn.accelerate(models[1])
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(seed)
    losses = torch.zeros(len(RUNS), steps, dtype=torch.float64)
    seconds: list[list[float]] = [[] for _ in RUNS]
    for step in range(steps):
        video, directions = draw_clips(BATCH, generator)
        video = transform(video)
        for run, (model, optimizer, schedule) in enumerate(zip(models, optimizers, schedules)):
            started = time.perf_counter()
            # In float32 a small loss would be rounded more coarsely than the logits are.
            loss = functional.cross_entropy(model(video).double(), directions)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds[run].append(time.perf_counter() - started)
            schedule.step()
            losses[run, step] = loss.detach()
        advance(name, step + 1, steps)

    generator.manual_seed(seed + 1)
    video, directions = draw_clips(HELD_OUT, generator)
    tests = (video, shuffle_frames(video, generator), repeat_first_frame(video))
    clean, shuffled, frozen = (
        (_accuracy(models[0], clips, directions), _accuracy(models[1], clips, directions)) for clips in tests
    )
    return Result(losses, (statistics.median(seconds[0]), statistics.median(seconds[1])), clean, shuffled, frozen)


@torch.no_grad()
def _accuracy(model: nn.Module, video: Tensor, directions: Tensor) -> float:
    model.eval()
    found = torch.cat([model(clips).argmax(1) for clips in video.split(BATCH)])
    return float((found == directions).float().mean())


def draw(results: dict[str, Result], path: Path) -> None:
    """Draws some frames of a clip of each direction, and the loss curves of each model.

    Args:
        results: of each model.
        path: image file to write.
    """
    import matplotlib
    from matplotlib.figure import Figure

    clips = moving_textures(torch.arange(len(DIRECTIONS)), torch.Generator().manual_seed(0))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2 + 3 * max(len(results), 2), 5.4), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 2))  # type: ignore[misc]
        # Two frames a direction: from one to the other the texture moves by SPEED pixels.
        for axes, (number, frame) in zip(above.subplots(1, 8), ((n, t) for n in range(4) for t in (0, 1))):
            axes.imshow(clips[number, 0, frame].numpy(), cmap="gray")
            axes.set_title(f"{DIRECTIONS[number]}, frame {frame + 1}", fontsize=8)
            axes.axis("off")
        for axes, (name, result) in zip(
            below.subplots(1, len(results), sharey=True, squeeze=False)[0], results.items()
        ):
            axes.plot(result.losses[0].numpy(), color="#8c8c8c", linewidth=4, label=RUNS[0])
            axes.plot(result.losses[1].numpy(), color="#0072b2", linewidth=1, label=RUNS[1])
            axes.set_title(
                f"{name}: {result.accuracies[1]:.0%} right, {result.speedup:.2f} times as fast\n"
                f"largest difference of the losses {result.difference:.0e}"
            )
            axes.set(xlabel="step", yscale="log")
            axes.legend(frameon=False)
        figure.supylabel("loss")
        figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the models, prints what came of it and draws a picture.

    Args:
        arguments: command line arguments; those of this process unless given.

    Returns:
        The exit code: 0, or 2 after a one-line error on stderr.
    """
    parser = Parser(prog="train_motion.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--steps", type=positive, metavar="N", help="of each training (default: what the model needs)")
    parser.add_argument("--output", type=Path, default=Path("motion.png"), metavar="FILE", help="default: motion.png")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and clips (default: 0)")
    options = parser.parse_args(arguments)
    try:
        need("rich", "matplotlib")
        check_picture(options.output)
    except CommandError as error:
        return fail(str(error))

    call = AttentionCall("window3d_attention", "cpu", torch.float32, head_dim=16)
    print(f"attention fused by backend {choose_backend(call, None)}", flush=True)
    with progress(options.models[0], plain=True) as advance:
        results = {name: train(name, options.seed, options.steps, advance=advance) for name in options.models}
    print(f"{'':<14}{'step, ms':^22}{'times as':>10}{'largest difference':>20}{'held-out clips right':>30}")
    print(f"{'':<14}{RUNS[0]:>12}{RUNS[1]:>10}{'fast':>10}{'of the losses':>20}", end="")
    print(f"{RUNS[0]:>12}{RUNS[1]:>8}{'shuffled':>10}{'frozen':>8}")
    for name, result in results.items():
        print(f"{name:<14}{1e3 * result.seconds[0]:12.1f}{1e3 * result.seconds[1]:10.1f}{result.speedup:10.2f}", end="")
        print(f"{result.difference:20.1e}{result.accuracies[0]:12.1%}{result.accuracies[1]:8.1%}", end="")
        print(f"{result.shuffled[1]:10.1%}{result.frozen[1]:8.1%}")
    draw(results, options.output)
    print(f"picture   {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
