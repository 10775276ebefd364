"""Results in a file, group by group, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What must be the same for results to stand in one file.
SAME = ("processor", "cores", "threads", "cpu_isa", "device", "torch", "torch_isa", "vidattn")


Key = tuple[str, str, str, int]  # case, direction, dtype, threads


def key_of(entry: Mapping[str, Any]) -> Key:
    """Name the case of an entry."""
    info = entry["info"]
    return info["case"], info["direction"], info["dtype"], info["threads"]


def rounded(value: Any) -> Any:
    """Keep five digits of each number with a fraction, in lists and dicts too: no measurement has more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, an entry a line; the file is complete whenever somebody looks at it."""
    lines = ",\n".join(json.dumps(rounded(entry)) for entry in result["benchmarks"])
    text = (
        f'{{"machine": {json.dumps(result["machine"])},\n"date": "{result["date"]}",\n"benchmarks": [\n{lines}\n]}}\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


class Store:
    """A result that grows.

    Args:
        path: its file, which may exist.
        machine: what ``machine.describe`` gives.

    Raises:
        ValueError: the file has results of another machine or version, or is no result.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self.path = path
        self.result: dict[str, Any] = {"machine": dict(machine), "benchmarks": []}
        if path.exists():
            try:
                self.result = json.loads(path.read_text())
                there = self.result["machine"]
                self.result["benchmarks"] = list(self.result["benchmarks"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: expected a result of a benchmark, got {error!r}") from None
            for key in SAME:
                if there.get(key) != machine.get(key):
                    known = f"expected results with {key} {machine.get(key)}, got {there.get(key)}"
                    raise ValueError(f"{path}: {known}; name another file, or remove this one")

    def contenders(self, key: Key) -> set[str]:
        """Name those of a case that were measured, or could not be."""
        names: set[str] = set()
        for entry in self.result["benchmarks"]:
            if key_of(entry) == key:
                names |= {entry["info"]["contender"], *entry["info"]["not_run"]}
        return names

    def put(self, key: Key, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keep what was measured of a case, in place of what there was."""
        others = [entry for entry in self.result["benchmarks"] if key_of(entry) != key]
        self.result["benchmarks"] = [*others, *entries]
        self.result["date"] = datetime.date.today().isoformat()
        write(self.path, self.result)
