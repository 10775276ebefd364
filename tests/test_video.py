from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from video_files import numbered_frames, write_video

from vidattn.labels import default_labels, load_labels
from vidattn.video import (
    ClipTooShortError,
    DamagedVideoWarning,
    VideoError,
    count_frames,
    crop_boxes,
    dense_indices,
    frame_rate,
    load_views,
    read_frames,
    spaced_indices,
    uniform_indices,
)


def spec(**changes):
    values = {"num_frames": 4, "frame_stride": 2, "sampling": "dense", "short_side": 20, "crop": 20}
    return SimpleNamespace(**{**values, "mean": (0.0,) * 3, "std": (1.0,) * 3, **changes})


# --- which frames ---------------------------------------------------------------------------------


def test_dense_indices_of_the_kinetics_protocol():
    # 300 frames, 32 x 2, 4 clips: starts are floor((i + 1/2) * (300 - 64 + 1) / 4).
    clips = dense_indices(300, 32, 2, 4)
    assert [clip[0] for clip in clips] == [29, 88, 148, 207]
    assert all(clip == list(range(clip[0], clip[0] + 64, 2)) for clip in clips)


@pytest.mark.parametrize("available", [1, 50, 256, 300, 1001])
@pytest.mark.parametrize("rate", [12.5, 25.0, 30.0, 60.0])
@pytest.mark.parametrize(("num_frames", "stride"), [(8, 32), (16, 16), (96, 4), (1, 7), (2, 3)])
def test_spaced_indices_of_the_timesformer_protocol(available, rate, num_frames, stride):
    length = num_frames * stride / 30 * rate
    for num_clips in (1, 3):
        clips = spaced_indices(available, num_frames, stride, num_clips, rate)
        assert len(clips) == num_clips and clips[0][0] == 0
        for number, clip in enumerate(clips):
            start = max(available - length, 0) * number / num_clips
            expected = torch.linspace(0, length - 1, num_frames, dtype=torch.float64) + np.ceil(start)
            assert clip == expected.clamp(0, available - 1).long().tolist()
            if available >= length + 1 and num_frames > 1:
                assert clip[-1] - clip[0] == int(length - 1)  # the first and the last frame


@pytest.mark.parametrize("wrong", [{"available": 0}, {"num_frames": 0}, {"frame_stride": 0}, {"frame_rate": 0.0}])
def test_spaced_indices_name_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        spaced_indices(**{"available": 9, "num_frames": 2, "frame_stride": 2, **wrong})


def test_spaced_views_know_the_frame_rate_and_repeat_the_last_frame(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(12))  # 25 frames a second
    assert frame_rate(path) == 25.0
    spaced = spec(sampling="spaced", frame_stride=3)
    assert load_views(path, spaced)[0][0, :, 0, 0].tolist() == [0, 3, 6, 9]
    assert load_views(path, spaced, frame_stride=2)[0][0, :, 0, 0].tolist() == [0, 1, 3, 5]
    views = load_views(path, spaced, frame_stride=6, num_clips=2)
    assert [view[0, :, 0, 0].tolist() for view in views] == [[0, 6, 11, 11]] * 2


@pytest.mark.parametrize("available", [63, 64, 65, 66, 100, 1000])
@pytest.mark.parametrize("num_clips", [1, 2, 4, 10])
def test_dense_indices_stay_inside_and_are_spread_evenly(available, num_clips):
    clips = dense_indices(available, 32, 2, num_clips)
    assert len(clips) == num_clips
    assert all(len(clip) == 32 and clip[0] >= 0 and clip[-1] < available for clip in clips)
    gaps = np.diff([clip[0] for clip in clips])
    assert num_clips == 1 or (gaps.min() >= 0 and gaps.max() - gaps.min() <= 1)


def test_dense_indices_use_every_video_that_holds_one_clip():
    assert dense_indices(63, 32, 2)[0] == list(range(0, 63, 2))
    with pytest.raises(ClipTooShortError) as caught:
        dense_indices(62, 32, 2)
    assert caught.value.max_frames == 31
    assert caught.value.max_stride == 1
    assert "at least 63 frames" in str(caught.value)
    assert "a video of 62" in str(caught.value)


def test_the_way_out_of_a_too_short_video_works():
    for available in range(1, 40):
        for num_frames in (1, 2, 7, 16):
            for stride in (1, 3, 5):
                try:
                    dense_indices(available, num_frames, stride)
                except ClipTooShortError as error:
                    dense_indices(available, error.max_frames, stride)
                    with pytest.raises(ClipTooShortError):
                        dense_indices(available, error.max_frames + 1, stride)
                    if error.max_stride:
                        dense_indices(available, num_frames, error.max_stride)
                        assert f"frame_stride <= {error.max_stride}" in str(error)
                    else:
                        assert available < num_frames


