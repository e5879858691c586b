"""What is constant in a table stands in its caption, and nothing is lost."""

from __future__ import annotations

import pytest

from mixmask.evaluate.compact import compact
from mixmask.evaluate.render import render
from tests.evaluate.made import backbone, laboratory, transfer
from tests.evaluate.test_tables import IDS, table_of


def test_what_is_the_same_everywhere_stands_in_the_caption() -> None:
    records = [
        transfer(backbone(method=method, seed=seed), "knn", {"knn/top1": 60.0 + seed})
        for method in ("vanilla", "mixmask")
        for seed in range(3)
    ]
    small = compact(table_of(records, "methods"))
    assert small.table.row_names == ("method",)
    assert small.table.columns == (("CIFAR-100", "kNN top-1"),)  # a single column keeps all of its levels
    assert small.caption == "All results: pretrained on CIFAR-100, framework MoCo, arch resnet18, epochs 1,000."
    assert small.num_runs == 3
    assert "(3)" not in render(table_of(records, "methods"), "latex")
    alone = compact(table_of(records[:1], "methods"))
    assert alone.table.row_names == table_of(records, "methods").row_names
    assert alone.constants == ()


@pytest.mark.parametrize("id", IDS)
def test_a_compact_table_loses_nothing(id: str) -> None:
    whole = table_of(laboratory(), id)
    small = compact(whole)
    assert [line.cells for line in small.table.lines] == [line.cells for line in whole.lines]
    for whole_keys, keys in (
        ([line.row for line in whole.lines], [line.row for line in small.table.lines]),
        (whole.columns, small.table.columns),
    ):
        told = [{*key} | {text for text in key if text in small.caption} for key in keys]
        assert all(text in one or text in small.caption for key, one in zip(whole_keys, told) for text in key)
    for level in small.groups:
        assert sum(span for _, span in level) == len(whole.columns)
