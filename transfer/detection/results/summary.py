"""The result of a detection run per class, as a text table."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

from mixmask.engine.predictions import MATCHES


def per_class_table(metrics: Mapping[str, float]) -> str:
    """One row per class with each of its APs, sorted by the first, best first; empty without per-class metrics."""
    columns = list(dict.fromkeys(name.rsplit("/", 1)[0] for name in metrics if name.count("/") == 2))
    classes = dict.fromkeys(name.rsplit("/", 1)[1] for name in metrics if name.count("/") == 2)
    rows = [[name, *(metrics.get(f"{column}/{name}") for column in columns)] for name in classes]
    if not rows:
        return ""
    rows.sort(key=lambda row: -float(row[1] or 0))
    heading = "class" if all(column.split("/")[0] in MATCHES for column in columns) else ""
    return tabulate(rows, headers=[heading, *columns], floatfmt=".1f", missingval="-")
