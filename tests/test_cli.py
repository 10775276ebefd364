from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from video_files import numbered_frames, write_video

import vidattn
import vidattn.models
from vidattn import backends, cli, cli_classify, cli_info, demo, installation
from vidattn.labels import default_labels
from vidattn.memory import PeakMemory, format_bytes
from vidattn.video import load_views

ROOT = Path(vidattn.__file__).parent.parent
TINY = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}


def run(*arguments: object, program: str = "vidattn", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, from another folder."""
    command = [sys.executable, "-m", program, *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("vidattn: error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mkv", numbered_frames(20, 40, 60))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every model of this process tiny: 4 frames of 32 x 32."""
    create, spec_of = vidattn.models.create_model, vidattn.models.get_input_spec
    small = {"num_frames": 4, "short_side": 32, "crop": 32}
    monkeypatch.setattr(vidattn.models, "create_model", lambda name, **kwargs: create(name, **TINY, **kwargs))
    monkeypatch.setattr(vidattn.models, "get_input_spec", lambda name: dataclasses.replace(spec_of(name), **small))


def classify(*arguments: object) -> int:
    return cli.main(["classify", *map(str, arguments)])


def printed_classes(output: str) -> list[tuple[float, str]]:
    """The (percent, name) rows of the output."""
    return [(float(percent), name) for percent, name in re.findall(r"^ +\d+ +([\d.]+) %  (.+)$", output, re.MULTILINE)]


# --- info -------------------------------------------------------------------------------------------


def test_info_is_one_screen():
    result = run("info")
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) <= 24 and all(len(line) <= 120 or line.startswith("vidattn ") for line in lines), result.stdout
    assert lines[0].startswith(f"vidattn      {vidattn.__version__}, ")
    assert torch.__version__ in result.stdout
    assert re.search(r"^CPU products float32 \d+, bfloat16 \d+, float16 \d+ GFLOP/s", result.stdout, re.MULTILINE)
    heading = next(line for line in lines if line.startswith("op "))
    assert heading.split()[1:] == vidattn.list_backends()
    for op in vidattn.ops.__all__:
        row = next(line for line in lines if line.startswith(f"{op} "))
        for backend in vidattn.list_backends():
            cell = row[heading.index(backend) :][:12].strip()
            assert (cell == "✓") == (not vidattn.why_not(op, backend=backend)), row
            assert cell in ("✓", "not built", "stale build", "no kernels", "no triton", "no GPU", "old GPU")


def test_info_verbose_gives_the_reasons_in_full(capsys):
    assert cli.main(["info", "--verbose"]) == 0
    output = capsys.readouterr().out
    for op in vidattn.ops.__all__:
        block = output.split(f"\n{op}\n")[1].split("\n\n")[0].splitlines()
        assert [line.split()[0] for line in block] == vidattn.list_backends()
        for line in block:
            name, answer = line.split(maxsplit=1)
            assert answer == ("; ".join(vidattn.why_not(op, backend=name)) or "available")


def test_info_for_programs(capsys, monkeypatch):
    monkeypatch.setenv("VIDATTN_CACHE", "here")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vidattn"] == vidattn.__version__ and found["torch"] == torch.__version__
    assert found["environment"]["VIDATTN_CACHE"] == "here"
    assert set(found["product_gflops"]) == {"float32", "bfloat16", "float16"}
    assert found["why_not"]["window_attention"]["reference"] == []
    assert (found["instruction_set"] in found["instruction_sets"]) == (not found["why_not"]["window_attention"]["cpu"])


def test_info_survives_a_reader_that_goes():
    read, write = os.pipe()
    os.close(read)  # as of `vidattn info | head -1`
    command = [sys.executable, "-m", "vidattn", "info"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert result.returncode == 141 and result.stderr == ""


def test_info_survives_missing_extras():
    absent = ["av", "rich", "numpy", "matplotlib", "triton", "safetensors"]
    bare = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}));"
        "import torch; torch.ops.load_library = lambda path: open('/no/such/extension');"
        "sys.argv = ['vidattn', 'info']; import vidattn.cli; sys.exit(vidattn.cli.main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VIDATTN_BUILD_EXT": ""}
    result = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert (
        "none: not built" in result.stdout and f"This builds them:\n  {installation.build_command()}" in result.stdout
    )


def test_info_survives_wrong_settings_and_takes_a_pure_install_for_one(capsys, monkeypatch):
    monkeypatch.setattr(backends, "_selected", "nonsense")
    monkeypatch.setattr(cli_info, "pure_by_choice", lambda: True)
    for op in vidattn.ops.__all__:
        monkeypatch.setitem(
            backends._kernel_missing, (op, "cpu"), lambda: "the compiled extension vidattn/_C.so is not built"
        )
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert "got 'nonsense'" in output and "none: not wanted" in output and "This builds" not in output


