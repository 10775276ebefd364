"""Small video files with known pixels for the tests."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    codec: str = "ffv1",
    pixel_format: str = "bgr0",
    rotation: int | None = None,
    options: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Writes uint8 RGB frames (height, width, 3); the default codec (in .mkv) is lossless."""
    with av.open(str(path), "w", options=dict(options or {})) as container:
        stream = None
        if title is not None:
            container.metadata["title"] = title
        for frame in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=25)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = pixel_format
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        assert stream is not None
        container.mux(stream.encode())
    if rotation:
        _write_rotation(path, rotation)
    return path


def _write_rotation(path: Path, degrees: int) -> None:
    """Puts a rotation (counter-clockwise) into the track header of an MP4 file: a 3 x 3 matrix in 16.16 fixed point."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    cosine, sine = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    data[matrix : matrix + 20] = struct.pack(">5i", cosine << 16, -sine << 16, 0, sine << 16, cosine << 16)
    path.write_bytes(data)


def numbered_frames(count: int, height: int = 20, width: int = 30) -> list[np.ndarray]:
    """Frames that tell their number (red), row (green) and column (blue) in every pixel."""
    rows, columns = np.mgrid[:height, :width]
    return [np.stack([np.full_like(rows, number), rows, columns], axis=-1).astype(np.uint8) for number in range(count)]
