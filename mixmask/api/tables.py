"""Results as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mixmask.api import Place

if TYPE_CHECKING:
    import pandas as pd

    from mixmask.evaluate.comparison import Comparison


def results(runs: Place = "runs", query: str | None = None) -> pd.DataFrame:
    """All finished runs below a folder, one row each; ``mixmask results --columns`` describes the columns.

    Args:
        runs: Folder of all runs.
        query: A condition on the columns, such as ``"dataset == 'cifar100'"``.

    >>> list(results(folder / "some")["knn/top1"])
    [45.0]
    """
    from mixmask.evaluate.collect import collect, frame, select

    table = frame(collect(Path(runs)).runs)
    return table if query is None else select(table, query)


def compare(first: str, second: str, runs: Place = "runs") -> list[Comparison]:
    """The difference between two groups of runs, with a 95 % interval and a test, wherever both have results.

    Args:
        first: A method, or a condition on the columns of `results`.
        second: The method or condition to compare it with.
        runs: Folder of all runs.

    Returns:
        One comparison for each data set, protocol and metric that both have; `print` shows it in words.
    """
    from mixmask.evaluate.collect import collect
    from mixmask.evaluate.comparison import chosen
    from mixmask.evaluate.comparison import compare as compared

    found = collect(Path(runs))
    return compared(chosen(found, first), chosen(found, second))
