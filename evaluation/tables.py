"""Tables of results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, with no newline at its end. Cells are turned into text by `str`.

    Example:
        >>> print(markdown_table(["budget", "nDCG"], [[(1, 1), 0.5]]))
        | budget | nDCG |
        |---|---|
        | (1, 1) | 0.5 |
    """
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