def test_uniform_indices_are_segment_centres():
    assert uniform_indices(9, 4) == [1, 3, 5, 7]
    assert uniform_indices(1, 1) == [0]
    assert uniform_indices(32, 32)[0] == 0
    # 61 frames in 8 segments: borders at 0, 7.5, 15, ... rounded to even at ties, then the middle of each.
    assert uniform_indices(61, 8) == [4, 11, 18, 26, 34, 41, 48, 56]
    for available in (32, 33, 48, 100, 257):
        indices = uniform_indices(available, 32)
        assert len(indices) == 32 and indices[0] >= 0 and indices[-1] < available
        assert all(first <= second for first, second in pairwise(indices))
    with pytest.raises(ClipTooShortError, match="at least 32 frames"):
        uniform_indices(31, 32)


@pytest.mark.parametrize(
    "call", [lambda: dense_indices(9, 0, 1), lambda: dense_indices(9, 1, 0), lambda: dense_indices(9, 1, 1, 0)]
)
def test_counts_must_be_positive(call):
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        call()


# --- which pixels ---------------------------------------------------------------------------------


def test_crop_boxes():
    assert crop_boxes(256, 341, 224) == [(16, 58)]
    assert crop_boxes(224, 299, 224, 3) == [(0, 0), (0, 37), (0, 74)]  # 75 to spare: the last column is left out
    assert crop_boxes(299, 224, 224, 3) == [(0, 0), (37, 0), (74, 0)]
    assert crop_boxes(256, 340, 224, 3) == [(16, 0), (16, 58), (16, 116)]
    assert crop_boxes(224, 224, 224, 3) == [(0, 0)] * 3
    with pytest.raises(ValueError, match=r"num_crops: expected 1 .* got 2"):
        crop_boxes(224, 299, 224, 2)
    with pytest.raises(ValueError, match="got 225"):
        crop_boxes(224, 299, 225)


def test_views_hold_exactly_the_sampled_frames_and_crops(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(23))
    views = load_views(path, spec(), num_clips=2, num_crops=3)
    batch = views.stack()
    assert batch.shape == (6, 3, 4, 20, 20) and batch.dtype == torch.float32
    assert views.video_frames == 23
    firsts = [(2 * clip + 1) * (23 - 8 + 1) // 4 for clip in range(2)]
    for clip in range(2):
        for crop, left in enumerate((0, 5, 10)):
            view = batch[3 * clip + crop]
            assert torch.equal(view, views[3 * clip + crop])
            for frame in range(4):
                number = firsts[clip] + 2 * frame
                assert (view[0, frame] == number).all()
                assert torch.equal(view[1, frame], torch.arange(20.0)[:, None].expand(20, 20))
                assert torch.equal(view[2, frame], (left + torch.arange(20.0)).expand(20, 20))
    assert set(views.frame_numbers) == {first + 2 * frame for first in firsts for frame in range(4)}
    assert torch.equal(views[-1], views[5])
    assert len(list(views)) == len(views) == 6
    with pytest.raises(IndexError, match="got 6"):
        views[6]


def test_uniform_views_ignore_the_stride_of_dense_sampling(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(9))
    uniform = spec(sampling="uniform", frame_stride=None)
    assert load_views(path, uniform)[0][0, :, 0, 0].tolist() == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="num_clips, frame_stride: expected one clip"):
        load_views(path, uniform, num_clips=2)
    with pytest.raises(ValueError, match="num_clips, frame_stride: expected one clip"):
        load_views(path, uniform, frame_stride=2)


def test_normalisation_is_per_channel_on_0_to_255(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(8, 20, 20))
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    plain = load_views(path, spec()).stack()
    normalised = load_views(path, spec(mean=mean, std=std)).stack()
    for channel in range(3):
        torch.testing.assert_close(normalised[:, channel], (plain[:, channel] - mean[channel]) / std[channel])


@pytest.mark.parametrize(
    "height, width, expected", [(31, 47, (20, 30)), (47, 31, (30, 20)), (10, 15, (20, 30)), (33, 33, (20, 20))]
)
def test_short_side_resize(tmp_path: Path, height, width, expected):
    frames = numbered_frames(1, height, width)
    path = write_video(tmp_path / "clip.mkv", frames)
    image = read_frames(path, [0], short_side=20)
    assert image.shape == (1, 3, *expected) and image.dtype == torch.uint8
    # A linear ramp stays one: pixel centre x maps to (x + 0.5) * scale - 0.5, clamped at the border.
    for channel, (before, after) in enumerate(zip((height, width), expected, strict=True), start=1):
        ramp = ((torch.arange(after) + 0.5) * before / after - 0.5).clamp(0, before - 1)
        found = image[0, channel].float().mean(dim=2 - channel)
        assert (found - ramp).abs().max() <= 0.51


