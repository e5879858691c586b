"""The mean over the columns of a table and the mean rank, beside each row."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from mixmask.evaluate.table import MISSING, Table, TableCell


def with_means(table: Table) -> Table:
    """The table with the mean over its columns and the mean rank beside every line that has a number in each column.

    Ranks are among these lines, 1 for the highest; equal numbers share the mean of their ranks. Published lines, which may
    have been measured otherwise, are ranked among themselves, and only where nothing else is in the table.
    """

    def value(cell: TableCell | None) -> float:
        if cell is None or (cell.summary is None and cell.published is None):
            return math.nan
        return cell.summary.mean if cell.summary is not None else cell.published.value if cell.published else math.nan

    if not table.lines:
        return table
    values = [[value(cell) for cell in line.cells] for line in table.lines]
    full = [number for number, own in enumerate(values) if not any(map(math.isnan, own))]
    here = [number for number in full if all(cell and cell.summary for cell in table.lines[number].cells)]
    whole = here or full
    ranks: dict[int, list[float]] = {number: [] for number in whole}
    for index in range(len(table.columns)):
        column = [values[number][index] for number in whole]
        for number in whole:
            above = sum(other > values[number][index] for other in column)
            equal = column.count(values[number][index])
            ranks[number].append(above + (equal + 1) / 2)
    lines = []
    for number, line in enumerate(table.lines):
        mean, rank = MISSING, MISSING
        if number in full:
            mean = f"{statistics.fmean(values[number]):.1f}"
        if number in ranks:
            rank = f"{statistics.fmean(ranks[number]):.2f}"
        lines.append(replace(line, row=(*line.row, mean, rank)))
    return replace(table, row_names=(*table.row_names, "mean", "mean rank"), lines=tuple(lines))
