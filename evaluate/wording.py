"""What every format of a table says in the same words."""

from __future__ import annotations

from collections.abc import Callable

from mixmask.evaluate.table import Table, TableCell

READING = "mean ± sample standard deviation (number of runs)"
MARKS = (
    "best in its column among runs with the same protocol",
    "not significantly different from the best (Welch's t-test, p > 0.05; three runs or more of each)",
)
MISSING = "–"


def numbers(cell: TableCell) -> tuple[str, str]:
    """A cell's own result and its published number with the difference, as plain text; either may be empty."""
    summary = cell.summary
    own = ""
    if summary is not None:
        spread = f" ± {summary.std:.1f}" if summary.std is not None else ""
        own = f"{summary.mean:.1f}{spread} ({summary.n})"
    if cell.published is None:
        return own, ""
    difference = f", {round(cell.difference, 1) + 0.0:+.1f}" if cell.difference is not None else ""  # no -0.0
    return own, f"[{cell.published.value:.1f}{difference}]".replace("-", "−")


def cell_text(
    cell: TableCell | None, style: Callable[[str, TableCell], str], escape: Callable[[str], str], sup: str
) -> str:
    """A cell in one line: the own result, styled, with its footnotes, and the published one.

    Args:
        cell: What to show; nothing for None.
        style: Marks the best, and what cannot be told from it.
        escape: Makes plain text of the format.
        sup: How the format raises letters, with ``{}`` for them.
    """
    if cell is None:
        return ""
    own, published = numbers(cell)
    marked = style(escape(own), cell) if own else MISSING
    marks = sup.format(",".join(cell.marks)) if cell.marks else ""
    return " ".join(filter(None, (marked + marks, escape(published))))


def remarks(table: Table) -> list[str]:
    """What stands under a table; an empty text is where a format explains its marks."""
    published = f" [published, difference]. Published: {'; '.join(table.sources)}" if table.sources else ""
    lines = [f"Cells: {READING}{published}."]
    if any(cell.best for line in table.lines for cell in line.cells if cell):
        lines.append("")
    return [*lines, *table.notes]
