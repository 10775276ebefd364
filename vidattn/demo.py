"""The demo: one clip through the reference model and the accelerated one, compared in numbers and in a picture.

Run as ``make demo`` or ``python -m vidattn.demo``. Without ``--clip`` it renders a short video of moving shapes first.
Each model's peak memory is measured in a process of its own; times are the best of a few interleaved runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vidattn.models
from vidattn.cli import CommandError, Parser, check_picture, explained, fail, need, positive, progress
from vidattn.cli_classify import accelerate_model, load_model, read_views
from vidattn.memory import PeakMemory, format_bytes

VARIANTS = ("reference", "accelerated")
# glibc: return freed memory at once, or a forward that reuses what building the model freed would seem to need none.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


class Comparison(NamedTuple):
    """What the demo found out, in the order of ``VARIANTS``.

    Attributes:
        logits: (num_classes,) float32 each.
        seconds: best time of a forward.
        bytes: peak memory of a forward beyond the model and its input; None where the system does not tell.
    """

    logits: tuple[Tensor, Tensor]
    seconds: tuple[float, float]
    bytes: tuple[int | None, int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: command line arguments; those of this process unless given.

    Returns:
        The exit code: 0, or 2 after a one-line error on stderr.

    Example:
        >>> main(["--output", "demo.png"])  # doctest: +SKIP
        0
    """
    parser = Parser(prog="python -m vidattn.demo", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clip", type=Path, help="video file; moving shapes are rendered unless given")
    parser.add_argument("--model", default="video_swin_t", metavar="NAME", help="default: video_swin_t")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; without them the model is random")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), metavar="FILE", help="default: demo.png")
    parser.add_argument(
        "--frames", type=positive, metavar="N", help="frames of the clip (default: as the model was tested)"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="timed runs of each model (default: 3)")
    # Set by the demo itself for the processes that measure memory.
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args(
        arguments, argparse.Namespace(stride=None, views=(1, 1), seed=0, device="cpu", dtype="float32", backend=None)
    )
    try:
        return _measure(options) if options.measure else _demo(options)
    except CommandError as error:
        return fail(str(error))


def _demo(options: argparse.Namespace) -> int:
    from vidattn.labels import default_labels

    need("rich", "av", "numpy", "matplotlib")
    with explained("--model"):
        spec = vidattn.models.get_input_spec(options.model)
    for name, file in (("--clip", options.clip), ("--checkpoint", options.checkpoint)):
        if file is not None and not file.is_file():
            raise CommandError(f"{name}: no such file: {file}")
    check_picture(options.output)

    with tempfile.TemporaryDirectory() as folder:
        title = str(options.clip)
        if options.clip is None:
            title = "moving shapes, rendered"
            length = (options.frames or spec.num_frames) * (spec.frame_stride or 1) + 16
            options.clip = render_shapes(Path(folder) / "shapes.mp4", num_frames=length)
        views = read_views(options, spec)
        batch = views.stack()  # one view: the centre crop of the middle clip
        model, weights = load_model(options, spec.num_classes)
        print(f"clip      {title}; {views.video_frames} frames, input {tuple(batch.shape)}")
        print(f"model     {options.model}")
        print(f"weights   {weights}")
        found = compare(model, batch, options, Path(folder))

    names = default_labels(spec.num_classes) or [f"class {index}" for index in range(spec.num_classes)]
    difference = float((found.logits[0] - found.logits[1]).abs().max())
    largest = float(found.logits[0].abs().max())
    print(f"\n{'':<28}{VARIANTS[0]:>14}{VARIANTS[1]:>14}")
    seconds = "".join(f"{value:>12.2f} s" for value in found.seconds)
    print(f"{f'time, best of {options.rounds}':<28}{seconds}   {found.seconds[0] / found.seconds[1]:.2f} times as fast")
    used = "".join(f"{format_bytes(value):>14}" for value in found.bytes)
    share = f"   {found.bytes[1] / found.bytes[0]:.0%} of it" if found.bytes[0] and found.bytes[1] is not None else ""
    print(f"{'peak memory of a forward':<28}{used}{share}")
    print(f"\nlargest logit difference {difference:.2e} (largest logit {largest:.2e})")
    draw(
        views.frames[list(views.clips[0])],
        names,
        found,
        f"{options.model}, {title}\nweights: {weights.splitlines()[0]}",
        options.output,
    )
    print(f"picture   {options.output}")
    return 0


def compare(model: torch.nn.Module, batch: Tensor, options: argparse.Namespace, folder: Path) -> Comparison:
    """Runs the reference model and an accelerated copy of it on a batch.

    Args:
        model: the reference model in eval mode.
        batch: (1, 3, T, H, W) float32.
        options: the demo's options; the processes that measure memory are started with the same ones.
        folder: where the batch is handed over to those processes.

    Returns:
        Logits, times and peak memory of both.

    Example:
        >>> compare(model, batch, options, folder).seconds  # doctest: +SKIP
        (3.2, 1.4)
    """
    accelerated = copy.deepcopy(model)
    print(f"attention {accelerate_model(accelerated, options)}", flush=True)
    models = (model, accelerated)
    steps = len(models) * (options.rounds + 2)
    with progress("run", plain=True) as advance, torch.inference_mode():
        advance("run", 0, steps)
        logits: list[Tensor] = []
        best = [float("inf")] * len(models)
        for run in range(options.rounds + 1):  # the first round warms up, and its logits are compared
            for which, candidate in enumerate(models):
                started = time.perf_counter()
                output = candidate(batch)
                elapsed = time.perf_counter() - started
                if run == 0:
                    logits.append(output[0].clone())
                else:
                    best[which] = min(best[which], elapsed)
                advance("run", len(models) * run + which + 1, steps)
        torch.save(batch, folder / "batch.pt")
        used = []
        for which, variant in enumerate(VARIANTS):
            used.append(_peak_in_own_process(variant, folder / "batch.pt", options))
            advance("run", steps - len(models) + which + 1, steps)
    return Comparison((logits[0], logits[1]), (best[0], best[1]), (used[0], used[1]))


def _peak_in_own_process(variant: str, batch: Path, options: argparse.Namespace) -> int | None:
    command = [sys.executable, "-m", "vidattn.demo", "--model", options.model, "--measure", variant, str(batch)]
    if options.checkpoint:
        command += ["--checkpoint", str(options.checkpoint)]
    if options.frames:
        command += ["--frames", str(options.frames)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | RETURN_FREED)
    if finished.returncode:
        raise CommandError(f"measuring the memory of the {variant} model ended with exit code {finished.returncode}")
    return json.loads(finished.stdout.splitlines()[-1])


def _measure(options: argparse.Namespace) -> int:
    """Prints the peak memory in bytes of one forward in this process, beyond model, input and loaded code."""
    variant, file = options.measure
    spec = vidattn.models.get_input_spec(options.model)
    model, _ = load_model(options, spec.num_classes)
    if variant == "accelerated":
        accelerate_model(model, options)
    batch = torch.load(file, weights_only=True)
    with torch.inference_mode():
        model(batch)  # loads code and starts threads, which are not the model's memory
        model.eval()  # what it keeps of a first call is: here it is forgotten
        with PeakMemory() as memory:
            model(batch)
    print(json.dumps(memory.growth))
    return 0


def render_shapes(path: Path, num_frames: int = 80, height: int = 256, width: int = 320) -> Path:
    """Writes a video of a disc, a square and a ring that move over a gradient.

    Args:
        path: the file to write, MPEG-4 video.
        num_frames: its length; 25 frames a second.
        height: rows, pixels, even.
        width: columns, pixels, even.

    Returns:
        ``path``.

    Raises:
        ImportError: PyAV or NumPy is not installed.

    Example:
        >>> render_shapes(Path("shapes.mp4"), num_frames=10)  # doctest: +SKIP
        PosixPath('shapes.mp4')
    """
    import av
    import numpy as np

    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    background = np.stack([60 + 90 * rows / height, 70 + 80 * columns / width, 150 - 60 * rows / height], axis=-1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = height, width, "yuv420p", 4_000_000
        for number in range(num_frames):
            turn = 2 * np.pi * number / 80
            image = background.copy()
            disc = np.hypot(rows - height * (0.5 + 0.3 * np.sin(turn)), columns - width * (0.5 + 0.35 * np.cos(turn)))
            image[disc < height / 8] = (230, 80, 60)
            top, left = height * (0.5 + 0.3 * np.cos(2 * turn)), width * (0.25 + 0.15 * np.sin(turn))
            image[(abs(rows - top) < height / 10) & (abs(columns - left) < height / 10)] = (70, 200, 120)
            ring = np.hypot(rows - height * 0.5, columns - width * ((0.1 + number / 80) % 1.0))
            image[abs(ring - height / 7) < height / 40] = (250, 220, 90)
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def draw(frames: Tensor, names: Sequence[str], found: Comparison, title: str, path: Path) -> None:
    """Draws frames of the clip, the likeliest classes by both models, and bars of time and memory.

    Args:
        frames: the clip, uint8 RGB (T, 3, height, width).
        names: class names.
        found: the comparison.
        title: of the picture.
        path: image file to write.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> draw(frames, names, found, "Swin-T", Path("demo.png"))  # doctest: +SKIP
    """
    import matplotlib
    from matplotlib.figure import Figure

    colours = ("#8c8c8c", "#0072b2")
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        figure.suptitle(title)
        panels: Any = figure.subfigures(2, 1, height_ratios=(1, 2))
        above, below = panels
        picked = torch.linspace(0, len(frames) - 1, min(6, len(frames))).round().long().tolist()
        for axes, number in zip(above.subplots(1, len(picked), squeeze=False)[0], picked, strict=True):
            axes.imshow(frames[number].permute(1, 2, 0).numpy())
            axes.set_title(f"frame {number + 1} of {len(frames)}", fontsize=8)
            axes.axis("off")

        classes, times, memory = below.subplots(1, 3, width_ratios=(2.4, 1, 1))
        probabilities = [logits.softmax(-1) for logits in found.logits]
        best = probabilities[0].topk(min(5, len(names))).indices.tolist()
        for which, (values, colour) in enumerate(zip(probabilities, colours, strict=True)):
            places = [place + 0.4 * which for place in range(len(best))]
            classes.barh(places, 100 * values[best].numpy(), height=0.38, color=colour, label=VARIANTS[which])
        classes.set_yticks([place + 0.2 for place in range(len(best))], [names[index] for index in best])
        classes.invert_yaxis()
        difference = (found.logits[0] - found.logits[1]).abs().max()
        classes.set_title(f"probability, %  (largest logit difference {difference:.1e})")
        classes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)

        mebibytes = [(value or 0) / 2**20 for value in found.bytes]
        for axes, heights, name, form in (
            (times, list(found.seconds), "time, s", "{:.2f}"),
            (memory, mebibytes, "peak memory, MiB", "{:.0f}"),
        ):
            axes.bar_label(axes.bar(VARIANTS, heights, color=colours), [form.format(height) for height in heights])
            axes.set_title(name)
            axes.margins(y=0.12)
        figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
