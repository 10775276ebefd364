"""README and docs: every Python block runs by itself, every command exists, and tables say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torchvision_swin  # noqa: F401  (before blocks that import torchvision, which may need its schemas)

import vidattn
import vidattn.models
from vidattn import backends, cli

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
TEXT = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}


def blocks(language: str) -> list[tuple[str, str]]:
    """Give (page and number, text) of all blocks in a language."""
    return [
        (f"{name}-{number}", text)
        for name, page in TEXT.items()
        for number, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    ]


def shell_lines() -> list[str]:
    lines = [line.split("#")[0].strip() for _, block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_there_are_pages() -> None:
    assert set(PAGES) >= {f"docs/{name}.md" for name in ("ops", "models", "backends", "performance", "gpu", "command")}
    assert len(TEXT["README.md"].splitlines()) < 200
    assert len(blocks("python")) >= 6 and len(shell_lines()) >= 10


@pytest.mark.parametrize(("where", "block"), blocks("python"), ids=[where for where, _ in blocks("python")])
def test_python_blocks_run_alone(where: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"<{where}>", "exec"), {"__name__": "__main__"})


def test_the_explained_windows_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    call = re.search(r"`(print\(vidattn\.explain_windows\(.*?\))`", TEXT["docs/ops/window3d_attention.md"])
    assert call
    exec(call[1], {"vidattn": vidattn})
    assert "8" in capsys.readouterr().out


@pytest.mark.parametrize("line", shell_lines())
def test_shell_lines_name_what_exists(line: str) -> None:
    """Of `vidattn` the options, of `make` the targets, of other programs the files and modules."""
    words = line.split()
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "vidattn":
        options, rest = cli._parser().parse_known_args(arguments)
        assert not rest or arguments[0] == "bench"
        assert callable(options.run)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert arguments[0] in targets
    elif program == "torchrun":
        assert any((ROOT / path).is_file() for path in arguments if path.endswith(".py"))
    elif program in ("python", "pytest"):
        path = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        assert (ROOT / path).exists()
    else:
        assert program in ("pip", "cd", "git"), line


def test_links_lead_somewhere() -> None:
    for name, path in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT[name]):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{name}: {target}"


def test_the_matrix_is_what_the_registry_says() -> None:
    for op in vidattn.ops.__all__:
        row = re.search(rf"^\| `{op}` \|(.*)\|$", TEXT["docs/backends.md"], re.MULTILINE)
        assert row, f"{op} is not in the table"
        cells = [cell.strip() for cell in row[1].split("|")]
        headings = ["cpu", "reference", "cuda", "triton"]
        assert sorted(headings) == sorted(vidattn.list_backends())
        for backend, cell in zip(headings, cells, strict=True):
            has_kernels = (op, backend) in backends._kernel_missing
            assert (cell != "no") == has_kernels, (op, backend)


def test_all_ops_have_a_line() -> None:
    named = re.findall(r"^\| \[`(\w+)`\]\(ops/(\w+)\.md\) \|", TEXT["docs/ops.md"], re.MULTILINE)
    assert sorted(named) == sorted((name, name) for name in vidattn.ops.__all__)


def test_the_models_are_all_named() -> None:
    rows = re.findall(r"^\| (?:Video Swin|TimeSformer|ViViT|X-ViT) \| (`.*?) \|", TEXT["docs/models.md"], re.MULTILINE)
    named = re.findall(r"`([a-z]\w+)`", " ".join(rows))
    assert sorted(named) == sorted(vidattn.models.list_models())


def test_environment_variables_are_all_listed() -> None:
    files: list[Any] = [ROOT / "setup.py"]
    for folder in ("vidattn", "csrc", "tests", "benchmarks"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".cpp", ".h", ".cu")]
    read = r"""(?:environ\b|getenv)\W{1,3}(?:get\W{1,3})?(VIDATTN_\w+)"""
    used = {name for file in files for name in re.findall(read, file.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `(VIDATTN_\w+)` \|", TEXT["docs/backends.md"], re.MULTILINE))
    assert {"VIDATTN_BACKEND", "VIDATTN_CPU_ISA", "VIDATTN_BUILD_EXT"} <= used <= listed


def test_blocks_are_of_a_kind_that_is_run_or_no_program() -> None:
    kinds = {kind for page in TEXT.values() for kind in re.findall(r"^```(\w*)\n(?:.*?)^```$", page, re.M | re.S)}
    assert kinds == {"python", "bash", "text"}
