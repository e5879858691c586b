from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.preflight import check_data, find_splits
from mixmask.launch.commands.app import app


@pytest.fixture
def copy(shapes: Path, tmp_path: Path) -> Path:
    shutil.copytree(shapes, tmp_path / "data")
    return tmp_path / "data"


def test_a_whole_data_set_is_counted_and_measured(copy: Path) -> None:
    Image.new("RGB", (64, 40)).save(copy / "train" / "striped-star" / "wide.png")
    reports, problems, _ = check_data(copy, find_splits(copy), quick=False)
    assert problems == []
    train, val = reports
    assert (train.name, len(train.images), len(train.images.classes)) == ("train", 121, 10)
    assert train.sizes == {(32, 32): 120, (64, 40): 1}
    assert "121 in 10 classes, 12 to 13 per class" in train.describe()
    assert "widths 32 to 64, heights 32 to 40; 32 × 32 is the commonest (99 %)" in train.describe()
    assert len(val.images) == 40
    assert "  kind      folder\n" in train.describe()


def test_the_kind_of_data_can_be_named(copy: Path) -> None:
    done = CliRunner().invoke(app, ["check-data", str(copy), "--quick", "--layout", "folder"])
    assert done.exit_code == 0
    assert done.stdout.count("kind      folder") == 2
    with pytest.raises(ConfigError, match=r"--layout: there is no kind of data 'foldr'; valid: folder, "):
        find_splits(copy, "foldr")
    with pytest.raises(DataError):
        find_splits(copy, "tiny_imagenet")


@pytest.mark.parametrize("quick", [False, True])
def test_damaged_files_are_named(copy: Path, quick: bool) -> None:
    folder = copy / "train" / "striped-star"
    cut, other, *_ = sorted(folder.iterdir())
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / "text.jpg").write_text("not an image")
    reports, problems, _ = check_data(copy, ["train"], quick)
    assert len(problems) == len(reports[0].damaged) == 2
    assert any(str(cut) in problem for problem in problems)
    assert any("text.jpg" in problem for problem in problems)
    assert other.exists()


def test_damage_in_the_middle_is_found_by_decoding(copy: Path) -> None:
    victim = sorted((copy / "train" / "striped-star").iterdir())[0]
    content = bytearray(victim.read_bytes())
    table = content.index(b"\xff\xc4") + 5  # a Huffman table's code counts
    content[table : table + 16] = b"\xff" * 16
    victim.write_bytes(bytes(content))
    assert check_data(copy, ["train"], quick=True)[1] == []  # its ends and its size are in order
    (problem,) = check_data(copy, ["train"], quick=False)[1]
    assert str(victim) in problem


def test_classes_that_differ_between_splits_are_a_problem(copy: Path) -> None:
    shutil.rmtree(copy / "val" / "striped-star")
    _, problems, _ = check_data(copy, ["train", "val"], quick=True)
    assert len(problems) == 1
    assert "striped-star" in problems[0]


def test_a_folder_without_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such folder or archive"):
        find_splits(tmp_path / "absent")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="it holds photos"):
        find_splits(tmp_path)


def test_the_command(copy: Path) -> None:
    done = CliRunner().invoke(app, ["check-data", str(copy), "--quick"])
    assert done.exit_code == 0
    assert "120 in 10 classes" in done.output
    (copy / "val" / "plain-disk" / "x.png").write_text("")
    done = CliRunner().invoke(app, ["check-data", str(copy)])
    assert isinstance(done.exception, DataError)
    assert "damaged   1" in done.output
