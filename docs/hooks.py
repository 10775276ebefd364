"""What makes the site out of the pages of this folder and of docstrings: hooks of MkDocs and of mkdocstrings.

README, CONTRIBUTING, CHANGELOG and SECURITY are pages of it, and files of the repository that pages link to (results of
benchmarks, examples, licences) lie beside them. So links are written as they work in a clone, and work on the site too,
wherever that is put.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")  # to a file, without its anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside this folder, and the files that pages link to."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            target = _target(link, page.src_uri)
            known = target.endswith(".md") or target.startswith("docs/")  # what of these is missing, MkDocs reports
            if not known and (ROOT / target).is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turn links to files of the repository into those of the site."""

    def moved(link: re.Match[str]) -> str:
        target = _target(link[0], page.file.src_uri)
        place = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)


def _target(link: str, page: str) -> str:
    """Give what a page of the site links to, as a path in the repository."""
    source = {place: path for path, place in PAGES.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


class Examples(griffe.Extension):
    """Show the section `Example` of docstrings as code, which is what mkdocstrings does to `Examples`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it, before the docstring is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
