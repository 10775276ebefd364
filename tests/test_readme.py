from __future__ import annotations

import re
from pathlib import Path

import pytest

import vidattn
import vidattn.models
from vidattn import backends, cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_python_examples_run_in_order(capsys):
    names: dict[str, object] = {}
    found = blocks("python")
    assert len(found) >= 3
    for block in found:
        exec(compile(block, "<README>", "exec"), names)
    assert names["projection"].weight.grad.abs().sum() > 0
    assert names["bias_table"].grad.abs().sum() > 0
    assert "SwinTransformerBlock3D" in capsys.readouterr().out


def test_the_explained_windows_are_shown(capsys):
    call = re.search(r"`(print\(vidattn\.explain_windows\(.*?\))`", README)
    assert call
    exec(call[1], {"vidattn": vidattn})
    assert "8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") for line in block.splitlines() if line[:8] == "vidattn "]
)
def test_the_commands_parse(line):
    arguments = line.split("#")[0].split()[1:]
    options, rest = cli._parser().parse_known_args(arguments)
    assert not rest or arguments[0] == "bench"
    assert callable(options.run)


def test_the_matrix_is_what_the_registry_says():
    for op in vidattn.ops.__all__:
        row = re.search(rf"^\| `{op}` \|(.*)\|$", README, re.MULTILINE)
        assert row, f"{op} is not in the table"
        cells = [cell.strip() for cell in row[1].split("|")]
        headings = ["cpu", "reference", "cuda", "triton"]
        assert sorted(headings) == sorted(vidattn.list_backends())
        for backend, cell in zip(headings, cells, strict=True):
            has_kernels = (op, backend) in backends._kernel_missing
            assert (cell != "no") == has_kernels, (op, backend)


def test_the_models_are_all_named():
    rows = re.findall(r"^\| (?:Video Swin|TimeSformer|ViViT|X-ViT) \| (`.*?) \|", README, re.MULTILINE)
    named = re.findall(r"`([a-z]\w+)`", " ".join(rows))
    assert sorted(named) == sorted(vidattn.models.list_models())


def test_environment_variables_are_all_listed():
    root = Path(__file__).parent.parent
    files = [root / "setup.py"]
    for folder in ("vidattn", "csrc", "tests", "benchmarks"):
        files += [file for file in (root / folder).rglob("*") if file.suffix in (".py", ".cpp", ".h", ".cu")]
    read = r"""(?:environ\b|getenv)\W{1,3}(?:get\W{1,3})?(VIDATTN_\w+)"""
    used = {name for file in files for name in re.findall(read, file.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `(VIDATTN_\w+)` \|", README, re.MULTILINE))
    assert {"VIDATTN_BACKEND", "VIDATTN_CPU_ISA", "VIDATTN_BUILD_EXT"} <= used <= listed
