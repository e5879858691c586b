from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixmask.engine.config import fingerprint_of, identity
from mixmask.engine.damage import check_files
from mixmask.engine.data import open_split
from mixmask.engine.data.folder import is_only_split
from mixmask.engine.datasets import DataRecipe, require_same_classes
from mixmask.engine.decoding import decode
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages
from mixmask.engine.preflight import check_data, find_splits
from mixmask.engine.texts import read_text


def recipe(root: Path, **kwargs: object) -> DataRecipe:
    return DataRecipe.model_validate({"name": "x", "root": str(root), **kwargs})


@pytest.fixture
def mine(shapes: Path, tmp_path: Path) -> Path:
    shutil.copytree(shapes, tmp_path / "data")
    return tmp_path / "data"


def test_folders_become_classes(shapes: Path) -> None:
    images = open_split(recipe(shapes), "train")
    assert len(images) == 120
    assert len(images.classes) == 10
    assert images.classes == tuple(sorted(images.classes))
    assert torch.equal(torch.bincount(images.labels), torch.full((10,), 12))
    assert all(path.parent.name == images.classes[label] for path, label in zip(images.paths, images.labels.tolist()))
    require_same_classes(images, open_split(recipe(shapes), "test"))


def test_missing_folders(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        open_split(recipe(tmp_path / "absent"), "train")
    with pytest.raises(DataError, match=r"no such folder \(data\.test of 'x'\), .* Folders there: train, val"):
        open_split(recipe(shapes, test="test"), "test")
    with pytest.raises(DataError, match="has no test split"):
        open_split(recipe(shapes, test=None), "test")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no class folders"):
        open_split(recipe(tmp_path / "empty"), "train")


def test_the_same_folder_cannot_be_both_splits(shapes: Path) -> None:
    with pytest.raises(ValueError, match="train and test are the same folder"):
        recipe(shapes, train="train", test="train")


def test_a_class_folder_without_images_is_named(mine: Path) -> None:
    (mine / "train" / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: class folder without images"):
        open_split(recipe(mine), "train")


def test_different_classes_are_named(mine: Path) -> None:
    shutil.move(mine / "val" / "striped-star", mine / "val" / "other")
    with pytest.raises(DataError, match=r"only in the first \['striped-star'\], only in the second \['other'\]"):
        require_same_classes(open_split(recipe(mine), "train"), open_split(recipe(mine), "test"))


def test_truncated_and_foreign_files_are_all_named(mine: Path) -> None:
    images = open_split(recipe(mine), "train")
    first, second, third = images.paths[3], images.paths[50], images.paths[60]
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"")
    third.write_bytes(b"this is not an image")
    with pytest.raises(DataError) as caught:
        check_files(images.paths)
    message = str(caught.value)
    assert all(str(path) in message for path in (first, second, third))
    assert len(message.splitlines()) == 3


def test_whole_files_of_any_kind_pass(tmp_path: Path) -> None:
    for name, mode in (("a.png", "RGB"), ("b.jpg", "L"), ("c.jpg", "CMYK"), ("d.png", "P"), ("e.jpg", "RGB")):
        Image.new(mode, (9, 7)).save(tmp_path / name)
    Image.new("I;16", (9, 7), 40000).save(tmp_path / "f.png")
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "g.gif", save_all=True, append_images=frames[1:])
    trailing = tmp_path / "e.jpg"
    trailing.write_bytes(trailing.read_bytes() + b"\0\0")  # padding after the end marker, as some cameras write
    paths = sorted(tmp_path.iterdir())
    check_files(paths)
    assert all(decode(path).shape == (3, 7, 9) and decode(path).dtype == torch.uint8 for path in paths)
    assert decode(tmp_path / "f.png")[0, 0, 0] == 40000 >> 8


