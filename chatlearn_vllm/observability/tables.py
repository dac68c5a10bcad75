"""How do results look as plain text, for a terminal or a log file?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_CELL = 48
"""Characters of a text that are shown."""


def metric_table(metrics: Mapping[str, float], before: Mapping[str, float]) -> str:
    """One line per metric: its value, and by how much it changed.

    Args:
        metrics: by name.
        before: those that they are compared with; where one is missing, there is a `-`.
    """
    rows = [["metric", "value", "change"]]
    for name, value in metrics.items():
        change = f"{value - before[name]:+.4g}" if name in before else "-"
        rows.append([name, f"{value:.4g}", change])
    return table(rows, right=(1, 2))


def sample_table(columns: Mapping[str, Sequence[object]], num_rows: int) -> str:
    """The first rows of some columns; long texts are cut, line breaks shown as such."""
    rows = [list(columns)]
    shown = min(num_rows, *(len(column) for column in columns.values()))
    rows += [[_cell(column[row]) for column in columns.values()] for row in range(shown)]
    return table(rows)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lines of columns with two spaces between them.

    Args:
        rows: the first one is the heading.
        right: columns that are aligned at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(cells)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text.replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 3] + "..."
