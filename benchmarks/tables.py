"""Tables in the terminal, with rich where it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; a cell may have several lines."""
    lines = [tuple(columns), *map(tuple, rows)]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        flat = [[cell.replace("\n", "; ") for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*flat)]
        print(title)
        print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in flat))
        return
    table = Table(*lines[0], title=title)
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=None if Console().is_terminal else 190).print(table)
