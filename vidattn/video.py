"""Video files in, model input out: decoding, frame sampling, resizing, cropping and normalisation.

The defaults are the test protocol of the published models. Video Swin (arXiv 2106.13230, section 4.1) averages
4 clips x 3 crops on Kinetics-400: each clip has 32 frames, every second one; frames are resized to a short side of 224
and cropped to 224 x 224 at three places along the long side. On Something-Something v2 it takes 1 clip of 32 frames,
spread over the whole video, x 3 crops. TimeSformer (arXiv 2102.05095) and ViViT (arXiv 2103.15691) differ as their
``InputSpec`` says.

Decoding needs PyAV and NumPy (``pip install av numpy``); sampling and cropping need neither.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vidattn.models import InputSpec

_DEFAULT, _COVER = 0x1, 0x400  # FFmpeg's dispositions of a stream

Progress = Callable[[str, int, "int | None"], None]
"""Called as ``progress(stage, done, total)`` with stage "counting" (total None) or "decoding", once a frame."""


class VideoError(ValueError):
    """The file cannot be used as a video, for the reason in the message."""


class DamagedVideoWarning(UserWarning):
    """The video ends before it should, after the frame in the message: the rest of the file cannot be decoded.

    The decoder may have made up a part of that last frame.
    """


class ClipTooShortError(VideoError):
    """The video has fewer frames than the clip needs.

    Attributes:
        available: frames in the video.
        max_frames: the most frames that can be taken with the frame stride asked for.
        max_stride: the largest frame stride that the number of frames asked for allows, 0 if there is none.
    """

    def __init__(self, available: int, num_frames: int, frame_stride: int) -> None:
        self.available = available
        self.max_frames = (available - 1) // frame_stride + 1
        self.max_stride = 0 if available < num_frames else (available - 1) // max(num_frames - 1, 1)
        needed = (num_frames - 1) * frame_stride + 1
        ways = [f"num_frames <= {self.max_frames}"]
        if self.max_stride:
            ways.append(f"frame_stride <= {self.max_stride}")
        super().__init__(
            f"expected at least {needed} frames ({num_frames} frames, {frame_stride} apart), "
            f"got a video of {available}; use {' or '.join(ways)}"
        )


def dense_indices(available: int, num_frames: int, frame_stride: int, num_clips: int = 1) -> list[list[int]]:
    """Returns the frames of clips of consecutive frames, equally spaced over the video.

    The possible start positions are cut into ``num_clips`` equal parts and each clip starts in the middle of its part,
    as in the test pipeline of Video Swin (arXiv 2106.13230, section 4.1: 32 frames, stride 2, 4 clips).

    Args:
        available: frames in the video.
        num_frames: frames of a clip.
        frame_stride: distance of the frames of a clip; 1 takes every frame.
        num_clips: number of clips.

    Returns:
        ``num_clips`` lists of ``num_frames`` frame numbers, from 0.

    Raises:
        ClipTooShortError: a clip needs more frames than there are.
        ValueError: an argument is not positive.

    Example:
        >>> dense_indices(20, num_frames=4, frame_stride=2, num_clips=2)
        [[3, 5, 7, 9], [9, 11, 13, 15]]
    """
    _check_positive(num_frames=num_frames, frame_stride=frame_stride, num_clips=num_clips)
    if available < (num_frames - 1) * frame_stride + 1:
        raise ClipTooShortError(available, num_frames, frame_stride)
    # The protocol counts the gap behind the last frame to the clip as well.
    starts = max(available - num_frames * frame_stride + 1, 1)
    firsts = [(2 * clip + 1) * starts // (2 * num_clips) for clip in range(num_clips)]
    return [[first + frame * frame_stride for frame in range(num_frames)] for first in firsts]


def spaced_indices(
    available: int, num_frames: int, frame_stride: int, num_clips: int = 1, frame_rate: float = 30.0
) -> list[list[int]]:
    """Returns frames that are equally spaced from the first to the last of ``num_frames * frame_stride`` frames.

    This is how the published code of TimeSformer (arXiv 2102.05095) and X-ViT (arXiv 2106.05968) samples: frames are
    counted at 30 a second, the first and the last frame of the clip are taken, so that the others are a little further
    apart than the stride, and the last frame of a shorter video is repeated. One clip starts with the video,
    ``num_clips`` at equal distances.

    Args:
        available: frames in the video.
        num_frames: frames to take.
        frame_stride: frames of a clip for each one taken.
        num_clips: number of clips.
        frame_rate: frames of the video a second.

    Returns:
        ``num_clips`` lists of ``num_frames`` frame numbers, from 0.

    Raises:
        ValueError: an argument is not positive.

    Example:
        >>> spaced_indices(300, num_frames=8, frame_stride=32)
        [[0, 36, 72, 109, 145, 182, 218, 255]]
        >>> spaced_indices(6, num_frames=4, frame_stride=3)
        [[0, 3, 5, 5]]
    """
    _check_positive(available=available, num_frames=num_frames, frame_stride=frame_stride, num_clips=num_clips)
    if not frame_rate > 0:
        raise ValueError(f"frame_rate: expected a positive number, got {frame_rate}")
    length = num_frames * frame_stride * frame_rate / 30.0
    offsets = [max(int(frame * (length - 1) / max(num_frames - 1, 1)), 0) for frame in range(num_frames)]
    firsts = [math.ceil(max(available - length, 0) * clip / num_clips) for clip in range(num_clips)]
    return [[min(first + offset, available - 1) for offset in offsets] for first in firsts]


def uniform_indices(available: int, num_frames: int) -> list[int]:
    """Returns the middle frames of ``num_frames`` equal segments of the whole video.

    This is how the models trained on Something-Something v2 sample (Video Swin, arXiv 2106.13230, section 4.1).

    Args:
        available: frames in the video.
        num_frames: frames to take, one a segment.

    Returns:
        ``num_frames`` frame numbers, from 0.

    Raises:
        ClipTooShortError: there are fewer frames than segments.
        ValueError: an argument is not positive.

    Example:
        >>> uniform_indices(9, num_frames=4)
        [1, 3, 5, 7]
    """
    _check_positive(num_frames=num_frames)
    if available < num_frames:
        raise ClipTooShortError(available, num_frames, 1)
    # Segment borders are rounded to whole frames first, as in the published pipeline.
    borders = [round((available - 1) * segment / num_frames) for segment in range(num_frames + 1)]
    return [(first + last) // 2 for first, last in pairwise(borders)]


def crop_boxes(height: int, width: int, size: int, num_crops: int = 1) -> list[tuple[int, int]]:
    """Returns the top left corners of square crops: the centre, or three places along the long side.

    Args:
        height: rows of the frame, pixels.
        width: columns of the frame, pixels.
        size: side of the crop, pixels.
        num_crops: 1 for the centre crop; 3 for left, centre, right (top, centre, bottom if higher than wide).

    Returns:
        ``num_crops`` pairs (top, left).

    Raises:
        ValueError: the crop does not fit into the frame, or ``num_crops`` is neither 1 nor 3.

    Example:
        >>> crop_boxes(224, 298, 224, num_crops=3)
        [(0, 0), (0, 37), (0, 74)]
    """
    if num_crops not in (1, 3):
        raise ValueError(f"num_crops: expected 1 (centre) or 3 (along the long side), got {num_crops}")
    if not 0 < size <= min(height, width):
        raise ValueError(f"size: expected 1 to {min(height, width)} pixels for a {height} x {width} frame, got {size}")
    top, left = (height - size) // 2, (width - size) // 2
    if num_crops == 1:
        return [(top, left)]
    # Twice the centre offset, not the far edge: the published pipeline leaves the last column of an odd remainder out.
    if width >= height:
        return [(top, 0), (top, left), (top, 2 * left)]
    return [(0, left), (top, left), (2 * top, left)]


@dataclass(frozen=True, eq=False)
class VideoViews(Sequence[Tensor]):
    """The views (clips x crops) of one video; each is cut out and normalised when it is asked for.

    Attributes:
        frames: uint8 RGB frames that some clip uses, resized, (F, 3, height, width).
        frame_numbers: the number in the video of each of them.
        clips: for every clip, its rows of ``frames``.
        boxes: (top, left) of every crop.
        crop: side of a crop, pixels.
        mean: of the pixel normalisation, RGB on 0..255.
        std: of the pixel normalisation, RGB on 0..255.
        video_frames: frames in the whole video.

    Example:
        >>> views = VideoViews(torch.full((2, 3, 4, 6), 100, dtype=torch.uint8), (0, 1), ((0, 1),), ((0, 0), (0, 2)),
        ...                    4, (100.0, 100.0, 100.0), (50.0, 50.0, 50.0), 2)
        >>> len(views), tuple(views[0].shape), tuple(views.stack().shape)
        (2, (3, 2, 4, 4), (2, 3, 2, 4, 4))
    """

    frames: Tensor
    frame_numbers: tuple[int, ...]
    clips: tuple[tuple[int, ...], ...]
    boxes: tuple[tuple[int, int], ...]
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    video_frames: int

    def __len__(self) -> int:
        return len(self.clips) * len(self.boxes)

    def __getitem__(self, index: Any) -> Any:
        """Returns view ``index`` (all crops of the first clip come first): float32 (3, T, crop, crop)."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected a view below {len(self)}, got {index}")
        clip, box = divmod(index % len(self), len(self.boxes))
        top, left = self.boxes[box]
        pixels = self.frames[list(self.clips[clip]), :, top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels.float() - mean) / std).transpose(0, 1).contiguous()

    def stack(self) -> Tensor:
        """Returns all views as one float32 tensor (views, 3, T, crop, crop), ready to be the batch of a model."""
        return torch.stack(list(self))


