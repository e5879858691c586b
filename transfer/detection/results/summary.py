"""The result of a detection run as a user reads it: the means, and a table per class."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate


def per_class_table(metrics: Mapping[str, float]) -> str:
    """A row per class with every average precision that there is of it, best first; empty if there are none."""
    columns = list(dict.fromkeys(name.rsplit("/", 1)[0] for name in metrics if name.count("/") == 2))
    classes = dict.fromkeys(name.rsplit("/", 1)[1] for name in metrics if name.count("/") == 2)
    rows = [[name, *(metrics.get(f"{column}/{name}") for column in columns)] for name in classes]
    if not rows:
        return ""
    rows.sort(key=lambda row: -float(row[1] or 0))
    return tabulate(rows, headers=["class", *columns], floatfmt=".1f", missingval="-")
