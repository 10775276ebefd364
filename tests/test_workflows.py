"""The workflows of GitHub: they run what the Makefile has, with no more rights than they need.

``make lint`` holds them to GitHub's schema.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
JOBS = [(path.stem, name) for path in FILES for name in yaml.safe_load(path.read_text())["jobs"]]


def read(stem: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{stem}.yml").read_text())


def test_what_they_make_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    made = {target for path in FILES for target in re.findall(r"\bmake ([a-z-]+)", path.read_text())}
    assert made >= {"lint", "test", "test-cuda", "docs", "package-test", "sanitize"}
    assert made <= targets
    short = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert set(short) <= made
    assert {"TORCH", "TORCHVISION", "TRITON"} <= set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))


@pytest.mark.parametrize(("stem", "name"), JOBS)
def test_jobs_end_and_have_few_rights(stem: str, name: str) -> None:
    workflow = read(stem)
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]
    job = workflow["jobs"][name]
    assert job["timeout-minutes"] <= 360
    assert len(job.get("permissions", {})) <= 1
    for step in job["steps"]:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(?:v\d+|release/v\d+)", step.get("uses", "actions/none@v1"))


def test_the_oldest_and_newest_python_are_tried() -> None:
    lowest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    said = re.search(r"^\| Python \| ([\d.]+) to ([\d.]+);", (ROOT / "docs/versioning.md").read_text(), re.MULTILINE)
    assert lowest and said and said[1] == lowest[1]
    tried = [row["python"] for row in read("ci")["jobs"]["test"]["strategy"]["matrix"]["include"]]
    assert (tried[0], tried[-1]) == said.groups()
    assert tuple(read("release")["jobs"]["check"]["strategy"]["matrix"]["python"]) == said.groups()