def load_views(
    path: str | os.PathLike[str],
    spec: InputSpec,
    *,
    num_frames: int | None = None,
    frame_stride: int | None = None,
    num_clips: int = 1,
    num_crops: int = 1,
    progress: Progress | None = None,
) -> VideoViews:
    """Reads the views of a video file that a model wants to see, by the test protocol of its paper.

    Frames are counted by decoding the file once (what a container says about itself is often wrong) and read in a
    second pass that keeps the resized frames of the clips only. Rotation metadata is honoured. Of several video streams
    the one of the largest picture is read, cover pictures aside. A file with a damaged tail is read up to there, with a
    ``DamagedVideoWarning``.

    Args:
        path: the video file.
        spec: how the model was tested, from ``vidattn.models.get_input_spec(name)``.
        num_frames: frames of a clip instead of the spec's.
        frame_stride: distance of the frames instead of the spec's (dense sampling only).
        num_clips: clips, equally spaced over the video; uniform sampling has one clip, which is the whole video.
        num_crops: 1 (centre) or 3 (along the long side).
        progress: called after every frame with ("counting", done, None) and ("decoding", done, total).

    Returns:
        The views: a sequence of float32 tensors (3, T, crop, crop), ``stack()`` of which is a batch for the model.

    Raises:
        FileNotFoundError: there is no such file.
        VideoError: it is not a video, or it cannot be decoded; ClipTooShortError if it has too few frames. A model that
            repeats the last frame of a short video does not do so for one that is short because it is damaged.
        ValueError: an argument is out of range.
        ImportError: PyAV is not installed.

    Example:
        >>> from vidattn.demo import render_shapes
        >>> from vidattn.models import get_input_spec
        >>> clip = render_shapes(Path("clip.mp4"))
        >>> views = load_views(clip, get_input_spec("video_swin_t"), num_clips=2, num_crops=3)
        >>> views.stack().shape
        torch.Size([6, 3, 32, 224, 224])
    """
    num_frames = spec.num_frames if num_frames is None else num_frames
    _check_positive(num_frames=num_frames, num_clips=num_clips)
    if num_crops not in (1, 3):
        raise ValueError(f"num_crops: expected 1 (centre) or 3 (along the long side), got {num_crops}")
    uniform = spec.sampling == "uniform"
    if uniform and (num_clips != 1 or frame_stride is not None):
        raise ValueError(
            "num_clips, frame_stride: expected one clip and no stride, because this model's clip is spread over the "
            f"whole video, got num_clips={num_clips}, frame_stride={frame_stride}"
        )

    available, damage = _count(path, progress)
    stride = frame_stride or spec.frame_stride or 1
    if uniform:
        clips = [uniform_indices(available, num_frames)]
    elif spec.sampling == "spaced":
        rate = frame_rate(path)
        if damage is not None and num_frames * stride * rate / 30.0 > available:
            raise VideoError(f"{damage}: a clip of {num_frames} frames, {stride} apart, is not in it")
        clips = spaced_indices(available, num_frames, stride, num_clips, rate)
    else:
        clips = dense_indices(available, num_frames, stride, num_clips)

    wanted = sorted({number for clip in clips for number in clip})
    row = {number: position for position, number in enumerate(wanted)}
    frames = read_frames(path, wanted, short_side=spec.short_side, progress=progress)
    height, width = frames.shape[-2:]
    return VideoViews(
        frames=frames,
        frame_numbers=tuple(wanted),
        clips=tuple(tuple(row[number] for number in clip) for clip in clips),
        boxes=tuple(crop_boxes(height, width, spec.crop, num_crops)),
        crop=spec.crop,
        mean=tuple(spec.mean),
        std=tuple(spec.std),
        video_frames=available,
    )