def test_views_of_a_one_frame_video(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(1))
    assert count_frames(path) == 1
    assert load_views(path, spec(), num_frames=1).stack().shape == (1, 3, 1, 20, 20)
    with pytest.raises(ClipTooShortError, match=r"got a video of 1; use num_frames <= 1$"):
        load_views(path, spec())


def test_reordered_frames_come_in_display_order(tmp_path: Path):
    """B-frames are stored out of order; the number of a frame is its place in time."""
    frames = [np.full((32, 48, 3), 8 * number, np.uint8) for number in range(30)]
    path = write_video(tmp_path / "clip.mp4", frames, codec="libx264", pixel_format="yuv420p")
    assert count_frames(path) == 30
    numbers = [0, 1, 7, 13, 29]
    levels = read_frames(path, numbers).float().mean(dim=(1, 2, 3)) / 8
    assert (levels - torch.tensor(numbers)).abs().max() < 0.5


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_rotation_metadata_is_honoured(tmp_path: Path, rotation):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :16] = 255  # white at the top left
    path = write_video(tmp_path / "clip.mp4", [frame] * 2, codec="libx264", pixel_format="yuv420p", rotation=rotation)
    image = read_frames(path, [1])[0]
    turned = torch.from_numpy(np.rot90(frame, rotation // 90).copy()).permute(2, 0, 1)
    assert image.shape == turned.shape
    assert (image.float() - turned.float()).abs().mean() < 8


def test_frames_are_counted_not_believed(tmp_path: Path):
    """A file cut in the middle still announces all its frames."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(20)]
    path = write_video(tmp_path / "clip.mkv", frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(
        DamagedVideoWarning, match=r"ends after frame \d+, at 0\.\d\d s \(by its header it lasts 0\.80 s\)"
    ):
        count = count_frames(path)
    assert 5 <= count < 15
    assert len(read_frames(path, range(count))) == count


# Codec, container, its options: what is damaged is what lies behind the first three fifths of the pictures.
FORMATS = {
    "mkv": ("ffv1", "bgr0", {}),
    "mp4": ("libx264", "yuv420p", {}),
    "faststart.mp4": ("libx264", "yuv420p", {"movflags": "faststart"}),
    "threads.mp4": ("ffv1", "yuv420p", {}),
    "mov": ("mjpeg", "yuvj420p", {}),
    "webm": ("libvpx-vp9", "yuv420p", {}),
}


def noisy_video(path: Path) -> Path:
    """40 frames that no codec makes small."""
    rng = np.random.default_rng(0)
    codec, pixel_format, options = FORMATS[path.name.partition(".")[2]]
    frames = (rng.integers(0, 255, (16, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(40))
    return write_video(path, frames, codec=codec, pixel_format=pixel_format, options=options)


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat") if b"mdat" in data else 0
    end = data.index(b"moov") if data.find(b"moov") > start > 0 else len(data)
    cut = start + (end - start) * 3 // 5
    if kind == "cut":
        del data[cut:]
    else:
        data[cut : end - 8] = bytes(end - 8 - cut) if kind == "zeros" else np.random.default_rng(1).bytes(end - 8 - cut)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut", "zeros", "noise"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_tail_leaves_what_decodes(tmp_path: Path, name: str, kind: str):
    path = noisy_video(tmp_path / f"clip.{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_frames(path) == 40
        whole = read_frames(path, range(40))
    damage(path, kind)
    if kind == "cut" and name in ("mp4", "threads.mp4", "mov"):  # the index of the file is at its end
        with pytest.raises(VideoError, match="is not a video that can be decoded"):
            count_frames(path)
        return
    with pytest.warns(DamagedVideoWarning, match=r"clip.* is damaged and ends after frame (\d+), at ") as caught:
        count = count_frames(path)
    assert 15 <= count <= 30
    assert f"after frame {count - 1}, at {count / 25:.2f} s (" in str(caught[0].message)
    frames = read_frames(path, range(count))
    assert torch.equal(frames[:-1], whole[: count - 1])  # and the last as far as it goes
    with (
        pytest.warns(DamagedVideoWarning),
        pytest.raises(VideoError, match=r"got the end of the video: .* is damaged and"),
    ):
        read_frames(path, [0, count])


def test_clips_of_a_damaged_video(tmp_path: Path):
    path = noisy_video(tmp_path / "clip.mp4")
    damage(path, "zeros")
    with pytest.warns(DamagedVideoWarning):
        views = load_views(path, spec())
    assert views.video_frames < 30 and views.stack().shape == (1, 3, 4, 20, 20)
    with pytest.warns(DamagedVideoWarning), pytest.raises(ClipTooShortError, match="got a video of 2"):
        load_views(path, spec(), num_frames=16)
    spaced = spec(sampling="spaced", frame_stride=3)
    with pytest.warns(DamagedVideoWarning):
        load_views(path, spaced)
    # Of a whole video the last frame would be repeated.
    with (
        pytest.warns(DamagedVideoWarning),
        pytest.raises(VideoError, match=r"is damaged .*: a clip of 16 frames, 3 apart, is not in"),
    ):
        load_views(path, spaced, num_frames=16)


def test_a_video_that_is_damaged_from_its_first_frame(tmp_path: Path):
    path = noisy_video(tmp_path / "clip.mp4")
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 8
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="is not a video that can be decoded"):
        count_frames(path)


# --- which stream ---------------------------------------------------------------------------------


def write_streams(path: Path, *sizes: int, cover: int | None = None, default: int | None = None) -> Path:
    """Video streams of so many frames as their number, of a grey level each; ``cover`` is a picture of an album."""
    with av.open(str(path), "w") as container:
        streams = []
        for size in sizes:
            stream = container.add_stream("mjpeg" if size == cover else "libx264", rate=25)
            stream.height = stream.width = size
            stream.pix_fmt = "yuvj420p" if size == cover else "yuv420p"
            if size == cover:
                stream.disposition = av.stream.Disposition.attached_pic
            elif default is not None:
                stream.disposition = av.stream.Disposition.default if len(streams) == default else 0
            streams.append(stream)
        for place, (size, stream) in enumerate(zip(sizes, streams, strict=True)):
            picture = np.full((size, size, 3), 60 * (place + 1), np.uint8)
            for _ in range(1 if size == cover else 5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("sizes", "options", "chosen"),
    [
        ((32, 64), {}, 1),
        ((64, 32), {}, 0),
        ((32, 64, 48), {"default": 0}, 1),  # a preview in front is not what a model should see
        ((48, 48, 48), {"default": 2}, 2),
        ((48, 48), {}, 0),
        ((128, 32, 64), {"cover": 128}, 2),
        ((32, 128), {"cover": 128}, 0),
    ],
)
def test_the_main_stream(tmp_path: Path, suffix: str, sizes: tuple[int, ...], options: dict[str, int], chosen: int):
    if suffix == "mkv" and "cover" in options:
        return  # Matroska has covers as attachments, which are no streams
    path = write_streams(tmp_path / f"clip.{suffix}", *sizes, **options)
    frames = read_frames(path, range(count_frames(path)))
    assert frames.shape == (5, 3, sizes[chosen], sizes[chosen])
    assert abs(frames.float().mean().item() - 60 * (chosen + 1)) < 4


def test_a_cover_picture_is_no_video(tmp_path: Path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=25)
        cover.height = cover.width = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=44100)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 44100
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    with pytest.raises(VideoError, match="is not a video: it has no video stream but a cover picture"):
        count_frames(path)


def test_progress_is_reported(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(9))
    calls = []
    load_views(path, spec(), progress=lambda *call: calls.append(call))
    assert calls == [("counting", n, None) for n in range(1, 10)] + [("decoding", n, 8) for n in range(1, 9)]


# --- what is no video -----------------------------------------------------------------------------


def test_files_that_are_no_videos(tmp_path: Path):
    empty, text, random = tmp_path / "empty.mp4", tmp_path / "notes.txt", tmp_path / "random.mp4"
    empty.touch()
    text.write_text("no pictures here\n" * 100)
    random.write_bytes(np.random.default_rng(0).bytes(50_000))
    for path in (empty, text, random, tmp_path):
        with pytest.raises(VideoError, match="is not a video"):
            count_frames(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        count_frames(tmp_path / "missing.mp4")


def test_a_title_in_another_encoding(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(3), title="Träume")
    path.write_bytes(path.read_bytes().replace("Träume".encode(), "Träume".encode("latin-1") + b"!"))
    assert count_frames(path) == 3


def test_frames_past_the_end_are_refused(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", numbered_frames(3))
    with pytest.raises(VideoError, match="expected a frame 3, got the end of the video"):
        read_frames(path, [0, 3])
    for numbers in ([], [2, 1], [1, 1], [-1]):
        with pytest.raises(ValueError, match="ascending"):
            read_frames(path, numbers)


# --- labels ---------------------------------------------------------------------------------------


def test_kinetics_labels():
    names = default_labels(400)
    assert names is not None and len(set(names)) == 400 and names == sorted(names)
    assert (names[0], names[6], names[399]) == ("abseiling", "arm wrestling", "zumba")
    assert default_labels(174) is None


def test_labels_from_a_file(tmp_path: Path):
    path = tmp_path / "names.txt"
    path.write_text("a\nb c\n\nd\n\n", encoding="utf-8")
    assert load_labels(path) == ["a", "b c", "", "d"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="got no names"):
        load_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_labels(path)
