"""The table of docs/integrations.md, made of what the tests run: ``python -m tests.compatibility`` writes it anew."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "integrations.md"
TITLE = "| library or repository | tested | model | what is swapped | calls |"


def targets() -> list[Any]:
    """Give the targets of all tests of integrations; all their packages must be there."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    files = sorted(path.stem for path in HERE.glob("test_integrations_*.py"))
    return [target for file in files for target in getattr(importlib.import_module(file), "TARGETS", ())]


def table() -> str:
    """Accelerate the model of each target, and say what was swapped."""
    import vidattn
    from vidattn import integrations

    rows: dict[tuple[str, str], tuple[dict[str, None], dict[str, None], dict[str, None]]] = {}
    for target in targets():
        from integration_cases import admit

        model = target.make()
        with pytest.MonkeyPatch.context() as patch:
            if target.stand_in:
                admit(model, target.integration, patch)
            report = vidattn.accelerate(model)
        versions, kinds, ops = rows.setdefault((target.library, target.model.partition(",")[0]), ({}, {}, {}))
        for swapped in report.swapped:
            kinds[f"`{swapped.original.__name__}` ({swapped.twin.level})"] = None  # type: ignore[attr-defined]
            ops |= dict.fromkeys(f"`{op}`" for op in swapped.twin.ops)  # type: ignore[attr-defined]
            for row in integrations._all():
                if issubclass(swapped.twin, row.twin) and row.name in {x.__name__ for x in swapped.original.__mro__}:
                    found = [version for version in row.tested.values() if version != "a stand-in"]
                    versions |= dict.fromkeys(part for version in found for part in version.split(", "))
    # Models that have all but their name in common share a line.
    same: dict[tuple[str, ...], list[str]] = {}
    for (library, model), columns in rows.items():
        same.setdefault((library, *(", ".join(column) for column in columns)), []).append(model)
    lines = [TITLE, "| --- | --- | --- | --- | --- |"]
    for (library, tested, classes, calls), models in sorted(same.items(), key=lambda row: row[0][0].lower()):
        owner = f"[{library}](https://github.com/{library})" if "/" in library else library
        lines.append(f"| {owner} | {tested} | {', '.join(models)} | {classes} | {calls} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """Give the page with its table replaced."""
    return re.sub(re.escape(TITLE) + r"(\n\|[^\n]*)*", lambda _: table(), page, count=1)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
