"""The texts that all formats of a table share."""

from __future__ import annotations

from mixmask.evaluate.table import Table, TableCell

MARKS = (
    "best in its column among runs with the same protocol whose backbones differ in the mixture only (two runs or more "
    "of each)",
    "not significantly different from the best (Welch's t-test, p > 0.05; three runs or more of each)",
)


def numbers(cell: TableCell, counted: bool = True) -> tuple[str, str]:
    """A cell's own result and its published number with the difference, as plain text; either may be empty.

    Args:
        cell: The cell.
        counted: Whether the number of runs stands behind the result.
    """
    summary = cell.summary
    own = ""
    if summary is not None:
        spread = f" ± {summary.std:.1f}" if summary.std is not None else ""
        own = f"{summary.mean:.1f}{spread}" + f" ({summary.n})" * counted
    if cell.published is None:
        return own, ""
    difference = f", {round(cell.difference, 1) + 0.0:+.1f}" if cell.difference is not None else ""  # no -0.0
    return own, f"[{cell.published.value:.1f}{difference}]".replace("-", "−")


def heading(table: Table) -> str:
    """The heading above a table."""
    return f"Table {table.id}: {table.title}" if table.id.isdigit() else table.title


def reading(num_runs: int | None) -> str:
    """How a result is read; ``num_runs`` is the number of runs of every result, if it is the same for all."""
    if num_runs == 1:
        return "one run each"
    return "mean ± sample standard deviation" + (f" of {num_runs} runs" if num_runs else " (number of runs)")


def remarks(table: Table, num_runs: int | None = None) -> list[str]:
    """The remarks below a table; where one is empty, the format explains its own marks."""
    published = f" [published, difference]. Published: {'; '.join(table.sources)}" if table.sources else ""
    lines = [f"Cells: {reading(num_runs)}{published}."]
    if any(cell.best for line in table.lines for cell in line.cells if cell):
        lines.append("")
    return [*lines, *table.notes]
