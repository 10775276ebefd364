"""The training example: its clips, its command line, and whether the fused ops train as the reference does."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import vidattn
from examples import train_motion
from examples.train_motion import DIRECTIONS, MODELS, SPEED, moving_textures, repeat_first_frame, shuffle_frames

# Largest relative difference of the losses of a step, about seven times what float32 rounding was seen to make over
# three seeds (5e-7, 1.4e-5, 2e-6). A hundredth of a neighbour's gradient added to that of a single tensor of the first
# block, its bias table or qkv weight, makes 4e-5, 1e-2 and 3e-3.
LOSS_TOLERANCE = {"video_swin": 4e-6, "timesformer": 1e-4, "xvit": 1.4e-5}


@pytest.mark.parametrize(
    ("direction", "shift"), [("right", (0, 1)), ("down", (1, 0)), ("left", (0, -1)), ("up", (-1, 0))]
)
def test_textures_move_where_their_label_says(direction: str, shift: tuple[int, int]):
    clip = moving_textures(torch.tensor([DIRECTIONS.index(direction)]), torch.Generator())[0, 0]
    moved = clip[:-1].roll([SPEED * axis for axis in shift], (1, 2))
    torch.testing.assert_close(clip[1:], moved, rtol=0, atol=1e-4)
    assert (clip[1:] - clip[:-1]).abs().max() > 0.5


def test_first_frames_do_not_depend_on_the_direction():
    first, *others = (moving_textures(torch.full((3,), n), torch.Generator())[:, :, 0] for n in range(len(DIRECTIONS)))
    assert all(torch.equal(first, other) for other in others)


def test_control_clips_keep_the_frames_but_not_their_order():
    video = moving_textures(torch.arange(len(DIRECTIONS)), torch.Generator())
    shuffled = shuffle_frames(video, torch.Generator())
    assert not torch.equal(shuffled, video)
    torch.testing.assert_close(shuffled.sort(dim=2).values, video.sort(dim=2).values, rtol=0, atol=0)
    assert torch.equal(repeat_first_frame(video)[:, :, -1], video[:, :, 0])


def test_command_trains_each_model_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_motion, "HELD_OUT", 8)
    monkeypatch.setattr(train_motion, "BATCH", 4)
    picture = tmp_path / "motion.png"
    assert train_motion.main(["--steps", "2", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^\w+(?= .*%)", printed, re.MULTILINE) == list(MODELS)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_what_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_motion.main(["--output", str(tmp_path / "nowhere" / "motion.png")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fused_training_is_the_reference_training(name: str):
    result = train_motion.train(name)
    assert result.difference < LOSS_TOLERANCE[name]
    if not vidattn.why_not("window3d_attention", backend="cpu"):
        assert result.difference > 0  # else the same code ran twice
    assert min(result.accuracies) > 0.9
    assert max(result.shuffled) < 0.6 and max(result.frozen) < 0.35


@pytest.mark.slow
def test_shuffled_or_repeated_frames_do_not_teach_the_direction():
    shuffled = train_motion.train("xvit", transform=partial(shuffle_frames, generator=torch.Generator()))
    frozen = train_motion.train("xvit", transform=repeat_first_frame)
    # The axis can be learned from frames in any order, its sign cannot.
    assert max(shuffled.accuracies + shuffled.shuffled) < 0.6
    assert max(frozen.accuracies + frozen.frozen) < 0.35