def count_frames(path: str | os.PathLike[str], *, progress: Progress | None = None) -> int:
    """Counts the frames of a video file by decoding it, as far as it can be decoded.

    Args:
        path: the video file.
        progress: called after every frame with ("counting", done, None).

    Returns:
        The number of frames that come out of the decoder, at least 1.

    Raises:
        FileNotFoundError: there is no such file.
        VideoError: it is not a video, or it cannot be decoded.
        ImportError: PyAV is not installed.

    Example:
        >>> from vidattn.demo import render_shapes
        >>> count_frames(render_shapes(Path("clip.mp4"), num_frames=10))
        10
    """
    return _count(path, progress)[0]


def _count(path: str | os.PathLike[str], progress: Progress | None) -> tuple[int, str | None]:
    """Counts frames, and tells what is wrong with a video that ends before it should."""
    count = 0
    decoding = _Decoding(path)
    for _ in decoding:
        count += 1
        if progress is not None:
            progress("counting", count, None)
    if not count:
        raise VideoError(f"{path}: no frame of it can be decoded")
    return count, decoding.damage


def frame_rate(path: str | os.PathLike[str]) -> float:
    """Returns the frames a second of a video file, as its container says; 30 where that says nothing.

    Args:
        path: the video file.

    Returns:
        Frames a second, on average.

    Raises:
        FileNotFoundError: there is no such file.
        VideoError: it is not a video.
        ImportError: PyAV is not installed.

    Example:
        >>> from vidattn.demo import render_shapes
        >>> frame_rate(render_shapes(Path("clip.mp4"), num_frames=10))
        25.0
    """
    with _opened(path) as (_, stream):
        return float(stream.average_rate or 30)


