"""The command ``vidattn classify``, and what the demo shares with it: a clip read, a model loaded and accelerated."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import vidattn.models
from vidattn.cli import CommandError, explained, fail, need, progress, warnings_in_one_line
from vidattn.memory import PeakMemory, format_bytes

if TYPE_CHECKING:
    from vidattn.video import VideoViews

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What files of a folder are taken for videos.
_VIDEOS = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)


class LoadedModel(NamedTuple):
    """A model that is ready to classify.

    Attributes:
        model: accelerated, in eval mode.
        weights: where its weights come from.
        attention: what computes its attention.
        labels: names of its classes; None if they are not known.
    """

    model: torch.nn.Module
    weights: str
    attention: str
    labels: list[str] | None


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Classifies a clip, or each clip of a folder; one that fails does not keep the others from being classified."""
    need("rich", "av", "numpy")
    _check(options)
    clips = _find_clips(options.clip)
    labels = _read_labels(options)
    classes = _read_checkpoint(options)
    with explained("--model"):
        spec = vidattn.models.get_input_spec(options.model)
    _settle_dtype(options)

    loaded: LoadedModel | None = None
    failures = 0
    for clip in clips:
        options.clip = clip
        try:
            started = time.perf_counter()
            views = read_views(options, spec)
            decoding = time.perf_counter() - started
        except CommandError as error:
            if len(clips) == 1:
                raise
            failures += 1
            fail(str(error))
            if options.json:
                print(json.dumps({"clip": str(clip), "error": str(error)}), flush=True)
            continue
        if loaded is None:
            loaded = _load(options, spec, classes, labels)
        _classify_views(options, loaded, views, decoding)
    if loaded is None:
        raise CommandError(f"CLIP: none of the {len(clips)} clips can be classified")
    if failures:
        return fail(f"{failures} of {len(clips)} clips could not be classified")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, file in (("CLIP", options.clip), ("--checkpoint", options.checkpoint), ("--labels", options.labels)):
        if file is not None and not (file.is_file() if name == "--labels" else file.exists()):
            raise CommandError(f"{name}: no such file: {file}")
    if options.model is None and options.checkpoint is None:
        raise CommandError(f"--model: expected one of {', '.join(vidattn.models.list_models())}, or a --checkpoint")
    if options.model is not None:
        with explained("--model"):
            vidattn.models.get_input_spec(options.model)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device: this torch sees no CUDA device; use --device cpu")


