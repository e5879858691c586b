"""The detailed metrics of a run as text."""

from __future__ import annotations

from mixmask.transfer.summary import detail_tables


def test_a_row_for_each_class_the_best_first() -> None:
    (table,) = detail_tables({"bbox/AP": 3, "bbox/AP/cat": 1.0, "segm/AP/cat": 2.0, "bbox/AP/dog": 30.0})
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["class", "bbox/AP", "segm/AP"]
    assert rows[2:] == [["dog", "30.0", "-"], ["cat", "1.0", "2.0"]]
    assert detail_tables({"knn/top1": 3}) == []


def test_shots_and_classes_are_tables_of_their_own() -> None:
    metrics = {"svm/low_shot/1": 9.0, "svm/low_shot/16": 20.0, "svm/low_shot_std/1": 0.5, "svm/low_shot_std/16": 0.2}
    shots, classes = detail_tables({**metrics, "svm/AP/cat": 50.0, "svm/chosen_C/cat": 0.015625})
    assert [line.split() for line in shots.splitlines()][2:] == [["1", "9.0", "0.5"], ["16", "20.0", "0.2"]]
    assert shots.startswith("images per class ")
    assert [line.split() for line in classes.splitlines()][2:] == [["cat", "50.0", "0.01562"]]
