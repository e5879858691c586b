"""The detailed metrics of a run as text tables: a row for each class, or for each number of images."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

# By the last part of a table's first column.
HEADINGS = {"AP": "class", "IoU": "class", "low_shot": "images per class", "error": "corruption"}


def detail_tables(metrics: Mapping[str, float]) -> list[str]:
    """The metrics whose names have three parts (``bbox/AP/cat``), a table for those that share their last parts.

    Rows are sorted by the first column, best first; rows of numbers keep their order.
    """
    columns: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.count("/") == 2:
            column, row = name.rsplit("/", 1)
            columns.setdefault(column, {})[row] = value
    tables: list[dict[str, dict[str, float]]] = []
    for column, values in columns.items():
        shared = next((table for table in tables if any(values.keys() & own.keys() for own in table.values())), None)
        if shared is None:
            tables.append({column: values})
        else:
            shared[column] = values
    return [_written(table) for table in tables]


def _written(table: Mapping[str, Mapping[str, float]]) -> str:
    first, *_ = table
    names = list(dict.fromkeys(row for own in table.values() for row in own))
    if not all(name.isdecimal() for name in names):
        names.sort(key=lambda name: -table[first].get(name, 0.0))
    rows = [[name, *(_text(column, own.get(name)) for column, own in table.items())] for name in names]
    heading = HEADINGS.get(first.rpartition("/")[2], "")
    return tabulate(rows, headers=[heading, *table], disable_numparse=True, colalign=["left", *["right"] * len(table)])


def _text(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if "chosen" in column else f"{value:.1f}"
