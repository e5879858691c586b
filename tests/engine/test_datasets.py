from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.datasets import DataRecipe, check_files, decode, open_split, require_same_classes
from engine.errors import DataError


def recipe(root: Path, **kwargs: str | None) -> DataRecipe:
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
