"""``vidattn classify``: checkpoints that say what they are, folders, dtypes, progress and output for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from video_files import numbered_frames, write_video

import vidattn
import vidattn.models
from vidattn import cli, identify, products

ROOT = Path(vidattn.__file__).parent.parent
TINY = {
    "video_swin_t": {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
    "video_swin_b": {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": (4, 7, 7)},
    "timesformer_base": {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32},
    "timesformer_space_only": {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32},
    "vivit_b_joint": {"hidden_size": 24, "num_layers": 1, "num_heads": 2, "mlp_dim": 8, "image_size": 32},
    "xvit_b16_8f": {"embed_dim": 24, "depth": 1, "img_size": 32},
    "xvit_b16_16f": {"embed_dim": 24, "depth": 1, "img_size": 32},
}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mkv", numbered_frames(20, 40, 60))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves some models only, all tiny and for clips of 4 frames of 32 x 32."""
    create, spec_of = vidattn.models.create_model, vidattn.models.get_input_spec
    small = {"num_frames": 4, "frame_stride": 2, "short_side": 32, "crop": 32}
    monkeypatch.setattr(vidattn.models, "list_models", lambda: list(TINY))
    monkeypatch.setattr(vidattn.models, "create_model", lambda name, **kwargs: create(name, **TINY[name] | kwargs))
    monkeypatch.setattr(vidattn.models, "get_input_spec", lambda name: dataclasses.replace(spec_of(name), **small))


def save(path: Path, name: str, num_classes: int) -> torch.nn.Module:
    torch.manual_seed(3)
    model = vidattn.models.create_model(name, num_classes=num_classes).eval()
    torch.save({"state_dict": model.state_dict()}, path)
    return model


def classify(*arguments: object) -> int:
    return cli.main(["classify", *map(str, arguments)])


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", ["video_swin_t", "timesformer_base", "vivit_b_joint"])
def test_a_checkpoint_with_its_own_classes(name: str, named: bool, clip: Path, tmp_path: Path, capsys) -> None:
    save(tmp_path / "model.pt", name, 7)
    options = ("--model", name) if named else ()
    frames = ("--frames", 32) if name == "vivit_b_joint" else ()
    long = write_video(tmp_path / "long.mkv", numbered_frames(64, 40, 60))
    assert classify(long, "--checkpoint", tmp_path / "model.pt", "--topk", 9, *options, *frames) == 0
    output = capsys.readouterr().out
    assert sorted(re.findall(r"% +(class \d)$", output, re.MULTILINE)) == [f"class {index}" for index in range(7)]
    assert "names       of the 7 classes are not known: --labels FILE" in output
    assert f"model       {name}, " in output and "RANDOM" not in output
    (tmp_path / "names.txt").write_text("\n".join(f"name {index}" for index in range(7)))
    files = ("--checkpoint", tmp_path / "model.pt", "--labels", tmp_path / "names.txt")
    assert classify(long, *files, *options, *frames) == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"% +name \d$", output, re.MULTILINE)) == 5 and "--labels" not in output
    (tmp_path / "names.txt").write_text("one\ntwo")
    assert classify(long, *files, *options, *frames) == 2
    assert "has 2 names, the checkpoint 7 classes" in capsys.readouterr().err


def test_what_a_checkpoint_does_not_say_is_asked_for(clip: Path, tmp_path: Path, capsys) -> None:
    def error() -> str:
        assert classify(clip, "--checkpoint", tmp_path / "model.pt") == 2
        shown = capsys.readouterr().err
        assert shown.startswith("vidattn: error: --checkpoint: ") and shown.count("\n") == 1
        return shown

    save(tmp_path / "model.pt", "xvit_b16_8f", 7)  # the number of frames is in no tensor
    assert "fits xvit_b16_8f, xvit_b16_16f, which its tensors do not tell apart; name one by --model" in error()
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in vidattn.models.create_model("timesformer_base").state_dict().items()
        if "temporal" not in name and "time_embed" not in name
    }
    torch.save(state, tmp_path / "model.pt")  # as a ViT of images
    shown = error()
    assert "timesformer_base, timesformer_space_only, xvit_b16_8f" in shown and "name one by --model" in shown
    torch.save(vidattn.models.create_model("timesformer_base", depth=2).state_dict(), tmp_path / "model.pt")
    assert "of no published size" in (shown := error()) and "timesformer_base" in shown and "swin" not in shown
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "model.pt")
    assert "looks like a ResNet" in error()


def test_windows_tell_models_of_the_same_blocks_apart() -> None:
    state = vidattn.models.create_model("video_swin_b", num_classes=5).state_dict()
    assert identify.find_model(state) == identify.Match("video_swin_b", 5, False)
    with pytest.raises(ValueError, match="would have to be resized"):
        identify.match_model("video_swin_t", state)