def test_tiny_imagenets_own_layout(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    source = open_split(recipe(shapes), "test")
    for wnid, name in (("n01", source.classes[0]), ("n02", source.classes[1])):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for path in (shapes / "train" / name).iterdir():
            shutil.copy(path, folder / f"{wnid}_{path.stem}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number, label in enumerate((1, 0, 1)):
        shutil.copy(source.paths[number], root / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\tn0{label + 1}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    train, test = open_split(recipe(root), "train"), open_split(recipe(root), "test")
    assert (len(train), train.classes) == (24, ("n01", "n02"))
    assert test.classes == train.classes
    assert test.labels.tolist() == [1, 0, 1]
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\t0\t0\t63\t63\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 1"):
        open_split(recipe(root), "test")


def test_summary_tells_two_sets_of_one_name_apart(mine: Path) -> None:
    before = open_split(recipe(mine), "train").summary()
    next((mine / "train" / "striped-star").iterdir()).unlink()
    after = open_split(recipe(mine), "train").summary()
    assert before["num_images"] == 120
    assert after["num_images"] == 119
    assert before["listing"] != after["listing"]


# --- one folder of class folders ---------------------------------------------------------------------------------------


def test_a_root_of_class_folders_is_its_only_split(shapes: Path) -> None:
    root = shapes / "train"
    assert is_only_split(root)
    assert not is_only_split(shapes)
    images = open_split(recipe(root), "train")
    assert len(images) == 120
    with pytest.raises(DataError, match=r"no split to test on: data\.holdout=0\.2"):
        open_split(recipe(root), "test")
    assert find_splits(root) == ["."]
    (report,), problems, _ = check_data(root, find_splits(root), quick=True)
    assert len(report.images) == 120
    assert not problems


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("holdout", [0.1, 0.25, 0.5])
def test_a_part_of_every_class_is_held_out(only: bool, holdout: float, shapes: Path) -> None:
    data = recipe(shapes / "train", holdout=holdout) if only else recipe(shapes, test=None, holdout=holdout)
    train, test = open_split(data, "train"), open_split(data, "test")
    every = open_split(recipe(shapes), "train").paths
    assert sorted(path.name for path in (*train.paths, *test.paths)) == sorted(path.name for path in every)
    assert not set(train.paths) & set(test.paths)
    counts = torch.bincount(test.labels, minlength=10)
    assert torch.equal(counts, torch.full((10,), max(1, round(12 * holdout))))
    require_same_classes(train, test)
    assert open_split(data, "test").paths == test.paths
    other = data.model_copy(update={"holdout_seed": 1})
    assert open_split(other, "test").paths != test.paths
    assert fingerprint_of(identity(data)) != fingerprint_of(identity(other))


def test_holding_out_what_cannot_be_is_refused(mine: Path) -> None:
    with pytest.raises(DataError, match=r"val: is there, so data\.holdout is not needed"):
        open_split(recipe(mine, holdout=0.2), "test")
    one = mine / "train" / "striped-star"
    for path in sorted(one.iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"class 'striped-star' has 1 images; .* none to train on"):
        open_split(recipe(mine, test=None, holdout=0.2), "train")


def test_new_fields_do_not_change_old_fingerprints(shapes: Path) -> None:
    assert not {"holdout", "holdout_seed", "allow_overlap"} & identity(recipe(shapes)).keys()


def test_one_folder_by_two_names_is_refused(mine: Path) -> None:
    (mine / "again").symlink_to(mine / "train")
    train, test = (open_split(recipe(mine, test="again"), split) for split in ("train", "test"))
    with pytest.raises(DataError, match=r"are the same folder: .* data\.allow_overlap=true"):
        require_same_classes(train, test)
    require_same_classes(train, test, allow_overlap=True)
    assert recipe(mine, test="train", allow_overlap=True).test == "train"


def test_images_without_labels_are_no_split(mine: Path) -> None:
    """Tiny-ImageNet's test folder holds a folder of images and nothing else."""
    (mine / "test" / "images").mkdir(parents=True)
    shutil.copy(next((mine / "train" / "striped-star").iterdir()), mine / "test" / "images")
    reports, problems, remarks = check_data(mine, find_splits(mine), quick=True)
    assert [report.name for report in reports] == ["train", "val"]
    assert not problems
    assert remarks == [f"test  {mine / 'test'}\n  images    without labels, not used"]


def test_lists_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"a\nb\xe4c\n")
    with pytest.raises(DataError, match=r"list\.txt, line 2: the byte 0xe4 is not valid UTF-8"):
        read_text(tmp_path / "list.txt")
    (tmp_path / "list.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"list\.gz: truncated or not a gzip file"):
        read_text(tmp_path / "list.gz")
    (tmp_path / "list.gz").write_bytes(gzip.compress(b"x" * 5000)[:-9])
    with pytest.raises(DataError, match=r"list\.gz: truncated or not a gzip file"):
        read_text(tmp_path / "list.gz")
    (tmp_path / "list.gz").write_bytes(gzip.compress(b"x" * 5000))
    with pytest.raises(DataError, match="unpacks to more than 100 bytes"):
        read_text(tmp_path / "list.gz", 100)
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("pipe", "no regular file"),
        (".", "is a folder"),
        ("x" * 300, "name too long"),
        ("no", "No such"),
    ):
        with pytest.raises(DataError, match=f"(?i){said}"):
            read_text(tmp_path / name)


def test_files_in_both_parts_are_refused_and_names_that_repeat_are_told_apart(shapes: Path) -> None:
    train = open_split(recipe(shapes), "train")
    assert isinstance(train, FileImages)
    again = FileImages(train.paths, train.labels, train.classes, train.root / "elsewhere")
    with pytest.raises(DataError, match=r"is both a training and a test image, as are 119 more"):
        require_same_classes(train, again)
    require_same_classes(train, again, allow_overlap=True)

    def frames(folder: str) -> FileImages:  # two videos in one class, with the same names of files
        paths = tuple(shapes / video / "0.png" for video in (folder, "b"))
        return FileImages(paths, torch.zeros(2, dtype=torch.int64), ("x",), shapes)

    assert frames("a").summary() != frames("c").summary()
