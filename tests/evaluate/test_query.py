"""Conditions on tables: what they may say, and what they must not do."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmask.engine.errors import UserError
from mixmask.evaluate.collect import as_text, select

TABLE = pd.DataFrame(
    {"dataset": ["cifar10", "cifar100", None], "epochs": [200.0, 800.0, float("nan")], "knn/top1": [1.0, 2.0, 3.0]}
).assign(sure=[True, False, True])


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("dataset == 'cifar10'", [0]),
        ("dataset != 'cifar10' and epochs > 1", [1]),
        ("`knn/top1` > 1 & `knn/top1` < 3 | epochs == 200", [0, 1]),
        ("not dataset in ['cifar10', 'cifar100']", [2]),
        ("dataset not in ['cifar10']", [1, 2]),
        ("1 < `knn/top1` <= 3", [1, 2]),
        ("~sure", [1]),
        ("sure and epochs > -1", [0]),
        ("epochs == epochs", [0, 1]),
        ("dataset == '`a` & ~b'", []),
        ("dataset in ['`a` & ~b', \"cifar10\"]", [0]),
    ],
)
def test_conditions(query: str, rows: list[int]) -> None:
    assert list(select(TABLE, query).index) == rows


@pytest.mark.parametrize(
    "query",
    [
        "dataset.to_csv('x')",
        "epochs > 9**9**9",
        "__import__('os').system('touch x')",
        "(lambda: 1)() == 1",
        "[x for x in dataset] == 1",
        "dataset['a'] == 1",
        "dataset == f'{epochs}'",
        "@epochs > 1",
        "epochs",
        "epochs = 3",
        "dataset > 3",
        "(" * 3000,
        "not " * 2400 + "sure",
        "x" * 20_000,
        "",
        "absent == 1",
        "sure is True",
        "dataset == 'a\n'; import os",
    ],
)
def test_anything_else_is_refused_and_does_nothing(query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--query"):
        select(TABLE, query)
    assert not list(tmp_path.iterdir())


def test_a_text_with_backticks_is_a_text() -> None:
    table = pd.DataFrame({"name": ["`a` & ~b", "a"]})
    assert list(select(table, "name == '`a` & ~b'").index) == [0]


@given(st.text(alphabet="ab('`&|~=<>! 19*[],.\\\"\n", max_size=30))
def test_no_text_ends_in_a_traceback(text: str) -> None:
    try:
        select(TABLE, text)
    except UserError:
        return


def test_formulas_are_texts_in_csv() -> None:
    table = pd.DataFrame({"name": ["=1+1", "@x", "\tx", "-cmd", "-3.5", "fine"], "=head": [1.5, -2.0, 0, 0, 0, 0]})
    lines = as_text(table, "csv").splitlines()
    assert lines[0] == "name,'=head"
    assert [line.split(",")[0] for line in lines[1:]] == ["'=1+1", "'@x", "'\tx", "'-cmd", "-3.5", "fine"]
    assert lines[2].endswith(",-2.0")
