from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError
from engine.records import Record
from evaluate.collect import collect
from evaluate.tables import methods_by_protocols, render


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "stage": "transfer",
        "protocol": "knn",
        "name": "x",
        "dataset": "cifar10",
        "framework": "mocov2",
        "method": "mixmask",
        "arch": "resnet50",
        "seed": 0,
        "fingerprint": repr(sorted(changes.items(), key=repr)),
        "lineage": "lineage1",
        "protocol_fingerprint": "recipe1",
        "pretrain_dataset": "imagenet1k",
        "pretrain_epochs": 200,
        "metrics": {"knn/top1": 50.0},
        "environment": {},
        "seconds": 1.0,
    }
    return Record.model_validate({**values, **changes})


EXAMPLES = [
    record(),
    record(method="random", pretrain_epochs=0, metrics={"knn/top1": 20.0}),
    record(seed=1, metrics={"knn/top1": 51.0}),
    record(protocol="detect_voc", dataset="voc2007", metrics={"bbox/AP": 57.9, "bbox/AP50": 83.0, "bbox/AP75": 64.5}),
    record(stage="pretrain", protocol="pretrain", metrics={"loss": 3.0}),
]


def test_rows_are_methods_and_columns_protocols() -> None:
    table = methods_by_protocols(EXAMPLES)
    assert table["method"].tolist() == ["random", "mixmask"]
    assert table["cifar10: kNN top-1"].tolist() == ["20.0", "50.5 (n=2)"]
    assert table["voc2007: VOC AP50"].tolist() == ["", "83.0"]
    assert table.columns.tolist()[-3:] == ["voc2007: VOC AP", "voc2007: VOC AP50", "voc2007: VOC AP75"]


@given(st.permutations(EXAMPLES))
def test_order_of_records_does_not_matter(records: list[Record]) -> None:
    assert render(methods_by_protocols(records), "csv") == render(methods_by_protocols(EXAMPLES), "csv")


def test_other_settings_never_share_a_column() -> None:
    a = record(settings={"k": 200})
    b = record(settings={"k": 20}, protocol_fingerprint="recipe2", metrics={"knn/top1": 60.0})
    table = methods_by_protocols([a, b])
    assert table["cifar10: kNN top-1 (k 200)"].tolist() == ["50.0"]
    assert table["cifar10: kNN top-1 (k 20)"].tolist() == ["60.0"]


def test_recipes_that_differ_elsewhere_are_told_apart_by_their_fingerprint() -> None:
    a, b = record(), record(protocol_fingerprint="abcdefgh", metrics={"knn/top1": 60.0})
    table = methods_by_protocols([a, b])
    assert table["cifar10: kNN top-1 (recipe recipe)"].tolist() == ["50.0"]
    assert table["cifar10: kNN top-1 (recipe abcdef)"].tolist() == ["60.0"]


def test_other_pretrainings_never_share_a_row() -> None:
    a, b = record(), record(lineage="other-grid", metrics={"knn/top1": 60.0})
    table = methods_by_protocols([a, b])
    assert sorted(table["method"]) == ["mixmask [lineag]", "mixmask [other-]"]
    assert sorted(table["cifar10: kNN top-1"]) == ["50.0", "60.0"]


def test_the_same_work_under_two_names_counts_once() -> None:
    table = methods_by_protocols([record(), record().model_copy(update={"name": "again"})])
    assert table["cifar10: kNN top-1"].tolist() == ["50.0"]


def test_other_shares_of_labels_have_columns_of_their_own() -> None:
    table = methods_by_protocols([record(protocol="semisup_5", metrics={"semisup/top1": 40.0})])
    assert table["cifar10: 5 % labels top-1"].tolist() == ["40.0"]


def test_markdown_and_csv_say_the_same() -> None:
    table = methods_by_protocols(EXAMPLES)
    read = pd.read_csv(io.StringIO(render(table, "csv")), dtype=str, keep_default_na=False)
    assert read.equals(table.astype(str))
    markdown = render(table, "md")
    assert [cell.strip() for cell in markdown.splitlines()[0].strip("|").split("|")] == table.columns.tolist()


def test_names_with_pipes_stay_one_cell() -> None:
    markdown = render(methods_by_protocols([record(framework="a|b")]), "md")
    assert "a\\|b" in markdown


def test_damaged_and_unfinished_runs_are_listed_and_not_fatal(tmp_path: Path) -> None:
    for name, text in (("good", record().model_dump_json(by_alias=True)), ("half", '{"stage": "tra'), ("other", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "recipe.yaml").write_text("")
    collection = collect(tmp_path)
    assert len(collection.records) == 1
    assert {path.parent.name for path, _ in collection.damaged} == {"half", "other"}
    assert [path.name for path in collection.unfinished] == ["going"]


def test_a_folder_without_finished_runs_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "recipe.yaml").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_text(json.dumps({"metrics": {"a": 1}}))
    with pytest.raises(DataError) as caught:
        collect(tmp_path)
    assert "unfinished:" in str(caught.value)
    assert "damaged:" in str(caught.value)