def read_frames(
    path: str | os.PathLike[str],
    numbers: Sequence[int],
    *,
    short_side: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Decodes the frames of the given numbers, resized as they come.

    Args:
        path: the video file.
        numbers: frame numbers from 0, ascending, without repetition.
        short_side: length in pixels of the shorter side after bilinear resizing (half-pixel centres, no antialiasing,
            rounded back to 8 bits, as the published pipelines do it); None keeps the size.
        progress: called after every decoded frame with ("decoding", done, total).

    Returns:
        uint8 RGB (len(numbers), 3, height, width), upright.

    Raises:
        FileNotFoundError: there is no such file.
        VideoError: it is not a video, it ends early, or its frames change their size.
        ValueError: ``numbers`` is empty or not ascending.
        ImportError: PyAV is not installed.

    Example:
        >>> from vidattn.demo import render_shapes
        >>> read_frames(render_shapes(Path("clip.mp4"), num_frames=11), [0, 10], short_side=224).shape
        torch.Size([2, 3, 224, 280])
    """
    ascending = all(first < second for first, second in pairwise(numbers))
    if not numbers or numbers[0] < 0 or not ascending:
        raise ValueError(f"numbers: expected ascending frame numbers from 0, got {list(numbers)}")
    wanted = set(numbers)
    total = numbers[-1] + 1
    frames: list[Tensor] = []
    decoding = _Decoding(path)
    for number, frame in enumerate(decoding):
        if number in wanted:
            image = _resize(_upright_rgb(frame), short_side)
            if frames and image.shape != frames[0].shape:
                raise VideoError(
                    f"{path}: expected frames of one size, got another at frame {number}; convert it first"
                )
            frames.append(image)
        if progress is not None:
            progress("decoding", number + 1, total)
        if number + 1 == total:
            return torch.stack(frames)
    reason = "" if decoding.damage is None else f": {decoding.damage}"
    raise VideoError(f"{path}: expected a frame {numbers[-1]}, got the end of the video{reason}")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """Opens a file and finds its main video stream."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install av numpy") from error
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with av.open(str(path), metadata_errors="replace") as container:  # a title may be in any encoding
            # FFmpeg has a demuxer that renders plain text as a terminal would: a text file is no video.
            streams = [] if container.format.name == "tty" else list(container.streams.video)
            films = [
                stream for stream in streams if not _disposition(stream) & _COVER and stream.codec_context is not None
            ]
            if not films:
                only = "no video stream but a cover picture" if streams else "no video stream"
                raise VideoError(f"{path} is not a video: it has {only}")
            # The first of the largest; a default, where a file says which, before others of its size.
            yield container, max(films, key=lambda film: (film.width * film.height, _disposition(film) & _DEFAULT))
    except av.error.FFmpegError as error:
        raise VideoError(f"{path} is not a video that can be decoded ({error.strerror})") from error


