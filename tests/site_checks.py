"""Checks of the documentation as a site: ``python -m tests.site_checks build/site`` looks at it in a browser as well.

The browser needs playwright, and a Chromium: one of the system or one that playwright installed.
Pages are opened as files, without a server: what does not work so needs a network.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOADED = ("href", "src", "data-src", "poster")
SILENT = ("code", "script", "style")  # hold no prose


class _Page(HTMLParser):
    """What an HTML file links to and loads, its anchors and its prose.

    Attributes:
        links: addresses of everything it links to or loads.
        loads: addresses of what a browser fetches to show it.
        anchors: names that a link can lead to.
        text: the prose of the page.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self._silent = 0  # open tags whose content is no prose
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note names and addresses."""
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        addresses = [values[name] for name in LOADED if name in values]
        self.links += addresses
        if tag != "a" and not (tag == "link" and values.get("rel") in ("canonical", "next", "prev")):
            self.loads += addresses
        self._silent += tag in SILENT

    def handle_endtag(self, tag: str) -> None:
        """Note where prose goes on."""
        self._silent -= tag in SILENT

    def handle_data(self, data: str) -> None:
        """Note what is prose."""
        if not self._silent:
            self.text.append(data)


def read_site(site: Path) -> dict[Path, _Page]:
    """Parse all pages of a site.

    Args:
        site: folder of the built site.

    Returns:
        What each HTML file holds, by its path; but 404.html, which a server gives for any folder.
    """
    return {path: _Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def broken_links(pages: dict[Path, _Page]) -> Iterator[str]:
    """Name links to files that are not there, and to anchors that their page does not have.

    Args:
        pages: what ``read_site`` gives.

    Yields:
        A line for each.
    """
    for path, page in pages.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if urlsplit(address).scheme:
                continue
            target = Path(os.path.normpath(path.parent / unquote(address))) if address else path
            if not target.exists():
                yield f"{path}: {link}: there is no such file"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{path}: {link}: the page has no such anchor"


def remote_loads(pages: dict[Path, _Page]) -> Iterator[str]:
    """Name what pages fetch from elsewhere.

    Args:
        pages: what ``read_site`` gives.

    Yields:
        A line for each.
    """
    for path, page in pages.items():
        yield from (f"{path}: {address}" for address in page.loads if urlsplit(address).netloc)


def leftovers(pages: dict[Path, _Page]) -> Iterator[str]:
    """Name what should have become something else: roles of reST, directives, references that lead nowhere.

    Args:
        pages: what ``read_site`` gives.

    Yields:
        A line for each page.
    """
    for path, page in pages.items():
        found = re.findall(r":(?:func|class|meth|mod|attr|data):|^:::|\]\[", "".join(page.text), re.MULTILINE)
        if found:
            yield f"{path}: {', '.join(found)}"


def look(site: Path, pages: Iterable[Path]) -> list[str]:
    """Open pages in a browser and search in one.

    Args:
        site: folder of the built site.
        pages: those of its files to open.

    Returns:
        What is wrong, a line each; nothing if all pages render, pictures load and the search finds an op.

    Raises:
        ImportError: playwright is not installed.
        playwright.sync_api.Error: there is no Chromium.
    """
    from playwright.sync_api import Error, sync_playwright

    wrong: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=next(filter(None, map(shutil.which, BROWSERS)), None))
        tab = browser.new_page()
        now = site

        def note(what: Any) -> None:
            wrong.append(f"{now}: {what}")

        tab.on("pageerror", lambda error: note(f"script: {error}"))
        tab.on("console", lambda message: note(f"console: {message.text}") if message.type == "error" else None)
        tab.on("requestfailed", lambda request: note(f"not loaded: {request.url}"))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or note(f"asks for {request.url}"))
        for now in pages:
            tab.goto(now.resolve().as_uri())
            heading = tab.locator("article h1").first
            if not heading.is_visible() or not heading.inner_text().strip():
                note("no heading is visible")
            for picture in tab.locator("article img").all():
                if not picture.evaluate("image => image.decode().then(() => image.naturalWidth > 0, () => false)"):
                    note(f"the picture {picture.get_attribute('src')} does not load")
            if tab.evaluate("document.documentElement.scrollWidth > innerWidth"):
                note("wider than the window")
        now = site / "index.html"
        tab.goto(now.resolve().as_uri())
        try:
            tab.locator("[data-md-component=search-query]").fill("window3d_attention")
            tab.locator(".md-search-result__link").first.wait_for()
        except Error as error:
            note(f"the search finds nothing: {error.message.splitlines()[0]}")
        browser.close()
    return wrong


def main(arguments: list[str]) -> int:
    """Check a built site.

    Args:
        arguments: the folder.

    Returns:
        0 if nothing is wrong, else 1.
    """
    site = Path(arguments[0])
    pages = read_site(site)
    wrong = [*broken_links(pages), *remote_loads(pages), *leftovers(pages), *look(site, pages)]
    print("\n".join(wrong) or f"{len(pages)} pages: all render, no link is broken, all pictures load, the search finds")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
