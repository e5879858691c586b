"""Run folders that somebody else wrote: links, pipes, names that are not UTF-8, files that were there before."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mixmask.engine.errors import DataError
from mixmask.engine.predictions import CLASSES, ClassPredictions
from mixmask.engine.records import Record
from mixmask.engine.storage import last_lines
from mixmask.evaluate.card import write_card
from mixmask.evaluate.collect import as_text, collect, frame
from mixmask.evaluate.logs import read_log
from mixmask.evaluate.report import write_report
from mixmask.launch.commands.app import main
from tests.evaluate.made import backbone, laboratory, write


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write(laboratory()[:6], tmp_path / "runs")


def cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mixmask", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_link_that_leads_out_of_the_folder_is_not_followed(runs: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret\n")
    folder = next((runs / "pretrain").iterdir())
    for name in ("log.jsonl", "recipe.yaml"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        assert last_lines(folder / name) == []
    assert read_log(folder / "log.jsonl") == []
    page = write_report(collect(runs), tmp_path / "page").read_text()
    assert "the secret" not in page
    record = folder / "record.json"
    outside = tmp_path / "record.json"
    record.rename(outside)
    record.symlink_to(outside)
    (problem,) = [why for path, why in collect(runs).damaged if path == record]
    assert "a link that leads out of its folder" in problem


@pytest.mark.timeout(30)
def test_pipes_and_devices_are_not_read(runs: Path, tmp_path: Path) -> None:
    folder = next((runs / "pretrain").iterdir())
    for name in ("log.jsonl", "recipe.yaml", "detections.jpg", CLASSES):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert last_lines(folder / "log.jsonl") == []
    assert read_log(folder / "log.jsonl") == []
    with pytest.raises(DataError, match="no regular file"):
        ClassPredictions.read(folder / CLASSES)
    write_report(collect(runs), tmp_path / "page")
    other = sorted((runs / "pretrain").iterdir())[1] / "record.json"
    other.unlink()
    os.mkfifo(other)
    assert [path for path, _ in collect(runs).damaged] == [other]


def test_a_folder_whose_name_is_not_utf8(runs: Path, tmp_path: Path) -> None:
    folder = next((runs / "pretrain").iterdir())
    odd = os.fsencode(folder.parent) + b"/odd-\xff\x1b[31m"
    os.rename(os.fsencode(folder), odd)
    collection = collect(runs)
    text = as_text(frame(collection.runs), "csv")
    assert "odd-\\xdcff\\x1b[31m" in text
    text.encode()
    write_report(collection, tmp_path / "page").read_text(encoding="utf-8")
    write_card(Path(os.fsdecode(odd)), None, "mit").encode()


def test_damaged_files_are_listed(runs: Path, tmp_path: Path) -> None:
    folders = sorted((runs / "pretrain").iterdir())
    (folders[0] / "record.json").write_text("[" * 200_000)
    (path, why), *_ = collect(runs).damaged
    assert path == folders[0] / "record.json"
    assert "nested too deeply" in why
    good = tmp_path / "good.npz"
    np.savez_compressed(good, format=np.array("x"), a=np.zeros(1000))
    content = bytearray(good.read_bytes())
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 255
        (tmp_path / CLASSES).write_bytes(damaged)
        with pytest.raises(DataError):
            ClassPredictions.read(tmp_path / CLASSES)


@pytest.mark.slow
def test_only_what_is_our_own_is_replaced(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "site" / "index.html"
    page.parent.mkdir()
    page.write_text("<h1>mine</h1>")
    assert cli(monkeypatch, "report", runs, "--out", page.parent) == 2
    assert page.read_text() == "<h1>mine</h1>"
    assert cli(monkeypatch, "report", runs, "--out", page.parent, "--force") == 0
    assert cli(monkeypatch, "report", runs, "--out", page.parent) == 0  # its own
    assert cli(monkeypatch, "plots", runs, "--out", "plots") == 0
    assert cli(monkeypatch, "plots", runs, "--out", "plots") == 0
    drawn = sorted((tmp_path / "plots").iterdir())
    assert {path.suffix for path in drawn} == {".pdf", ".png", ".svg"}
    for path in drawn[:3]:
        path.write_text("mine")
        assert cli(monkeypatch, "plots", runs, "--out", "plots") == 2
        assert path.read_text() == "mine"
        path.unlink()
    record = next(runs.glob("pretrain/*/record.json"))
    before = record.read_bytes()
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    assert cli(monkeypatch, "results", runs, "--format", "csv", "--out", record) == 2
    assert cli(monkeypatch, "tables", runs, "--format", "md", "--out", readme) == 2
    assert cli(monkeypatch, "card", record.parent, "--out", readme) == 2
    assert (record.read_bytes(), readme.read_text()) == (before, "mine")
    assert cli(monkeypatch, "tables", runs, "--format", "md", "--out", readme, "--force") == 0
    assert readme.read_text() != "mine"


def test_an_unreadable_folder_is_listed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = next((runs / "pretrain").iterdir())
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert (closed, "cannot be read (Permission denied)") in collect(runs).damaged


def test_the_largest_record_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with path.open("wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(ValueError, match="at most"):
        Record.read(path)
    path.write_text(backbone().text())
    assert Record.read(path) == backbone()
