"""The texts that all formats of a table share."""

from __future__ import annotations

from mixmask.evaluate.table import Table, TableCell

READING = "mean ± sample standard deviation (number of runs)"
MARKS = (
    "best in its column among runs with the same protocol whose backbones differ in the mixture only",
    "not significantly different from the best (Welch's t-test, p > 0.05; three runs or more of each)",
)


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


def heading(table: Table) -> str:
    """The heading above a table."""
    return f"Table {table.id}: {table.title}" if table.id.isdigit() else table.title


def remarks(table: Table) -> list[str]:
    """The remarks below a table; where one is empty, the format explains its own marks."""
    published = f" [published, difference]. Published: {'; '.join(table.sources)}" if table.sources else ""
    lines = [f"Cells: {READING}{published}."]
    if any(cell.best for line in table.lines for cell in line.cells if cell):
        lines.append("")
    return [*lines, *table.notes]
