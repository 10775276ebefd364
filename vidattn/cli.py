"""The command ``vidattn``: what is installed, a clip classified, the benchmarks run."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

import vidattn.models
import vidattn.ops
from vidattn.backends import AttentionCall, choose_backend
from vidattn.memory import PeakMemory, format_bytes

if TYPE_CHECKING:
    from vidattn.video import VideoViews

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CommandError(Exception):
    """What is wrong and what to do about it, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after ``vidattn``; those of this process unless given.

    Returns:
        The exit code: 0, or 2 after a one-line error on stderr; ``vidattn bench`` returns pytest's.

    Example:
        >>> main(["info"])  # doctest: +SKIP
        0
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options, rest)
    except CommandError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130


def fail(message: str) -> int:
    """Prints an error as one line on stderr and returns the exit code for it."""
    print(f"vidattn: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message as one line and exits with code 2."""
        sys.exit(fail(f"{message} (see {self.prog} --help)"))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vidattn", description="Exact, fast attention for video transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"vidattn {vidattn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)

    command = commands.add_parser("info", help="versions, what is built, which backends can run and why not")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "classify",
        help="classify a video clip",
        description="Classify a video clip by the test protocol of the model's paper.",
        allow_abbrev=False,
    )
    add = command.add_argument
    add("clip", metavar="CLIP", type=Path, help="video file")
    add("--model", required=True, metavar="NAME", help=f"one of {', '.join(vidattn.models.list_models())}")
    add("--checkpoint", metavar="FILE", type=Path, help="weights, a file or a folder; without them the model is random")
    add("--frames", metavar="N", type=positive, help="frames of a clip (default: as the model was tested)")
    add("--stride", metavar="N", type=positive, help="distance of the frames (default: as the model was tested)")
    add(
        "--views",
        metavar="CLIPSxCROPS",
        type=_views,
        default=(1, 1),
        help="views to average, such as 4x3 (default: 1x1)",
    )
    add(
        "--backend",
        choices=["auto", *vidattn.list_backends()],
        help="what computes the attention (default: VIDATTN_BACKEND, else auto)",
    )
    add("--labels", metavar="FILE", type=Path, help="class names, one a line (default: Kinetics-400's for 400 classes)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of weights and activations (default: float32)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default: cpu)")
    add("--topk", metavar="K", type=positive, default=5, help="classes to print (default: 5)")
    add("--seed", metavar="N", type=int, default=0, help="of the random weights (default: 0)")
    command.set_defaults(run=_classify)

    command = commands.add_parser(
        "bench",
        help="run the benchmarks of a source checkout",
        description="Run `pytest benchmarks/ --benchmark-only` in a source checkout; other arguments go to pytest.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_bench)
    return parser


def positive(text: str) -> int:
    """Reads a whole number from 1; a type of arguments."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _views(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected CLIPSxCROPS with 1 or 3 crops, such as 1x1 or 4x3, got {text!r}")
    return int(match[1]), int(match[2])


# --- vidattn info -------------------------------------------------------------------------------------


def _info(options: argparse.Namespace, rest: Sequence[str]) -> int:
    ops = vidattn.ops.__all__
    reasons = {(op, backend): vidattn.why_not(op, backend=backend) for op in ops for backend in vidattn.list_backends()}
    built = [name for name in ("cpu", "cuda") if not all(reasons[op, name] for op in ops)]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows = [
        ("vidattn", f"{vidattn.__version__}, {Path(vidattn.__file__).parent}"),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _version("triton")),
        (
            "extension",
            f"built with kernels for {' and '.join(built)}" if built else "not in use, see the reasons below",
        ),
        ("CUDA", f"torch built for {torch.version.cuda or 'none'}; devices: {', '.join(gpus) or 'none'}"),
        ("CPU kernels", _told(_instruction_sets) if "cpu" in built else "none"),
        ("backend", f"{_told(vidattn.current_backend)} (VIDATTN_BACKEND, set_backend)"),
        ("video", f"PyAV {_version('av')}, rich {_version('rich')}"),
    ]
    for name, value in rows:
        print(f"{name:<12}{value}")
    for op in ops:
        print(f"\n{op}")
        for backend in vidattn.list_backends():
            print(f"  {backend:<11}{'; '.join(reasons[op, backend]) or 'available'}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _instruction_sets() -> str:
    return f"{torch.ops.vidattn._cpu_isa()} (this machine runs {torch.ops.vidattn._cpu_isas().replace(',', ', ')})"


def _told(question: Callable[[], str]) -> str:
    """Returns the answer, or why there is none: a wrong setting must not keep this report from appearing."""
    try:
        return question()
    except (RuntimeError, ValueError, AttributeError) as error:
        return str(error).splitlines()[0]


# --- vidattn classify ---------------------------------------------------------------------------------


def _classify(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from vidattn.labels import default_labels, load_labels

    need("rich", "av", "numpy")
    with explained("--model"):
        spec = vidattn.models.get_input_spec(options.model)
    for name, file in (("CLIP", options.clip), ("--checkpoint", options.checkpoint), ("--labels", options.labels)):
        if file is not None and not (file.exists() if name == "--checkpoint" else file.is_file()):
            raise CommandError(f"{name}: no such file: {file}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device: this torch sees no CUDA device; use --device cpu")
    with explained("--labels"):
        labels = load_labels(options.labels) if options.labels else None
    num_classes = spec.num_classes if labels is None else len(labels)
    labels = labels or default_labels(num_classes)

    started = time.perf_counter()
    views = read_views(options, spec)
    decoding = time.perf_counter() - started
    model, weights = load_model(options, spec, num_classes)
    attention = accelerate_model(model, options)

    height, width = views.frames.shape[-2:]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"clip        {options.clip}: {views.video_frames} frames, resized to {width} x {height}")
    print(
        f"views       {len(views.clips)} clip(s) x {len(views.boxes)} crop(s) of {len(views.clips[0])} frames, "
        f"{views.crop} x {views.crop}"
    )
    repeated = len(views.clips[-1]) - len(set(views.clips[-1]))
    if repeated:
        print(f"            the video ends before the clip does: its last frame comes {repeated + 1} times")
    print(f"model       {options.model}, {parameters / 1e6:.1f} M parameters, {options.dtype} on {options.device}")
    print(f"weights     {weights}")
    print(f"attention   {attention}", flush=True)

    with PeakMemory(options.device) as memory:
        started = time.perf_counter()
        probabilities = _average(model, views, options)
        computing = time.perf_counter() - started

    print()
    best = probabilities.topk(min(options.topk, num_classes)).indices.tolist()
    for rank, index in enumerate(best, start=1):
        print(f"{rank:3d}  {100 * float(probabilities[index]):6.2f} %  {labels[index] if labels else f'class {index}'}")
    kind = "memory torch allocated on the device" if options.device == "cuda" else "resident memory of this process"
    print(f"\ntime        {decoding:.2f} s decoding, {computing:.2f} s model ({len(views)} view(s))")
    print(f"peak memory {format_bytes(memory.peak)} {kind}, {format_bytes(memory.growth)} of it for running the model")
    return 0


def read_views(options: argparse.Namespace, spec: Any) -> VideoViews:
    """Reads the views that the options ask for, showing progress."""
    from vidattn.video import ClipTooShortError, load_views

    clips, crops = options.views
    if spec.sampling == "uniform" and (clips != 1 or options.stride):
        raise CommandError(
            f"--views, --stride: {options.model} sees one clip, spread over the whole video; "
            f"use --views 1x{crops} and no --stride"
        )
    with progress() as advance, explained("CLIP"), _warnings_in_one_line():
        try:
            return load_views(
                options.clip,
                spec,
                num_frames=options.frames,
                frame_stride=options.stride,
                num_clips=clips,
                num_crops=crops,
                progress=advance,
            )
        except ClipTooShortError as error:
            frames = options.frames or spec.num_frames
            stride = 1 if spec.sampling == "uniform" else options.stride or spec.frame_stride
            ways = [f"--frames {error.max_frames}"] + [f"--stride {error.max_stride}"] * bool(error.max_stride)
            raise CommandError(
                f"{options.clip} has {error.available} frames, but {frames} frames at stride {stride} need "
                f"{(frames - 1) * stride + 1}; use {' or '.join(ways)}"
            ) from None


def load_model(options: argparse.Namespace, spec: Any, num_classes: int) -> tuple[torch.nn.Module, str]:
    """Builds the model in eval mode and says where its weights come from: random unless there is a checkpoint."""
    torch.manual_seed(options.seed)
    length = {"num_frames": options.frames} if spec.fixed_length and options.frames else {}
    with explained("--frames"):
        model = vidattn.models.create_model(options.model, num_classes=num_classes, **length)
    weights = f"RANDOM (seed {options.seed}): the classes mean nothing; --checkpoint FILE loads trained ones"
    if options.checkpoint is None:
        for layer in model.modules():
            # Some classifiers and temporal branches start from zero, which would hide all that comes before them.
            if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
                torch.nn.init.normal_(layer.weight, std=0.02)
    else:
        with explained("--checkpoint"):
            report = vidattn.models.load_checkpoint(model, options.checkpoint)
        weights = f"{options.checkpoint}: {report}"
        if report.missing:
            weights += "\nThe checkpoint has nothing for the tensors called missing: THESE ARE RANDOM."
    return model.eval().to(options.device, DTYPES[options.dtype]), weights


def _average(model: torch.nn.Module, views: VideoViews, options: argparse.Namespace) -> torch.Tensor:
    """Returns the class probabilities averaged over the views; lack of memory is an error that says what to do."""
    try:
        return _average_views(model, views, options)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            frames = len(views.clips[0])
            raise CommandError(
                f"not enough memory for {options.model} with {frames} frames; use fewer --frames or --dtype bfloat16"
            ) from error
        raise
    except ValueError as error:  # what a model says of clips that it does not take
        raise CommandError(f"--model {options.model}: {error}") from error


def _average_views(model: torch.nn.Module, views: VideoViews, options: argparse.Namespace) -> torch.Tensor:
    total = torch.zeros(())
    with progress(plain=True) as advance, torch.inference_mode():
        for index, view in enumerate(views):
            logits = model(view[None].to(options.device, DTYPES[options.dtype]))
            total = total + logits.float().softmax(-1)[0].cpu()  # softmax first, then the mean, as the papers do
            advance("view", index + 1, len(views))
    return total / len(views)


def accelerate_model(model: torch.nn.Module, options: argparse.Namespace) -> str:
    """Accelerates the model in place and says what was swapped and which backend computes the attention."""
    with explained("--backend"):
        result = vidattn.accelerate(model, backend=options.backend)
        ops = sorted({op for row in result.swapped for op in row.twin.ops})  # type: ignore[attr-defined]
        calls = [AttentionCall(op, options.device, DTYPES[options.dtype], head_dim=32) for op in ops]
        chosen = dict.fromkeys(choose_backend(call, options.backend) for call in calls)
    counts = f"{len(result.swapped)} modules accelerated, {len(result.skipped)} skipped"
    reasons = "".join(f"\n            {row.name} skipped: {row.reason}" for row in result.skipped)
    return f"backend {' and '.join(chosen) or 'none'}; {counts}{reasons}"


@contextmanager
def progress(plain: bool = False) -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows progress on stderr: bars on a terminal; elsewhere nothing, or with ``plain`` one line a step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)
            if plain and not console.is_terminal:
                print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)

        yield advance


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Shows each of the library's warnings once, without the line of code that it comes from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for text in dict.fromkeys(str(warning.message) for warning in caught):
                print(f"warning: {text}", file=sys.stderr)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the library's errors about bad input into one line that says which argument of the command is meant."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        # The argument of the command is named in place of that of the function.
        text = re.sub(r"^(?:load_checkpoint|create_model|get_input_spec): (?:path_or_state: |name: )?", "", str(error))
        raise CommandError(f"{what}: {text}") from error


def need(*modules: str) -> None:
    """Raises an error that says how to install what is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'this command needs {", ".join(missing)}: pip install "vidattn[cli]"')


def check_picture(output: Path) -> None:
    """Raises an error if no picture can be written there: better before the work than after it."""
    if output.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise CommandError(f"--output: expected a .png, .pdf, .svg or .jpg file, got {output}")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"--output: no such folder: {output.parent}")


# --- vidattn bench ------------------------------------------------------------------------------------


def _bench(options: argparse.Namespace, rest: Sequence[str]) -> int:
    places = (Path(vidattn.__file__).resolve().parent.parent, Path.cwd())
    root = next((place for place in places if (place / "benchmarks" / "bench_window3d.py").is_file()), None)
    if root is None:
        raise CommandError(
            "the benchmarks are part of the source checkout, not of the package: run this in a clone of it"
        )
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'this command needs {", ".join(missing)}: pip install "vidattn[test]"')
    passed = list(rest[1:] if rest[:1] == ["--"] else rest)
    return subprocess.call([sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", *passed], cwd=root)
