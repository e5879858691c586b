from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixmask.engine.config import Recipe, operational
from mixmask.engine.errors import RunDirectoryError, UserError
from mixmask.engine.provenance import Code
from mixmask.engine.records import SCHEMA, Record
from mixmask.engine.storage import RunDirectory, last_lines, locate_run, require_output_file, write_atomic, write_text


class Small(Recipe):
    grid: int = 2
    place: str = operational("here")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text(target, "old")

    def full_disk(file) -> None:
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, full_disk)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_directory_refuses_another_recipe_and_says_what_differs(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create(Small(), "abc")
    before = run.recipe_file.read_text()
    run.create(Small(place="elsewhere"), "abc")
    with pytest.raises(RunDirectoryError, match="differs in grid: 2 -> 4"):
        run.create(Small(grid=4), "xyz")
    with pytest.raises(RunDirectoryError, match="on another backbone"):
        run.create(Small(), "xyz")
    assert run.recipe_file.read_text() == before


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / ".recipe.yaml.x1.tmp").write_text("half")
    run.create(Small(), "abc")
    assert [path.name for path in run.path.iterdir()] == ["recipe.yaml"]


def test_uncommitted_changes_are_kept_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmask.engine.storage.code", lambda: Code("abc+changes", b"diff"))
    run = RunDirectory(tmp_path / "run")
    run.create(Small(), "abc")
    assert run.patch_file.read_bytes() == b"diff"


def test_a_name_changes_no_place(tmp_path: Path) -> None:
    usual = locate_run(tmp_path, "pretrain", "mine", "0a1b")
    assert usual.path == tmp_path / "pretrain" / "mine-0a1b"
    (tmp_path / "pretrain" / "theirs-0a1b").mkdir(parents=True)
    assert locate_run(tmp_path, "pretrain", "mine", "0a1b").path.name == "theirs-0a1b"
    assert locate_run(tmp_path, "pretrain", "mine", "0a1b", tmp_path / "x").path == tmp_path / "x"
    usual.path.mkdir()
    assert locate_run(tmp_path, "pretrain", "mine", "0a1b").path == usual.path


def test_a_run_directory_refuses_foreign_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        RunDirectory(tmp_path).check(Small(), "abc")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory(tmp_path / "thesis.tex").check(Small(), "abc")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("grid: [")
    with pytest.raises(RunDirectoryError, match="damaged"):
        RunDirectory(tmp_path / "run").check(Small(), "abc")
    (tmp_path / "run" / "recipe.yaml").write_text("colour: red")
    with pytest.raises(RunDirectoryError, match="does not describe a run of this kind"):
        RunDirectory(tmp_path / "run").check(Small(), "abc")


def test_rewinding_drops_later_and_half_written_lines(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (10, 20, 30):
        run.log({"step": step})
    with run.log_file.open("a") as file:
        file.write('{"step": 1')
    run.rewind_log(20)
    assert [json.loads(line)["step"] for line in run.log_file.read_text().splitlines()] == [10, 20]


def test_output_paths_that_cannot_be_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        require_output_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file and not a folder"):
        require_output_file(tmp_path / "file" / "out.md")
    require_output_file(tmp_path / "new" / "out.md")


def test_records_round_trip_and_refuse_nan(tmp_path: Path) -> None:
    values = {
        "stage": "transfer",
        "protocol": "knn",
        "name": "x",
        "dataset": "cifar10",
        "framework": "moco",
        "method": "mixmask",
        "arch": "resnet18",
        "seed": 0,
        "fingerprint": "abc",
        "metrics": {"knn/top1": 50.0},
        "environment": {},
        "seconds": 1.0,
    }
    record = Record.model_validate(values)
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == record
    assert json.loads((tmp_path / "record.json").read_text())["schema"] == SCHEMA
    with pytest.raises(ValueError, match="not finite numbers: knn/top1"):
        Record.model_validate({**values, "metrics": {"knn/top1": float("nan")}})


def test_the_last_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "log"
    assert last_lines(file) == []
    file.write_bytes(b"one\ntwo\n\xff\xfethree")
    assert last_lines(file) == ["one", "two", "\ufffd\ufffdthree"]
    file.write_text("x\n" * 100_000)
    assert len(last_lines(file, 1000)) == 500
    assert last_lines(tmp_path) == []