def test_version_and_help():
    assert run("--version").stdout == f"vidattn {vidattn.__version__}\n"
    helped = run("classify", "--help").stdout
    assert all(model in helped.replace("\n", " ") for model in ("video_swin_t", "--views", "CLIPSxCROPS"))


# --- classify ---------------------------------------------------------------------------------------


def test_classify_a_real_file_from_the_shell(clip: Path):
    result = run("classify", clip, "--model", "video_swin_t", "--frames", 2, "--stride", 3)
    assert result.returncode == 0, result.stderr
    rows = printed_classes(result.stdout)
    assert len(rows) == 5 and {name for _, name in rows} <= set(default_labels(400) or [])
    assert rows == sorted(rows, key=lambda row: -row[0])
    assert "RANDOM" in result.stdout and "20 frames" in result.stdout and "28.2 M parameters" in result.stdout
    assert re.search(r"time +[\d.]+ s decoding, [\d.]+ s model", result.stdout)
    assert re.search(r"peak memory [\d.]+ [MG]iB resident memory of this process, [\d.]+ [MG]iB of it", result.stdout)
    assert result.stderr == "view 1/1\n"  # the progress of a run whose output is no terminal


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_classify_averages_the_probabilities_of_all_views(clip: Path, tmp_path: Path, capsys, backend):
    torch.manual_seed(5)
    model = vidattn.models.create_model("video_swin_t", num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # views and classes must differ visibly
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {index}" for index in range(7)))
    files = ("--checkpoint", tmp_path / "model.pt", "--labels", names)
    options = ("--model", "video_swin_t", "--views", "2x3", "--topk", 7, "--backend", backend, "--dtype", "float32")
    assert classify(clip, *options, *files) == 0
    output = capsys.readouterr().out

    views = load_views(clip, vidattn.models.get_input_spec("video_swin_t"), num_clips=2, num_crops=3).stack()
    with torch.no_grad():
        each = model(views).softmax(-1)
    assert each.std(0).max() > 1e-3
    expected = 100 * each.mean(0)
    rows = printed_classes(output)
    assert sorted(name for _, name in rows) == [f"name {index}" for index in range(7)]
    for percent, name in rows:
        assert abs(percent - float(expected[int(name.split()[1])])) < 0.0051
    assert "RANDOM" not in output and "loaded" in output and "2 clip(s) x 3 crop(s) of 4 frames" in output


@pytest.mark.usefixtures("tiny")
def test_classify_random_weights_depend_on_the_seed_alone(clip: Path, capsys):
    outputs = []
    for seed in (0, 0, 1):
        assert classify(clip, "--model", "video_swin_s", "--seed", seed, "--topk", 3) == 0
        outputs.append(printed_classes(capsys.readouterr().out))
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(outputs[0]) == 3


@pytest.mark.usefixtures("tiny")
def test_classify_other_class_counts_uniform_sampling_and_bfloat16(clip: Path, capsys):
    assert classify(clip, "--model", "video_swin_b_ssv2", "--dtype", "bfloat16", "--views", "1x3") == 0
    output = capsys.readouterr().out
    assert all(re.fullmatch(r"class \d+", name) for _, name in printed_classes(output))
    assert "bfloat16 on cpu" in output


VIVITS = [name for name in vidattn.models.list_models() if name.startswith("vivit_")]


@pytest.mark.parametrize("model", VIVITS)
def test_classify_builds_a_model_for_the_length_of_the_clip(
    model: str, clip: Path, tmp_path: Path, capsys, monkeypatch
):
    create, spec_of = vidattn.models.create_model, vidattn.models.get_input_spec
    small = {"hidden_size": 24, "num_layers": 1, "num_heads": 2, "mlp_dim": 8, "image_size": 32}
    built: list[torch.nn.Module] = []

    def build(name: str, **options: object) -> torch.nn.Module:
        built.append(create(name, **small, **options))
        return built[-1]

    monkeypatch.setattr(vidattn.models, "create_model", build)
    size = {"short_side": 32, "crop": 32}
    monkeypatch.setattr(vidattn.models, "get_input_spec", lambda name: dataclasses.replace(spec_of(name), **size))
    assert classify(clip, "--model", model, "--frames", 7, "--topk", 2) == 0
    assert "of 7 frames" in capsys.readouterr().out
    assert built[0].patch_embed.temporal_dims == 3 and built[0].head.weight.any()
    torch.save(built[0].state_dict(), tmp_path / "model.pt")
    assert classify(clip, "--model", model, "--frames", 6, "--checkpoint", tmp_path / "model.pt") == 0
    assert "RANDOM" not in capsys.readouterr().out
    assert classify(clip, "--model", model, "--frames", 8, "--checkpoint", tmp_path / "model.pt") == 2
    assert "--checkpoint: " in capsys.readouterr().err
    assert classify(clip, "--model", model, "--frames", 1) == 2
    assert "--frames: patches must fit into the clip" in capsys.readouterr().err


def test_classify_says_when_the_clip_is_longer_than_the_video(clip: Path, capsys, monkeypatch):
    create = vidattn.models.create_model
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(vidattn.models, "create_model", lambda name, **options: create(name, **small, **options))
    assert classify(clip, "--model", "timesformer_base") == 0
    assert "the video ends before the clip does: its last frame comes 7 times" in capsys.readouterr().out
    assert classify(clip, "--model", "timesformer_base", "--stride", 2) == 0
    assert "ends before" not in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_classify_warns_of_a_damaged_tail_in_one_line(clip: Path, capsys):
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 3 // 4])
    assert classify(clip, "--model", "video_swin_t") == 0
    shown = capsys.readouterr()
    assert re.search(
        rf"^warning: {re.escape(str(clip))} is damaged and ends after frame 1\d, at .*\n(?!warning)", shown.err
    )
    assert "video.py" not in shown.err and ": 1" in shown.out


@pytest.mark.usefixtures("tiny")
def test_classify_takes_a_folder_of_weights(clip: Path, tmp_path: Path, capsys):
    model = vidattn.models.create_model("video_swin_t", num_classes=400)
    (tmp_path / "weights").mkdir()
    torch.save(model.state_dict(), tmp_path / "weights" / "pytorch_model.bin")
    assert classify(clip, "--model", "video_swin_t", "--checkpoint", tmp_path / "weights") == 0
    assert "layout 'official'" in capsys.readouterr().out
    assert classify(clip, "--model", "video_swin_t", "--checkpoint", clip.parent / "clip.mkv") == 2
    assert "error: --checkpoint: " in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_classify_reports_lack_of_memory(clip: Path, capsys, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(cli_classify, "_average_views", fail)
    assert classify(clip, "--model", "video_swin_t") == 2
    assert "not enough memory" in capsys.readouterr().err


ERRORS = {
    "missing file": (("nowhere.mp4",), ("no such file", "nowhere.mp4")),
    "a folder without videos": ((".",), ("CLIP: no video file in the folder",)),
    "not a video": (("{text}",), ("is not a video",)),
    "too short": (("{clip}",), ("20 frames", "need 63", "--frames 10")),
    "too short for the stride": (("{clip}", "--frames", "16"), ("need 31", "--frames 10 or --stride 1")),
    "too short, uniform": (("{clip}", "--model", "video_swin_b_ssv2"), ("20 frames", "need 32", "--frames 20")),
    "unknown model": (("{clip}", "--model", "video_swin_tt"), ("--model", "video_swin_t")),
    "no model": (("{clip}",), ("--model",)),
    "views without crops": (("{clip}", "--views", "4"), ("--views", "CLIPSxCROPS", "'4'")),
    "views of two crops": (("{clip}", "--views", "1x2"), ("--views", "1 or 3 crops")),
    "no clips": (("{clip}", "--views", "0x1"), ("--views",)),
    "clips of a uniform model": (("{clip}", "--model", "video_swin_b_ssv2", "--views", "2x3"), ("--views 1x3",)),
    "zero frames": (("{clip}", "--frames", "0"), ("--frames", "from 1")),
    "frames that a model does not take": (
        ("{clip}", "--model", "xvit_b16_8f", "--frames", "3", "--stride", "2"),
        ("--model xvit_b16_8f", "got 3"),
    ),
    "checkpoint missing": (("{clip}", "--checkpoint", "nowhere.pt"), ("--checkpoint", "no such file")),
    "checkpoint damaged": (("{clip}", "--frames", "2", "--checkpoint", "{text}"), ("--checkpoint", "notes.txt")),
    "checkpoint of another model": (
        ("{clip}", "--frames", "2", "--checkpoint", "{resnet}"),
        ("--checkpoint", "looks like a ResNet"),
    ),
    "labels missing": (("{clip}", "--labels", "nowhere.txt"), ("--labels", "no such file")),
    "labels empty": (("{clip}", "--labels", "{empty}"), ("--labels", "no names")),
    "unknown backend": (("{clip}", "--backend", "abacus"), ("--backend", "abacus")),
    "unknown option": (("{clip}", "--frobnicate"), ("--frobnicate",)),
    "no CUDA": (("{clip}", "--device", "cuda"), ("--device cpu",)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(case, clip: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, words = ERRORS[case]
    files = {name: tmp_path / name for name in ("empty", "resnet")} | {"text": tmp_path / "notes.txt", "clip": clip}
    files["empty"].touch()
    files["text"].write_text("no pictures, no weights\n" * 50)
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, files["resnet"])
    model = () if case == "no model" or "--model" in arguments else ("--model", "video_swin_t")
    filled = (argument.format(**files) for argument in arguments)
    try:
        code = classify(*filled, *model)
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert_one_line_error(subprocess.CompletedProcess([], code, *capsys.readouterr()), *words)


def test_missing_extras_are_named_with_the_pip_command(clip: Path, capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert classify(clip, "--model", "video_swin_t") == 2
    assert "needs rich: pip install rich\n" in capsys.readouterr().err


def test_no_command_is_an_error():
    assert_one_line_error(run(), "command")


# --- bench ------------------------------------------------------------------------------------------


def test_bench_runs_pytest_in_the_checkout(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command, cwd: calls.append((command, cwd)) or 5)
    assert cli.main(["bench", "-k", "stage1", "--benchmark-json", "out.json"]) == 5
    assert cli.main(["bench", "--", "-x"]) == 5
    start = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only"]
    assert calls == [
        ([*start, "-k", "stage1", "--benchmark-json", "out.json"], ROOT),
        ([*start, "-x"], ROOT),
    ]


def test_bench_outside_a_checkout(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(vidattn, "__file__", str(tmp_path / "site-packages" / "vidattn" / "__init__.py"))
    monkeypatch.chdir(Path(__file__).parent)
    assert cli.main(["bench"]) == 2
    assert "source checkout" in capsys.readouterr().err


# --- demo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "frames"),
    [
        ("video_swin_t", 2),
        pytest.param("timesformer_base", 2, marks=pytest.mark.slow),
        pytest.param("vivit_b_factorized_dot_product", 2, marks=pytest.mark.slow),
        pytest.param("xvit_b16_16f", 8, marks=pytest.mark.slow),
    ],
)
def test_demo_compares_both_models(model: str, frames: int, tmp_path: Path):
    picture = tmp_path / "demo.png"
    options = ("--model", model, "--frames", frames, "--rounds", 1, "--output", picture)
    result = run(*options, program="vidattn.demo")
    assert result.returncode == 0, result.stderr
    difference = re.search(r"largest logit difference ([\d.e+-]+) \(largest logit ([\d.e+-]+)\)", result.stdout)
    assert difference and float(difference[1]) <= 1e-4 * float(difference[2]) != 0.0
    assert "RANDOM" in result.stdout
    assert len(re.findall(r"[\d.]+ s\b", result.stdout)) == 2
    assert len(re.findall(r"[\d.]+ [MG]iB", result.stdout)) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_errors():
    assert_one_line_error(run("--clip", "nowhere.mp4", program="vidattn.demo"), "no such file")
    assert_one_line_error(run("--output", "demo.txt", program="vidattn.demo"), "--output")
    assert_one_line_error(run("--output", "nowhere/demo.png", program="vidattn.demo"), "no such folder")
    assert_one_line_error(run("--frames", "no", program="vidattn.demo"), "--frames", "from 1")


def test_rendered_shapes_are_a_video(tmp_path: Path):
    path = demo.render_shapes(tmp_path / "shapes.mp4", num_frames=9, height=64, width=96)
    views = load_views(path, dataclasses.replace(vidattn.models.get_input_spec("video_swin_t"), num_frames=4))
    assert views.video_frames == 9
    first, last = views.frames[0].float(), views.frames[-1].float()
    assert (first - last).abs().mean() > 2  # it moves


# --- memory -----------------------------------------------------------------------------------------


def test_peak_memory_sees_what_is_freed_again():
    size = 256 * 2**20
    np.ones(size, np.uint8)
    with PeakMemory() as memory:
        np.ones(size, np.uint8)
    assert memory.peak is not None and memory.growth is not None
    assert 0.95 * size < memory.growth < 1.3 * size < memory.peak
    with PeakMemory() as memory:
        pass
    assert memory.growth is not None and memory.growth < 0.1 * size


def test_format_bytes():
    assert [format_bytes(value) for value in (None, 0, 3 * 2**19, 5 * 2**29)] == [
        "unknown",
        "0.0 MiB",
        "1.5 MiB",
        "2.50 GiB",
    ]
