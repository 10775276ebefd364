"""The command ``vidattn``: what is installed, clips classified, the benchmarks run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import vidattn.models


class CommandError(Exception):
    """What is wrong and what to do about it, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after ``vidattn``; those of this process unless given.

    Returns:
        The exit code: 0; 2 after a one-line error on stderr; 141 if the reader of stdout has gone; ``vidattn bench``
        returns pytest's.

    Example:
        >>> main(["info"])  # doctest: +SKIP
        0
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = options.run(options, rest)
        sys.stdout.flush()
        return code
    except CommandError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return 141


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
    command.add_argument("--verbose", action="store_true", help="all reasons, packages and settings")
    command.add_argument("--json", action="store_true", help="everything, for programs and bug reports")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "classify",
        help="classify video clips",
        description="Classify a video clip, or each in a folder, by the test protocol of the model's paper.",
        allow_abbrev=False,
    )
    add = command.add_argument
    add("clip", metavar="CLIP", type=Path, help="video file, or a folder of them")
    models = ", ".join(vidattn.models.list_models())
    add("--model", metavar="NAME", help=f"one of {models}; may be left out where the checkpoint fits one of them only")
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
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of weights and activations (default: auto, bfloat16 where its products are faster, else float32)",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default: cpu)")
    add("--topk", metavar="K", type=positive, default=5, help="classes to print (default: 5)")
    add("--seed", metavar="N", type=int, default=0, help="of the random weights (default: 0)")
    add("--json", action="store_true", help="print one JSON object a line and clip instead of text")
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


# --- what the commands share ---------------------------------------------------------------------------


def _info(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from vidattn import cli_info

    return cli_info.run(options, rest)


def _classify(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from vidattn import cli_classify

    return cli_classify.run(options, rest)


@contextmanager
def progress(first: str, plain: bool = False) -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows progress on stderr: bars on a terminal; elsewhere nothing, or with ``plain`` one line a step.

    Args:
        first: name of the stage whose bar is shown from the start.
        plain: whether a stderr that is no terminal gets lines.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # What is printed meanwhile stays where it belongs: results on stdout are not for the console of the bars.
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    with bars:
        tasks: dict[str, Any] = {first: bars.add_task(first, total=None)}

        def advance(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)
            if plain and done and not console.is_terminal:
                print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)

        yield advance


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
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
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise CommandError(f"this command needs {', '.join(missing)}: pip install {packages}")


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
    need("pytest", "pytest_benchmark")
    passed = list(rest[1:] if rest[:1] == ["--"] else rest)
    return subprocess.call([sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", *passed], cwd=root)