def _find_clips(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    clips = sorted(file for file in place.iterdir() if file.is_file() and file.suffix.lower() in _VIDEOS)
    if not clips:
        raise CommandError(f"CLIP: no video file in the folder {place} (looked for {' '.join(_VIDEOS)})")
    return clips


def _read_labels(options: argparse.Namespace) -> list[str] | None:
    from vidattn.labels import load_labels

    with explained("--labels"):
        return load_labels(options.labels) if options.labels else None


def _read_checkpoint(options: argparse.Namespace) -> int | None:
    """Finds the model of a checkpoint, unless it is named, and returns the number of classes that the file says."""
    if options.checkpoint is None:
        return None
    from vidattn.identify import find_model, match_model
    from vidattn.models.checkpoint_files import read_checkpoint

    with progress("checkpoint") as advance, explained("--checkpoint"):
        content, config = read_checkpoint(os.fspath(options.checkpoint))
        if options.model is not None:
            try:
                return match_model(options.model, content, config, **_length(options.model, options)).num_classes
            except (ValueError, TypeError):
                return None  # loading it says what does not fit
        match = find_model(
            content,
            config,
            lambda name: _length(name, options),
            lambda done, total: advance("checkpoint", done, total),
        )
    options.model = match.name
    return match.num_classes


def _length(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that build a model for the clips that are asked for."""
    fixed = vidattn.models.get_input_spec(name).fixed_length
    return {"num_frames": options.frames} if fixed and options.frames else {}


def _settle_dtype(options: argparse.Namespace) -> None:
    """Chooses the dtype that was left open, or warns of one that is slow here, by two small products."""
    from vidattn.products import choose_dtype, float32_speedup

    if options.dtype == "auto":
        options.dtype = str(choose_dtype(options.device)).removeprefix("torch.")
    elif options.dtype != "float32":
        factor = float32_speedup(DTYPES[options.dtype], options.device)
        if factor > 1.1:
            print(
                f"vidattn: note: products in {options.dtype} are slow here: --dtype float32 would be about "
                f"{factor:.1f} times as fast",
                file=sys.stderr,
                flush=True,
            )


def _load(options: argparse.Namespace, spec: Any, classes: int | None, labels: list[str] | None) -> LoadedModel:
    from vidattn.labels import default_labels

    if labels is not None and classes not in (None, len(labels)):
        raise CommandError(f"--labels: {options.labels} has {len(labels)} names, the checkpoint {classes} classes")
    num_classes = classes or (spec.num_classes if labels is None else len(labels))
    with progress("model"):
        model, weights = load_model(options, num_classes)
        attention = accelerate_model(model, options)
    names = labels or default_labels(num_classes)
    if not options.json:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"model       {options.model}, {parameters / 1e6:.1f} M parameters, {options.dtype} on {options.device}")
        print(f"weights     {weights}")
        print(f"attention   {attention}")
        if labels is None:
            known = "Kinetics-400's" if names else f"of the {num_classes} classes are not known"
            print(
                f"names       {known}; --labels FILE gives others" if names else f"names       {known}: --labels FILE"
            )
    return LoadedModel(model, weights, attention, names)


def _classify_views(options: argparse.Namespace, loaded: LoadedModel, views: VideoViews, decoding: float) -> None:
    """Runs the model on the views of one clip and prints what it finds."""
    height, width = views.frames.shape[-2:]
    frames = len(views.clips[0])
    repeated = len(views.clips[-1]) - len(set(views.clips[-1]))
    if not options.json:
        print(f"clip        {options.clip}: {views.video_frames} frames, resized to {width} x {height}")
        print(
            f"views       {len(views.clips)} clip(s) x {len(views.boxes)} crop(s) of {frames} frames, "
            f"{views.crop} x {views.crop}"
        )
        if repeated:
            print(f"            the video ends before the clip does: its last frame comes {repeated + 1} times")
        sys.stdout.flush()
    with PeakMemory(options.device) as memory:
        started = time.perf_counter()
        probabilities = _average(loaded.model, views, options)
        computing = time.perf_counter() - started

    best = probabilities.topk(min(options.topk, len(probabilities))).indices.tolist()
    classes = [
        {
            "index": index,
            "name": loaded.labels[index] if loaded.labels else None,
            "probability": float(probabilities[index]),
        }
        for index in best
    ]
    if options.json:
        found = {
            "clip": str(options.clip),
            "video_frames": views.video_frames,
            "views": {"clips": len(views.clips), "crops": len(views.boxes), "frames": frames, "size": views.crop},
            "last_frame_repeated": repeated,
            "model": options.model,
            "checkpoint": str(options.checkpoint) if options.checkpoint else None,
            "weights": loaded.weights,
            "dtype": options.dtype,
            "device": options.device,
            "attention": loaded.attention,
            "classes": classes,
            "seconds": {"decoding": decoding, "model": computing},
            "peak_memory_bytes": memory.peak,
            "memory_growth_bytes": memory.growth,
        }
        print(json.dumps(found), flush=True)
        return
    print()
    for rank, row in enumerate(classes, start=1):
        name = f"class {row['index']}" if row["name"] is None else row["name"]
        print(f"{rank:3d}  {100 * row['probability']:6.2f} %  {name}")
    kind = "memory torch allocated on the device" if options.device == "cuda" else "resident memory of this process"
    print(f"\ntime        {decoding:.2f} s decoding, {computing:.2f} s model ({len(views)} view(s))")
    print(f"peak memory {format_bytes(memory.peak)} {kind}, {format_bytes(memory.growth)} of it for running the model")
    sys.stdout.flush()


def read_views(options: argparse.Namespace, spec: Any) -> VideoViews:
    """Reads the views that the options ask for, showing progress."""
    from vidattn.video import ClipTooShortError, load_views

    clips, crops = options.views
    if spec.sampling == "uniform" and (clips != 1 or options.stride):
        raise CommandError(
            f"--views, --stride: {options.model} sees one clip, spread over the whole video; "
            f"use --views 1x{crops} and no --stride"
        )
    with progress("counting") as advance, explained("CLIP"), warnings_in_one_line():
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


def load_model(options: argparse.Namespace, num_classes: int) -> tuple[torch.nn.Module, str]:
    """Builds the model in eval mode and says where its weights come from: random unless there is a checkpoint."""
    torch.manual_seed(options.seed)
    with explained("--frames"):
        model = vidattn.models.create_model(options.model, num_classes=num_classes, **_length(options.model, options))
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
    with progress("view", plain=True) as advance, torch.inference_mode():
        advance("view", 0, len(views))
        for index, view in enumerate(views):
            logits = model(view[None].to(options.device, DTYPES[options.dtype]))[0].float().cpu()
            if not logits.isfinite().all():
                raise CommandError(
                    f"the logits of {options.model} in {options.dtype} are not finite; use --dtype float32"
                    if options.dtype != "float32"
                    else f"the logits of {options.model} are not finite: its weights are not usable"
                )
            total = total + logits.softmax(-1)  # softmax first, then the mean, as the papers do
            advance("view", index + 1, len(views))
    return total / len(views)


def accelerate_model(model: torch.nn.Module, options: argparse.Namespace) -> str:
    """Accelerates the model in place and says what was swapped and which backend computes the attention."""
    with explained("--backend"):
        result = vidattn.accelerate(model, backend=options.backend)
        chosen = list(dict.fromkeys(result.backends.values()))
        failed = next((backend for backend in chosen if backend.startswith("none")), None)
        if failed:
            raise CommandError(f"--backend: {failed}")
    counts = f"{len(result.swapped)} modules swapped, {len(result.skipped)} skipped"
    reasons = "".join(f"\n            {row.name} skipped: {row.reason}" for row in result.skipped)
    slow = result.why_no_kernel()
    if slow is not None:
        reasons += f"\n            the reference is no faster than the plain model: {slow}"
    return f"backend {' and '.join(chosen) or 'none'}; {counts}{reasons}"