# --- folders, output for programs -------------------------------------------------------------------


def test_a_folder_and_json(clip: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("b.mkv", "a.MKV"):
        shutil.copy(clip, folder / name)
    (folder / "notes.txt").write_text("no video")
    model = save(tmp_path / "model.pt", "video_swin_t", 7)
    options = ("--checkpoint", tmp_path / "model.pt", "--dtype", "float32", "--json", "--topk", 3)
    assert classify(folder, *options) == 0
    shown = capsys.readouterr()
    first, second = (json.loads(line) for line in shown.out.splitlines())
    assert [Path(row["clip"]).name for row in (first, second)] == ["a.MKV", "b.mkv"]
    views = vidattn.video.load_views(clip, vidattn.models.get_input_spec("video_swin_t"))
    with torch.no_grad():
        expected = model(views.stack()).softmax(-1)[0]
    for row in (first, second):
        assert row["classes"][0]["name"] is None and row["model"] == "video_swin_t" and row["dtype"] == "float32"
        assert [one["index"] for one in row["classes"]] == expected.topk(3).indices.tolist()
        for one in row["classes"]:
            assert one["probability"] == pytest.approx(float(expected[one["index"]]), rel=1e-4)

    (folder / "c.mkv").write_text("damaged")
    assert classify(folder, *options) == 2  # the others are classified all the same
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert ["error" in row for row in rows] == [False, False, True]
    assert "c.mkv" in shown.err and "1 of 3 clips could not be classified" in shown.err
    assert classify(folder, *options[:-3]) == 2
    assert capsys.readouterr().out.count("clip        ") == 2


# --- dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slower", "dtype"), [(0.5, "bfloat16"), (0.9, "float32"), (8.0, "float32")])
def test_auto_takes_float32_where_16_bits_are_slower(
    slower: float, dtype: str, clip: Path, capsys, monkeypatch
) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: slower, torch.float16: slower}
    monkeypatch.setattr(products, "product_seconds", lambda dtypes, device: {each: times[each] for each in dtypes})
    assert classify(clip, "--model", "video_swin_t") == 0
    shown = capsys.readouterr()
    assert f"{dtype} on cpu" in shown.out and "note" not in shown.err
    assert classify(clip, "--model", "video_swin_t", "--dtype", "float16") == 0
    shown = capsys.readouterr()
    assert "float16 on cpu" in shown.out
    note = "vidattn: note: products in float16 are slow here: --dtype float32 would be about 8.0 times as fast\n"
    assert shown.err.startswith(note) == (slower > 1)  # before anything is decoded
    assert classify(clip, "--model", "video_swin_t", "--dtype", "float32") == 0
    assert "note" not in capsys.readouterr().err


def test_products_are_measured() -> None:
    state = torch.get_rng_state()
    seconds = products.product_seconds([torch.float32, torch.bfloat16])
    assert set(seconds) == {torch.float32, torch.bfloat16} and all(0 < each < 10 for each in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert products.choose_dtype() in seconds


def test_an_overflow_is_an_error(clip: Path, tmp_path: Path, capsys) -> None:
    model = vidattn.models.create_model("video_swin_t", num_classes=7)
    with torch.no_grad():
        model.cls_head.fc_cls.bias.fill_(1e6)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    options = ("--model", "video_swin_t", "--checkpoint", tmp_path / "model.pt")
    assert classify(clip, *options, "--dtype", "float16") == 2
    assert "in float16 are not finite; use --dtype float32" in capsys.readouterr().err
    assert classify(clip, *options, "--dtype", "float32") == 0


# --- progress ---------------------------------------------------------------------------------------


def test_progress_is_shown_on_a_terminal_from_the_start(clip: Path) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "vidattn", "classify", str(clip), "--model", "video_swin_t"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(
        [*command, "--frames", "4", "--dtype", "float32", "--json"],
        stdout=subprocess.PIPE,
        stderr=end,
        env=environment,
    )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the child has closed it
            break
        if not part:
            break
        shown += part
    assert child.stdout is not None
    output = child.stdout.read()
    child.stdout.close()
    assert child.wait() == 0
    os.close(terminal)
    assert json.loads(output)["model"] == "video_swin_t"  # no bar in the results
    stages = [stage for stage in ("counting", "decoding", "model", "view") if stage.encode() in shown]
    assert stages == ["counting", "decoding", "model", "view"]
    places = [shown.index(stage.encode()) for stage in stages]
    assert places == sorted(places) and b"0/1" in shown  # the bar of a view is there before the view is done