def _disposition(stream: Any) -> int:
    return int(getattr(stream, "disposition", 0))  # which old versions of PyAV do not tell


class _Decoding:
    """The decoded frames of the main video stream, one at a time, as far as they can be decoded.

    Attributes:
        damage: after the last frame, what ended the video before it should; None where nothing did.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Any]:
        count, last = 0, None
        # Threads have frames behind a damaged one in flight. From there on frames are decoded one by one, so that each
        # is counted and none of them comes from behind the damage.
        for threads in ("AUTO", "NONE"):
            failure = None
            with _opened(self.path) as (container, stream):
                stream.thread_type = threads
                declared = _declared_end(container, stream)
                frames = _frames(container, stream, flush=threads == "NONE")
                for number in itertools.count():
                    try:
                        frame = next(frames, None)
                    except _ffmpeg_error() as error:
                        failure = error
                        break
                    if frame is None:
                        break
                    if number == count:
                        count, last = count + 1, _end(frame, stream)
                        yield frame
            if failure is None:
                break
        if failure is not None:
            reason = failure.strerror
            if count == 0:
                raise VideoError(f"{self.path} is not a video that can be decoded ({reason})") from failure
        elif last is not None and declared is not None and declared[0] - last > declared[1]:
            reason = f"by its header it lasts {declared[0]:.2f} s"
        else:
            return
        time = "" if last is None else f", at {last:.2f} s"
        self.damage = f"{self.path} is damaged and ends after frame {count - 1}{time} ({reason})"
        warnings.warn(self.damage, DamagedVideoWarning, stacklevel=3)


def _frames(container: Any, stream: Any, flush: bool) -> Iterator[Any]:
    """Yields frames; with ``flush``, before an error is raised, also those that the decoder still has."""
    try:
        yield from container.decode(stream)
    except _ffmpeg_error():
        if flush:
            with suppress(_ffmpeg_error()):
                yield from stream.decode(None)
        raise


def _ffmpeg_error() -> Any:
    import av

    return av.error.FFmpegError


def _end(frame: Any, stream: Any) -> float | None:
    """Returns when a frame is over, in seconds of its stream."""
    if frame.pts is None:
        return None
    shown = frame.duration * stream.time_base if frame.duration else 1 / (stream.average_rate or 30)
    return float(frame.pts * stream.time_base + shown)


def _declared_end(container: Any, stream: Any) -> tuple[float, float] | None:
    """Returns when a stream should end by what its file says, and how far that may be off, in seconds."""
    start = float((stream.start_time or 0) * stream.time_base)
    duration = None
    said = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    if stream.duration:
        duration = float(stream.duration * stream.time_base)
    elif said:  # by Matroska, from the start of the file
        duration = 3600 * int(said[1]) + 60 * int(said[2]) + float(said[3]) - start
    elif container.duration and len(container.streams) == 1:
        duration = container.duration / 1e6
    if not duration:
        return None
    return start + duration, max(1.5 / float(stream.average_rate or 30), 0.02 * duration)


def _upright_rgb(frame: Any) -> Tensor:
    """Returns a decoded frame as uint8 (3, height, width), turned as its display matrix says."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as torch.rot90 counts them
    return torch.rot90(pixels, quarter_turns, (0, 1)).permute(2, 0, 1)


def _resize(image: Tensor, short_side: int | None) -> Tensor:
    """Returns the uint8 image (3, height, width) scaled so that its shorter side has the given length."""
    height, width = image.shape[-2:]
    if short_side is None or min(height, width) == short_side:
        return image.contiguous()
    size = [int(side * short_side / min(height, width) + 0.5) for side in (height, width)]
    scaled = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
