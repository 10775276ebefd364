"""The documentation as a site: it builds strictly, no link of it is broken, and it needs nothing from elsewhere."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision_swin  # noqa: F401  (before transformers, which imports torchvision)
from site_checks import broken_links, leftovers, read_site, remote_loads

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_are_whole(site: Path) -> None:
    pages = read_site(site)
    assert len(pages) > 30
    assert not list(broken_links(pages))
    assert not list(remote_loads(pages))
    assert not list(leftovers(pages))


def test_search_needs_no_server(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index") and "window3d_attention" in index
    assert 'src="assets/iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8")


def test_checks_find_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html"></a><a href="#top"></a><a href="#bottom"></a><a href="https://x.org"></a>'
        '<img src="no.png"><script src="https://x.org/x.js"></script><p>See :func:<code>f</code>, [g][] or</p>\n'
        "<p>\n::: vidattn.nothing</p><style>p::before</style>"
    )
    pages = read_site(tmp_path)
    assert [line.split(": ")[1] for line in broken_links(pages)] == ["b.html", "#bottom", "no.png"]
    assert [line.split(": ")[1] for line in remote_loads(pages)] == ["https://x.org/x.js"]
    assert [line.split(": ", 1)[1] for line in leftovers(pages)] == [":func:, ][, :::"]


def _documented() -> list[str]:
    """Give the modules of what the reference shows."""
    names = re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.MULTILINE)
    found = set()
    for name in names:
        parent, _, last = name.rpartition(".")
        what = getattr(importlib.import_module(parent), last, None) or importlib.import_module(name)
        found.add(getattr(what, "__module__", name))
    return sorted(found)


@pytest.mark.parametrize("module", _documented())
def test_examples_of_the_reference_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = importlib.import_module(module)
    assert "+SKIP" not in inspect.getsource(code)
    assert doctest.testmod(code).failed == 0


def test_docstrings_are_markdown() -> None:
    roles = re.compile(r":(?:func|class|meth|mod|attr|data):`")
    files = [path for folder in ("vidattn", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 80
    assert not [str(path) for path in files if roles.search(path.read_text(encoding="utf-8"))]
