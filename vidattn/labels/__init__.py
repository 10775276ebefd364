"""Class names of the data sets that the published checkpoints were trained on."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent
_BUNDLED = {400: "kinetics400.txt"}


def load_labels(path: str | os.PathLike[str]) -> list[str]:
    r"""Reads class names from a text file, one name a line, in the order of the classifier's outputs.

    Args:
        path: the file, UTF-8. Blank lines at the end are ignored.

    Returns:
        The names; line ``i`` (from 0) is the name of logit ``i``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not text, or it holds no names.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "names.txt")
        ...     _ = file.write_text("cat\ndog\n")
        ...     load_labels(file)
        ['cat', 'dog']
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: expected a UTF-8 text file, one class name a line, got {path} ({error})") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"labels: expected a text file with one class name a line, got no names in {path}")
    return lines


def default_labels(num_classes: int) -> list[str] | None:
    """Returns the bundled class names for a classifier of that many classes, or None if none are bundled.

    400 classes are taken for Kinetics-400, whose classes are numbered in the alphabetical order of their names
    (arXiv 1705.06950).

    Args:
        num_classes: number of logits of the classifier.

    Returns:
        The names in the order of the logits, or None.

    Example:
        >>> default_labels(400)[:2]
        ['abseiling', 'air drumming']
        >>> default_labels(7) is None
        True
    """
    name = _BUNDLED.get(num_classes)
    return None if name is None else load_labels(_FOLDER / name)
