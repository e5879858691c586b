from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pandas as pd
import pytest

from mixmask.engine.errors import DataError, UserError
from mixmask.engine.records import SCHEMA, Record
from mixmask.evaluate.collect import FIXED, as_text, collect, frame, select, write_parquet
from tests.evaluate.made import backbone, laboratory, transfer, write


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(laboratory(), tmp_path_factory.mktemp("lab"))


def test_a_row_for_every_run_with_the_documented_columns(lab: Path) -> None:
    table = frame(collect(lab).runs)
    assert len(table) == len(laboratory())
    assert table.columns.tolist()[: len(FIXED)] == list(FIXED)
    grids = table[table["mix.grid"] == 4]
    assert set(grids["stage"]) == {"pretrain", "transfer"}
    assert not [name for name in table.columns if name.startswith("pretrain.mix")]
    assert table.loc[table["protocol"] == "detect_voc", "engine"].value_counts().to_dict() == {
        "detectron2": 10,
        "torchvision": 1,
    }
    assert "bbox/AP/cat" not in table.columns
    assert "bbox/AP/cat" in frame(collect(lab).runs, per_class=True).columns


def test_queries_select_rows(lab: Path) -> None:
    table = frame(collect(lab).runs)
    chosen = select(table, "dataset == 'cifar100' and protocol == 'knn' and `knn/top1` > 69.5")
    assert chosen["method"].tolist() == ["mixmask+unmix"]
    assert select(table, "`setting.k` == 20")["knn/top1"].tolist() == [66.0]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("dataste == 'cifar100'", "there is no column 'dataste'. Did you mean 'dataset'?"),
        ("dataset ==", "not a condition"),
        ("", "not a condition"),
        ("seed", "it is not a comparison"),
        ("@__import__('os').getpid() > 0", "not a condition"),
        ("dataset > 3", "cannot be compared"),
    ],
)
def test_a_query_that_cannot_be_answered_says_why(lab: Path, query: str, words: str) -> None:
    with pytest.raises(UserError, match="`mixmask results RUNS --columns` lists the columns") as caught:
        select(frame(collect(lab).runs), query)
    assert words in str(caught.value)


def test_csv_json_and_parquet_hold_the_same(lab: Path, tmp_path: Path) -> None:
    table = frame(collect(lab).runs)
    write_parquet(table, tmp_path / "results.parquet")
    as_parquet = pd.read_parquet(tmp_path / "results.parquet")
    as_csv = pd.read_csv(io.StringIO(as_text(table, "csv")))
    as_json = json.loads(as_text(table, "json"))
    assert len(as_parquet) == len(as_csv) == len(as_json) == len(table)
    for number, row in enumerate(as_json):
        assert row["fingerprint"] == as_csv["fingerprint"][number] == as_parquet["fingerprint"][number]
        for metric in ("knn/top1", "bbox/AP", "linear/top1"):
            if metric in row:
                assert row[metric] == as_csv[metric][number] == as_parquet[metric][number]
            else:
                assert pd.isna(as_csv[metric][number])
                assert pd.isna(as_parquet[metric][number])


def test_the_order_of_files_does_not_matter(tmp_path: Path) -> None:
    records = laboratory()
    first = frame(collect(write(records, tmp_path / "a")).runs).drop(columns="run")
    random.Random(0).shuffle(records)
    second = frame(collect(write(records, tmp_path / "b")).runs).drop(columns="run")
    pd.testing.assert_frame_equal(first, second)


def put(folder: Path, text: str | bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "record.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_damaged_foreign_and_unfinished_are_listed_and_not_fatal(tmp_path: Path) -> None:
    good = transfer(backbone(), "knn", {"knn/top1": 50.0}).model_dump(by_alias=True, mode="json")
    put(tmp_path / "good", json.dumps(good))
    put(tmp_path / "half", json.dumps(good)[:100])
    put(tmp_path / "foreign", '{"accuracy": 3}')
    put(tmp_path / "list", "[1, 2]")
    put(tmp_path / "bytes", b"\xff\xfe\x00")
    put(tmp_path / "deep", "[" * 100_000)
    put(tmp_path / "nan", json.dumps({**good, "metrics": {"knn/top1": float("nan")}}))
    put(tmp_path / "newer", json.dumps({**good, "schema": SCHEMA + 1}))
    put(tmp_path / "text", json.dumps({**good, "metrics": {"knn/top1": "fifty"}}))
    (tmp_path / "folder" / "record.json").mkdir(parents=True)
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "recipe.yaml").write_text("")
    collection = collect(tmp_path)
    assert [run.path.name for run in collection.runs] == ["good"]
    reasons = {path.parent.name: reason for path, reason in collection.damaged}
    assert set(reasons) == {"half", "foreign", "list", "bytes", "deep", "nan", "newer", "text", "folder"}
    assert "truncated" in reasons["half"]
    assert "no schema" in reasons["foreign"]
    assert "a JSON list" in reasons["list"]
    assert "not finite numbers: knn/top1" in reasons["nan"]
    assert f"schema {SCHEMA + 1}; this version reads 1 to {SCHEMA}" in reasons["newer"]
    assert [path.name for path in collection.unfinished] == ["going"]
    assert "left out" in collection.remarks()
    assert "unfinished: " in collection.remarks()


def test_a_folder_without_finished_runs_says_what_is_there(tmp_path: Path) -> None:
    for folder, words in (
        (tmp_path / "absent", "no such"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "no record.json"),
    ):
        if folder.name == "file":
            folder.write_text("")
        with pytest.raises(DataError, match=words):
            collect(folder)
    (tmp_path / "file").unlink()
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "recipe.yaml").write_text("")
    put(tmp_path / "broken", json.dumps({"metrics": {"a": 1}}))
    with pytest.raises(DataError) as caught:
        collect(tmp_path)
    assert f"unfinished: {tmp_path / 'going'}" in str(caught.value)
    assert f"left out {tmp_path / 'broken' / 'record.json'}" in str(caught.value)


def test_records_of_schema_1_are_read(tmp_path: Path) -> None:
    new = transfer(backbone(), "knn", {"knn/top1": 50.0})
    old = new.model_dump(by_alias=True, mode="json")
    for key in ("recipe", "pretraining"):
        del old[key]
    expected = {"metric": "knn/top1", "value": 50.0, "tolerance": 1.0, "source": "us"}
    for name, kept in (("none", None), ("one", expected)):
        put(tmp_path / name, json.dumps({**old, "schema": 1, "expected": kept}))
    none, one = (Record.read(tmp_path / name / "record.json") for name in ("none", "one"))
    assert none == new.model_copy(update={"recipe": {}, "pretraining": {}})
    assert one.expected[0].value == 50.0
    assert one.schema_version == SCHEMA
    rows = frame(collect(tmp_path).runs)
    assert rows["setting.k"].tolist() == [200, 200]


def test_the_same_work_in_two_folders_counts_once(tmp_path: Path) -> None:
    record = transfer(backbone(), "knn", {"knn/top1": 50.0})
    write([record], tmp_path / "a")
    write([record.model_copy(update={"name": "again"})], tmp_path / "b")
    assert len(collect(tmp_path).runs) == 2
    assert len(collect(tmp_path).distinct) == 1
