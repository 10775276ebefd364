"""Draw where a video transformer looks, over the frames of a clip.

Run as ``python examples/attention_maps.py --clip clip.mp4 --checkpoint weights.pth`` (needs av, rich, matplotlib and
numpy). Without a clip it renders moving shapes; without a checkpoint the weights are random, and so are the maps. Each
row of the picture is one attention: what the token at ``--row`` and ``--column`` of the middle frame looks at, as the
mean over the heads, in every frame.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidattn
import vidattn.models
from vidattn.cli import CommandError, Parser, check_picture, explained, fail, need, positive
from vidattn.cli_classify import load_model, read_views
from vidattn.demo import render_shapes

SHOWN = 6  # frames in a row


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, capture and draw.

    Args:
        arguments: command line arguments; those of this process unless given.

    Returns:
        The exit code: 0, or 2 after a one-line error on stderr.

    Example:
        >>> main(["--model", "timesformer_base", "--output", "maps.png"])  # doctest: +SKIP
        0
    """
    parser = Parser(prog="attention_maps.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clip", type=Path, help="video file; moving shapes are rendered unless given")
    parser.add_argument("--model", default="timesformer_base", metavar="NAME", help="default: timesformer_base")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; without them the model is random")
    parser.add_argument("--frames", type=positive, metavar="N", help="frames of the clip")
    parser.add_argument("--row", type=float, default=0.5, help="place of the query, 0 is the top (default: 0.5)")
    parser.add_argument("--column", type=float, default=0.5, help="place of the query, 0 is the left (default: 0.5)")
    parser.add_argument(
        "--layers", default="2", metavar="N", type=positive, help="last so many attentions (default: 2)"
    )
    parser.add_argument("--output", type=Path, default=Path("maps.png"), metavar="FILE", help="default: maps.png")
    settings = {"stride": None, "views": (1, 1), "seed": 0, "device": "cpu", "dtype": "float32", "backend": None}
    options = parser.parse_args(arguments, argparse.Namespace(**settings))
    try:
        return _run(options)
    except CommandError as error:
        return fail(str(error))


def _run(options: argparse.Namespace) -> int:
    need("rich", "av", "numpy", "matplotlib")
    with explained("--model"):
        spec = vidattn.models.get_input_spec(options.model)
    check_picture(options.output)
    for name in ("row", "column"):
        if not 0.0 <= getattr(options, name) <= 1.0:
            raise CommandError(f"--{name}: expected a number from 0 to 1, got {getattr(options, name)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.clip is None:
            length = (options.frames or spec.num_frames) * (spec.frame_stride or 1) + 16
            options.clip = render_shapes(Path(folder) / "shapes.mp4", num_frames=length)
        views = read_views(options, spec)
    batch = views.stack()
    model, weights = load_model(options, spec.num_classes)
    maps = look(model, batch, options)
    print(f"weights   {weights}")
    for name, found in maps.items():
        frames, height, width = found.shape
        print(f"{name}: {frames} x {height} x {width} tokens, most on {_largest(found)}")
    draw(batch, maps, options.output)
    print(f"picture   {options.output}")
    return 0


def look(model: torch.nn.Module, batch: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """Capture what one token attends to.

    Args:
        model: the model in eval mode.
        batch: (1, 3, T, H, W).
        options: row, column and layers.

    Returns:
        The mean over the heads on the grid of tokens (T, H, W) by module, of the last ``layers`` attentions.

    Example:
        >>> look(model, batch, options)["model.blocks.11.spatial_attention"].shape  # doctest: +SKIP
        torch.Size([8, 14, 14])
    """
    # A first run tells the grid of each attention, with one query that is there in all of them.
    with torch.no_grad(), vidattn.capture_attention(model, queries=[0]) as first:
        model(batch)
    maps = {}
    for name in list(first.maps)[-options.layers :]:
        grid = first.grids[name]
        tokens = grid[0] * grid[1] * grid[2]
        cls = first.maps[name].shape[-1] - tokens
        parts = (0.5, options.row, options.column)
        place = [min(int(part * size), size - 1) for part, size in zip(parts, grid, strict=True)]
        order = (1, 2, 0) if options.model.startswith("timesformer") else (0, 1, 2)  # the slowest axis first
        number = 0
        for axis in order:
            number = number * grid[axis] + place[axis]
        with torch.no_grad(), vidattn.capture_attention(model, queries=[number + cls]) as captured:
            model(batch)
        row = captured.maps[name][0, :, 0, cls:].mean(0)  # (S,)
        lying = row.view([grid[axis] for axis in order])
        maps[name] = lying.permute([order.index(axis) for axis in range(3)])
    return maps


def _largest(found: Tensor) -> str:
    frame, row, column = torch.unravel_index(found.argmax(), found.shape)
    return f"frame {int(frame) + 1}, row {int(row) + 1}, column {int(column) + 1} ({found.max():.1%})"


def draw(batch: Tensor, maps: dict[str, Tensor], path: Path) -> None:
    """Draw the maps over the frames of a clip.

    Args:
        batch: (1, 3, T, H, W), normalised as the model takes it.
        maps: (T', H', W') by name.
        path: image file to write.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> draw(batch, maps, Path("maps.png"))  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    clip = batch[0].permute(1, 2, 3, 0)  # (T, H, W, 3)
    low, high = clip.amin(), clip.amax()
    clip = (clip - low) / (high - low)
    picked = torch.linspace(0, len(clip) - 1, min(SHOWN, len(clip))).round().long().tolist()
    figure = Figure(figsize=(2 * len(picked), 2.2 * len(maps)), layout="constrained")
    rows: Any = figure.subplots(len(maps), len(picked), squeeze=False)
    for axes_of_row, (name, found) in zip(rows, maps.items(), strict=True):
        for axes, number in zip(axes_of_row, picked, strict=True):
            step = min(number * len(found) // len(clip), len(found) - 1)
            axes.imshow(clip[number].numpy())
            height, width = clip.shape[1:3]
            shades: dict[str, Any] = {"cmap": "inferno", "alpha": 0.6, "vmin": 0, "vmax": float(found.max())}
            axes.imshow(found[step].numpy(), extent=(0, width, height, 0), **shades)
            axes.set_title(f"frame {number + 1}", fontsize=8)
            axes.axis("off")
        axes_of_row[0].set_title(f"{name}\nframe {picked[0] + 1}", fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
