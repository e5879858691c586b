"""A table as people want to see it: what is the same everywhere stands in the caption, not in every line or cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from mixmask.evaluate.table import Key, Table


@dataclass(frozen=True)
class Compact:
    """A table without what is constant in it.

    Attributes:
        table: The table with the remaining levels of rows and columns.
        constants: What was taken out, in words: ``framework MoCo``, ``CIFAR-100``.
        num_runs: The number of runs of every cell that has any, if it is the same for all; else None.
        groups: For each level of the columns, the text and the number of neighbouring columns that share it, also in
            the levels above; the last level has one entry per column.
    """

    table: Table
    constants: tuple[str, ...]
    num_runs: int | None
    groups: tuple[tuple[tuple[str, int], ...], ...]

    @property
    def caption(self) -> str:
        """``All results: framework MoCo, epochs 200.``, or an empty text."""
        return f"All results: {', '.join(self.constants)}." if self.constants else ""


def compact(table: Table) -> Compact:
    """Take out of a table what every row or every column has in common.

    One level of the rows and one of the columns stay, so a table never loses its labels; of a single row or column,
    all of them stay.
    """
    names, lines = table.row_names, table.lines
    rows = [line.row for line in lines]
    kept_rows = _varying(rows, len(names))
    kept_columns = _varying(table.columns, len(table.columns[0]) if table.columns else 0)
    constants = [
        *(f"{name} {rows[0][n]}" for n, name in enumerate(names) if n not in kept_rows and rows[0][n]),
        *(text for n, text in enumerate(table.columns[0] if table.columns else ()) if n not in kept_columns and text),
    ]
    columns = tuple(tuple(column[n] for n in kept_columns) for column in table.columns)
    smaller = replace(
        table,
        row_names=tuple(names[n] for n in kept_rows),
        columns=columns,
        lines=tuple(replace(line, row=tuple(line.row[n] for n in kept_rows)) for line in lines),
    )
    counts = {len(cell.results) for line in lines for cell in line.cells if cell and cell.results}
    return Compact(smaller, tuple(constants), counts.pop() if len(counts) == 1 else None, _groups(columns))


def _varying(keys: tuple[Key, ...] | list[Key], levels: int) -> list[int]:
    """The levels in which keys differ: all of a single key's, and at least the last."""
    if len(keys) < 2:
        return [*range(levels)]
    return [n for n in range(levels) if len({key[n] for key in keys}) > 1] or [levels - 1]


def _groups(columns: tuple[Key, ...]) -> tuple[tuple[tuple[str, int], ...], ...]:
    levels = len(columns[0]) if columns else 0
    found = []
    for level in range(levels):
        last = level == levels - 1
        spans = groupby(enumerate(columns), key=lambda item: (item[1][: level + 1], item[0] if last else 0))
        found.append(tuple((key[0][level], sum(1 for _ in own)) for key, own in spans))
    return tuple(found)
