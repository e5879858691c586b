"""Segmentation data in their real layouts, and what is wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmask.engine.errors import DataError
from mixmask.transfer.segmentation.dataset import IGNORED
from mixmask.transfer.segmentation.kinds import open_segmentation
from tests.transfer.segmentation.small_sets import (
    data_of,
    make_cityscapes,
    make_folders,
    make_voc,
    save_image,
    save_labels,
)


def test_voc_with_sbd_as_they_lie_on_disk(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    train, test = open_segmentation(data_of(root, train=["2012/train_aug"], test=["2012/val"]))
    assert len(train) == 12  # VOC's six, and SBD's without them and without VOC's validation image
    assert [one.labels.suffix for one in train.images] == [".png"] * 6 + [".mat"] * 6
    assert not {one.image for one in train.images} & {one.image for one in test.images}
    assert len(train.classes) == 21
    train.check()
    first, last = (train.labels_of(train.images[place]) for place in (0, -1))
    assert set(np.unique(first)) <= {0, 1, 2, 15, 255}
    assert (first[0] == IGNORED).all()
    assert set(np.unique(last)) <= {0, 1, 2, 15}
    # The same as PNG files, as many copies of the data set have them.
    maps = root / "VOC2012" / "SegmentationClassAug"
    for one in train.images:
        save_labels(maps / f"{one.image.stem}.png", train.labels_of(one))
    again, _ = open_segmentation(data_of(root, train=["2012/train_aug"], test=["2012/val"]))
    assert [one.labels.suffix for one in again.images] == [".png"] * 12
    assert all(np.array_equal(train.labels_of(a), again.labels_of(b)) for a, b in zip(train.images, again.images))


def test_cityscapes_with_label_ids(tmp_path: Path) -> None:
    train, test = open_segmentation(data_of(make_cityscapes(tmp_path)))
    assert (len(train), len(test)) == (6, 3)
    assert train.classes[0] == "road"
    assert len(train.classes) == 19
    train.check()
    assert set(np.unique(train.labels_of(train.images[0]))) <= {0, 13, 18, IGNORED}  # road, car, bicycle, unlabelled


def test_folders_of_ones_own(tmp_path: Path) -> None:
    train, test = open_segmentation(data_of(make_folders(tmp_path)))
    assert (len(train), len(test)) == (8, 8)
    assert train.classes == ("ground", "red", "green", "blue")
    assert train.summary() != test.summary()


def trouble(tmp_path: Path, kind: str) -> dict[str, Any]:
    """Spoil something; the keys of the data recipe that are needed to find it."""
    root = tmp_path / "data"
    if kind.startswith("voc"):
        make_voc(root)
        keys: dict[str, Any] = {"train": ["2012/train_aug"], "test": ["2012/val"]}
        if kind == "voc_no_sbd":
            shutil.rmtree(root / "benchmark_RELEASE")
        elif kind == "voc_broken_mat":
            (root / "benchmark_RELEASE" / "dataset" / "cls" / "more_000.mat").write_bytes(b"no matrix")
        elif kind == "voc_no_split":
            keys["test"] = ["2012/vall"]
        elif kind == "voc_overlap":
            keys["train"] = ["2012/val"]
        return keys
    if kind.startswith("city"):
        make_cityscapes(root)
        path = root / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
        if kind == "city_missing":
            path.unlink()
        else:
            save_labels(path, np.full((60, 80), 77, dtype=np.uint8))
        return {}
    make_folders(root)
    path = root / "annotations" / "train" / "3.png"
    if kind == "size":
        save_labels(path, np.zeros((60, 81), dtype=np.uint8))
    elif kind == "label":
        save_labels(path, np.full((60, 80), 4, dtype=np.uint8))
    elif kind == "colour":
        save_image(path, np.zeros((60, 80, 3), dtype=np.uint8))
    elif kind == "damaged":
        path.write_bytes(path.read_bytes()[:40])
    elif kind == "classes":
        (root / "classes.txt").unlink()
    elif kind == "nothing":
        shutil.rmtree(root / "annotations")
    elif kind == "empty":
        shutil.rmtree(root / "images" / "val")
        (root / "images" / "val").mkdir()
    return {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("voc_no_sbd", "no SBD, which 2012/train_aug needs: neither VOC2012/SegmentationClassAug"),
        ("voc_broken_mat", "more_000.mat: not one of SBD's class maps"),
        ("voc_no_split", "no such image list .*Splits there: 2012/train, 2012/val, and 2012/train_aug"),
        ("voc_overlap", "is both a training and a test image, as are 5 more"),
        ("city_missing", "ulm_000000_000019_gtFine_labelIds.png: no such file"),
        ("city_unknown", "holds the unknown label id 77"),
        ("size", r"3.png: is 81×60 pixels, its image .*3.png is 80×60"),
        ("label", "holds the label 4; the 4 classes are 0 to 3, and 255 is ignored"),
        ("colour", "an image of mode RGB; a label map is a grey or palette image"),
        ("damaged", "3.png: not a readable label map"),
        ("classes", "classes.txt: no such file; it names the classes"),
        ("nothing", r"neither a VOCdevkit \(VOC2012\), nor Cityscapes .*; it holds classes.txt, images"),
        ("empty", "val: no images"),
    ],
)
def test_bad_data_are_refused_before_training(kind: str, message: str, tmp_path: Path) -> None:
    keys = trouble(tmp_path, kind)
    data = data_of(tmp_path / "data", **keys)
    with pytest.raises(DataError, match=message):
        [split.check() for split in open_segmentation(data)]
