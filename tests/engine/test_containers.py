"""Images in zip files, shards, tables and lists are those of the folders they were made of."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mixmask.engine.array_images import ArrayImages
from mixmask.engine.crops import CropRecipe
from mixmask.engine.data import open_split
from mixmask.engine.datasets import require_same_classes
from mixmask.engine.errors import DataError, UserError
from mixmask.engine.joined import JoinedImages
from mixmask.engine.loader import BatchPlan, StreamSource
from mixmask.engine.packing import index_shards
from mixmask.engine.preflight import check_data, find_splits
from tests.engine.containers import CONTAINERS, SPLITS, listed, recipe, table, webdataset


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_holds_what_the_folders_hold(made: dict[str, Path], shapes: Path, name: str) -> None:
    for part in SPLITS.values():
        ours, theirs = open_split(recipe(shapes), part), open_split(recipe(made[name]), part)
        assert theirs.summary() == ours.summary()  # so runs resume on another container
        assert theirs.classes == ours.classes
        assert torch.equal(theirs.labels, ours.labels)
        assert [path.name for path in theirs.paths] == [path.name for path in ours.paths]
        assert all(torch.equal(theirs.read(i), ours.read(i)) for i in range(len(ours)))
        assert theirs.size(3) == (32, 32)
        assert theirs.array() is None
        theirs.check()
        assert len([*theirs.states()]) == len(theirs)
        chosen = theirs.subset([7, 3])
        assert torch.equal(chosen.read(0), ours.read(7))
        assert chosen.paths == (theirs.paths[7], theirs.paths[3])
    assert find_splits(made[name]) == ["train", "val"]
    reports, problems, _ = check_data(made[name], ["train", "val"], quick=False)
    assert [len(report.images) for report in reports] == [120, 40]
    assert not problems
    with pytest.raises(DataError, match=r"data\.holdout is not needed"):
        open_split(recipe(made[name], holdout=0.2), "train")


@pytest.mark.parametrize("name", CONTAINERS)
def test_without_labels_all_images_are_read(made: dict[str, Path], shapes: Path, name: str) -> None:
    images = open_split(recipe(made[name], labels=False), "train")
    assert images.classes == ()
    assert len(images) == 120
    assert not images.labels.any()
    if name not in ("parquet", "arrow"):  # whose rows do not know their folders
        assert images.summary() == open_split(recipe(shapes, labels=False), "train").summary()


@pytest.mark.parametrize("name", ["zip", "shards", "parquet", "arrow"])
def test_worker_processes_and_threads_read_the_same(made: dict[str, Path], shapes: Path, name: str) -> None:
    plan = BatchPlan(120, 16, drop_last=True, seed=0)

    def views(root: Path, workers: int) -> list[torch.Tensor]:
        source = StreamSource(open_split(recipe(root), "train"), workers, torch.device("cpu"))
        return [batch.views[0] for batch in source.training(plan, [CropRecipe(crop=32)], 0, 7)]

    ours = views(shapes, 0)
    for workers in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(ours, views(made[name], workers), strict=True))
    images = open_split(recipe(made[name]), "train")
    images.check()  # with several threads


def test_lists_name_paths_and_classes(shapes: Path, tmp_path: Path) -> None:
    root = listed(shapes, tmp_path / "lists")
    ours = open_split(recipe(shapes), "train")
    theirs = open_split(recipe(root, train="train.txt", test="val.txt"), "train")
    assert theirs.summary() == ours.summary()
    assert len(open_split(recipe(root, train="train.txt", test="val.txt"), "test")) == 40
    assert open_split(recipe(root / "train.txt", holdout=0.25), "test").classes == ours.classes
    with pytest.raises(DataError, match=r"one list, and no split to test on"):
        open_split(recipe(root / "train.txt"), "test")
    numbered = shapes / "numbered.txt"
    numbered.write_text(
        "\n".join(
            f"{path.relative_to(shapes)} {label}" for path, label in zip(ours.paths, ours.labels.tolist(), strict=True)
        )
    )
    plain = shapes / "plain.txt"
    plain.write_text("\n".join(str(path.relative_to(shapes)) for path in reversed(ours.paths)))
    try:
        caffe = open_split(recipe(numbered), "train")
        assert caffe.classes == tuple("0123456789")
        assert torch.equal(caffe.labels, ours.labels)
        bare = open_split(recipe(plain), "train")
        assert bare.classes == ()
        assert bare.paths == tuple(reversed(ours.paths))  # in the list's order
    finally:
        numbered.unlink()
        plain.unlink()


def test_webdatasets_shards_get_an_index(shapes: Path, tmp_path: Path) -> None:
    ours = open_split(recipe(shapes), "train")
    root = webdataset(shapes, tmp_path / "wds")
    theirs = open_split(recipe(root), "train")
    assert theirs.classes == tuple("0123456789")
    assert torch.equal(theirs.labels, ours.labels)
    assert all(torch.equal(theirs.read(i), ours.read(i)) for i in range(0, 120, 7))
    assert len({*theirs.paths}) == 120  # both shards number from 0
    with pytest.raises(UserError, match="has an index already"):
        index_shards(root / "train")


def test_shards_of_class_folders_get_an_index(shapes: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(shapes / "train", arcname=".")
    assert index_shards(tmp_path).num_images == 120
    theirs, ours = open_split(recipe(tmp_path), "train"), open_split(recipe(shapes), "train")
    assert theirs.classes == ours.classes
    assert torch.bincount(theirs.labels).tolist() == [12] * 10


def test_several_roots_are_joined(shapes: Path, made: dict[str, Path], tmp_path: Path) -> None:
    for half, classes in (("a", slice(0, 6)), ("b", slice(4, 10))):  # two classes stand in both
        for name in sorted(os.listdir(shapes / "train"))[classes]:
            shutil.copytree(shapes / "train" / name, tmp_path / half / "train" / name)
    shutil.copytree(shapes / "val", tmp_path / "b" / "val")
    ours = open_split(recipe(shapes), "train")
    joined = open_split(recipe([tmp_path / "a", tmp_path / "b"]), "train")
    assert isinstance(joined, JoinedImages)
    assert len(joined) == 144
    assert joined.classes == ours.classes
    assert [joined.classes[label] for label in joined.labels.tolist()] == [path.parent.name for path in joined.paths]
    assert torch.equal(joined.read(100), open_split(recipe(tmp_path / "b"), "train").read(28))
    assert len(open_split(recipe([tmp_path / "a", tmp_path / "b"]), "test")) == 40  # only one root has test images
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "a", moved)
    again = open_split(recipe([moved, tmp_path / "b"]), "train")
    assert again.summary() == joined.summary()  # wherever the roots lie
    assert joined.subset([0, 1]).summary() != joined.subset([0, 2]).summary()
    both = open_split(recipe([shapes, made["zip"]]), "train")
    assert len(both) == 240
    assert torch.equal(both.read(125), both.read(5))
    with pytest.raises(DataError, match=r"stands in several of the folders that data\.root joins"):
        open_split(recipe([shapes, shapes]), "train")
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(ours.paths[0], flat)
    (flat / "list.txt").write_text(ours.paths[0].name)
    with pytest.raises(DataError, match=r"has no labels, and .*; data\.labels=false reads all without labels"):
        open_split(recipe([shapes, flat / "list.txt"]), "train")
    assert len(open_split(recipe([shapes, flat], labels=False), "train")) == 121


def test_nested_folders_without_classes(shapes: Path, tmp_path: Path) -> None:
    ours = open_split(recipe(shapes), "train").paths
    for number, path in enumerate(ours[:20]):
        folder = tmp_path / ("" if number % 3 == 0 else "2021/04" if number % 3 == 1 else "2021/05/a")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{number}{path.suffix}")
    (tmp_path / ".thumbnails").mkdir()
    shutil.copy(ours[0], tmp_path / ".thumbnails")
    shutil.copy(ours[0], tmp_path / "._0.jpg")
    images = open_split(recipe(tmp_path, labels=False), "train")
    assert len(images) == 20
    with pytest.raises(DataError, match=r"data\.labels=false \(--no-labels\) reads all images"):
        open_split(recipe(tmp_path), "train")
    with pytest.raises(ValueError, match="holdout keeps a share of every class"):
        recipe(tmp_path, labels=False, holdout=0.1)


def test_other_files_beside_class_folders_change_nothing(shapes: Path, made: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    ours = open_split(recipe(root), "train")
    shutil.copy(made["parquet"] / "data" / "train-00000-of-00002.parquet", root / "train.parquet")
    shutil.copy(made["parquet"] / "data" / "train-00000-of-00002.parquet", root / "train" / "metadata.parquet")
    shutil.copy(made["zip"], root / "train.zip")
    (root / "train.txt").write_text("what they are for")
    (root / "backup.tar").write_bytes(b"")
    for folder in (root / "train").iterdir():
        if folder.is_dir():
            np.save(folder / "features.npy", np.zeros((4, 4, 3), dtype=np.uint8))
    theirs = open_split(recipe(root), "train")
    assert theirs.summary() == ours.summary()
    assert theirs.paths == ours.paths
    assert len(open_split(recipe(root, labels=False), "train")) == 120
    (tmp_path / "arrays" / "train" / "a").mkdir(parents=True)
    np.save(tmp_path / "arrays" / "train" / "a" / "0.npy", np.zeros((4, 4, 3), dtype=np.uint8))
    assert len(open_split(recipe(tmp_path / "arrays"), "train")) == 1  # where there is nothing else, they are images


@pytest.mark.parametrize("split", ["/nowhere/train", "", "a**", "a/b", "[", ".."])
def test_strange_names_of_splits_are_answered(made: dict[str, Path], shapes: Path, split: str) -> None:
    for root in (shapes, *made.values()):
        try:
            open_split(recipe(root, train=split, labels=False), "train")
        except UserError:
            continue


def test_a_link_to_a_folder_above_is_followed_once(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(shapes / "val", root)
    (root / "self").symlink_to(root)
    (root / "striped-star" / "again").symlink_to(root / "plain-star")
    assert len(open_split(recipe(root, labels=False), "train")) == 40


def test_classes_that_are_numbers_are_the_same_in_every_list(shapes: Path, tmp_path: Path) -> None:
    paths = open_split(recipe(shapes), "train").paths
    lists = {"a": range(3), "b": range(3, 15)}
    for name, numbers in lists.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{paths[n]} {n if name == 'a' else n - 3}" for n in numbers))
    joined = open_split(recipe([tmp_path / "a.txt", tmp_path / "b.txt"]), "train")
    assert joined.classes == tuple(sorted(map(str, range(12))))
    assert [joined.classes[label] for label in joined.labels.tolist()] == ["0", "1", "2", *map(str, range(12))]


def test_rows_with_the_same_names_stay_apart(shapes: Path, tmp_path: Path) -> None:
    images = open_split(recipe(shapes), "train").subset(range(0, 120, 6))
    picture = [path.read_bytes() for path in images.paths]
    rows = {"image": [{"bytes": one, "path": "0.jpg"} for one in picture], "label": [n // 4 for n in range(20)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    both = [open_split(recipe(tmp_path / "a.parquet", holdout=0.25), part) for part in ("train", "test")]
    require_same_classes(*both)
    assert [len(one) for one in both] == [15, 5]
    assert len({*both[0].paths, *both[1].paths}) == 20


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "bool"])
def test_labels_of_other_types(kind: str, shapes: Path, tmp_path: Path) -> None:
    images = open_split(recipe(shapes), "train").subset([0, 50, 100])
    labels = {
        "large_string": pa.array(["x", "y", "x"], pa.large_string()),
        "dictionary": pa.array(["x", "y", "x"]).dictionary_encode(),
        "bool": pa.array([False, True, False]),
    }[kind]
    rows = pa.table({"image": [path.read_bytes() for path in images.paths], "label": labels})
    pq.write_table(rows, tmp_path / "a.parquet")
    found = open_split(recipe(tmp_path / "a.parquet"), "train")
    assert found.labels.tolist() == [0, 1, 0]
    pq.write_table(rows.set_column(1, "label", pa.array([0.5, 1.0, 2.0])), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"its column 'label' is of double, which is no class; data\.label_column"):
        open_split(recipe(tmp_path / "a.parquet"), "train")


def test_an_arrow_file_is_read_like_a_stream(shapes: Path, tmp_path: Path) -> None:
    ours = open_split(recipe(shapes), "train")
    rows = table(ours)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=50)
    theirs = open_split(recipe(tmp_path / "a.arrow"), "train")
    assert theirs.summary() == ours.summary()
    assert torch.equal(theirs.read(77), ours.read(77))


def test_zip_files_are_listed_like_folders(shapes: Path, tmp_path: Path) -> None:
    picture = open_split(recipe(shapes), "train").paths[0].read_bytes()

    def made_of(*names: str) -> Path:
        file = tmp_path / "a.zip"
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, picture)
        return file

    assert open_split(recipe(made_of("./a/0.jpg", "./b/0.jpg")), "train").classes == ("a", "b")
    assert open_split(recipe(made_of("one/0.jpg", "one/1.jpg")), "train").classes == ("one",)  # its only class
    with pytest.raises(DataError, match="class folder without images, which lie further down"):
        open_split(recipe(made_of("train/a/0.jpg", "train/b/deep/0.jpg")), "train")
    with pytest.raises(DataError, match="own layout, which is read from folders only"):
        open_split(recipe(made_of("t/train/a/images/0.jpg", "t/val/val_annotations.txt")), "train")
    with pytest.warns(UserWarning, match="Duplicate name"):
        file = made_of("a/0.jpg", "a/0.jpg")
    with pytest.raises(DataError, match=r"a/0\.jpg is in it more than once"):
        open_split(recipe(file), "train")
    (tmp_path / "split").mkdir()
    shutil.copy(made_of("imagenet/a/0.jpg", "imagenet/b/0.jpg"), tmp_path / "split" / "train.zip")
    assert open_split(recipe(tmp_path / "split"), "train").classes == ("a", "b")


@pytest.mark.parametrize("key", ["image_column", "label_column"])
def test_a_column_of_folders_is_refused(key: str, shapes: Path) -> None:
    with pytest.raises(
        DataError, match=rf"has no columns \(data\.layout: folder\), so data\.{key}=image names nothing"
    ):
        open_split(recipe(shapes, **{key: "image"}), "train")


def test_a_column_may_belong_to_one_of_several_roots(made: dict[str, Path], shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for file in (made["parquet"] / "data").glob("train-*"):
        shutil.copy(file, tmp_path / "data")
    both = recipe([tmp_path, shapes], image_column="image", label_column="label")
    assert len(open_split(both, "train")) == 240
    assert len(open_split(both, "test")) == len(open_split(recipe(shapes), "test"))


def test_targets_of_any_type_are_taken(shapes: Path) -> None:
    images = open_split(recipe(shapes), "train")
    expected = images.targets
    frozen = expected.astype(">u2")[::-1][::-1]
    frozen.flags.writeable = False
    first = int(expected[0])
    for targets in (expected.tolist(), images.labels, expected.astype(np.uint8), frozen):
        again = replace(images, targets=targets, validation=[index % 5 == 0 for index in range(len(images))])
        assert again.labels.dtype == torch.int64
        assert np.array_equal(again.targets, expected)
        again.labels[0] = 7  # shares the memory of the targets, which may be written to
        assert again.targets[0] == 7
        assert again.validation is not None
        assert again.validation.dtype == np.bool_
        again.labels[0] = first
    several = replace(images, targets=np.eye(len(images), 3, dtype=np.int64))
    assert several.labels.dtype == torch.int8
    assert hash(images) != hash(several)  # image sets can be keys


def test_targets_and_pixels_of_a_wrong_type_are_refused(shapes: Path) -> None:
    images = open_split(recipe(shapes), "train")
    for targets in (images.targets / 2, np.array(images.classes)[images.targets], images.targets[:, None, None]):
        with pytest.raises(DataError, match=r"its labels are an array .*; valid: \(N,\) whole numbers"):
            replace(images, targets=targets)
    for pixels in (np.zeros((2, 3, 8, 8), np.float32), np.zeros((2, 8, 8), np.uint8)):
        with pytest.raises(DataError, match=r"its pixels are an array .*; valid: \(N, C, H, W\) uint8"):
            ArrayImages(images.paths[:2], images.targets[:2], images.classes, shapes, pixels)
