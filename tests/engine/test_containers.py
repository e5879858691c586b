"""Images in zip files, shards, tables and lists are those of the folders they were made of."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mixmask.engine.crops import CropRecipe
from mixmask.engine.data import open_split
from mixmask.engine.data.shards import INDEX, read_index
from mixmask.engine.datasets import require_same_classes
from mixmask.engine.errors import ConfigError, DataError, RunFailure, UserError
from mixmask.engine.images import ArrayImages
from mixmask.engine.joined import JoinedImages
from mixmask.engine.loader import BatchPlan, StreamSource
from mixmask.engine.packing import index_shards, pack
from mixmask.engine.preflight import check_data, find_splits
from tests.engine.containers import CONTAINERS, SPLITS, listed, packed, recipe, table, webdataset, zipped


@pytest.fixture(scope="module")
def made(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("containers")
    return {name: make(shapes, out / name) for name, make in CONTAINERS.items()}


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


# --- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/\x00\n", exclude_categories=["Cs"]), min_size=1),
        min_size=1,
        max_size=12,
        unique_by=lambda name: name.casefold(),
    ),
    size=st.integers(1, 9000),
    labels=st.booleans(),
)
def test_whatever_is_packed_comes_back(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], size: int, labels: bool
) -> None:
    root = tmp_path_factory.mktemp("any")
    kept = 0
    for number, name in enumerate(names):
        file = root / "train" / f"class {number % 3}" / f"{name[:40]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (3 + number, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        kept += not name.startswith(".")
    if not kept:
        return
    try:
        ours = open_split(recipe(root, labels=labels), "train")
    except DataError:
        return  # a class of hidden files only
    pack(ours, root / "out", size)
    theirs = open_split(recipe(root / "out", labels=labels), "train")
    assert theirs.summary() == ours.summary()
    assert theirs.classes == ours.classes
    assert all(torch.equal(theirs.read(i), ours.read(i)) for i in range(len(ours)))
    for shard in json.loads(json.dumps([path.name for path in (root / "out").glob("*.tar")])):
        with tarfile.open(root / "out" / shard) as tar:  # any tool reads them
            assert all(member.isreg() for member in tar)


def test_shards_of_the_same_images_are_the_same_bytes(shapes: Path, tmp_path: Path) -> None:
    first, second = packed(shapes, tmp_path / "a"), packed(shapes, tmp_path / "b")
    for path in sorted((first / "train").iterdir()):
        assert path.read_bytes() == (second / "train" / path.name).read_bytes()
    assert len([*(first / "train").glob("*.tar")]) > 3


def test_images_in_memory_are_packed_as_png(shapes: Path, tmp_path: Path) -> None:
    folder = open_split(recipe(shapes), "train")
    pixels = torch.stack([folder.read(i) for i in range(len(folder))])
    array = ArrayImages(folder.paths, folder.labels, folder.classes, folder.root, pixels=pixels)
    pack(array, tmp_path / "out", 10**6)
    theirs = open_split(recipe(tmp_path / "out"), "train")
    assert theirs.summary() == array.summary()
    assert all(torch.equal(theirs.read(i), array.read(i)) for i in range(0, 120, 11))


def test_a_broken_off_packing_is_not_taken_for_a_whole_one(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = open_split(recipe(shapes), "train"), tmp_path / "out"
    left = [3]

    def failing(source: Path, target: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(RunFailure, match=r"No space left on device\)"):
        pack(images, out, 40_000)
    monkeypatch.undo()
    assert not [*tmp_path.iterdir()]  # nothing half-written is left
    left_behind = tmp_path / ".out.packing"  # of a process that was killed
    left_behind.mkdir()
    (left_behind / "000000.tar").write_bytes(b"half")
    pack(images, out, 40_000)
    assert open_split(recipe(out), "train").summary() == images.summary()
    assert not left_behind.exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack(images, out, 40_000).before  # the same images: nothing is done
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="holds other packed images"):
        pack(images.subset(range(50)), out, 40_000)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.tar").write_bytes(b"somebody's own shard")
    with pytest.raises(UserError, match=r"is not empty \(000000\.tar\)"):
        pack(images, tmp_path / "mine", 40_000)
    assert (tmp_path / "mine" / "000000.tar").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"is not empty \(letter\.txt\)"):
        pack(images, tmp_path / "full", 40_000)
    assert (tmp_path / "full" / "letter.txt").exists()


def test_damaged_images_are_not_packed_unless_they_are_left_out(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    images = open_split(recipe(root), "train")
    for index in (5, 70):
        images.paths[index].write_bytes(images.paths[index].read_bytes()[:-300])
    with pytest.raises(DataError, match="2 of 120 images cannot be read, so nothing was packed; --skip-unreadable"):
        pack(images, tmp_path / "out", 10**6)
    assert not [path for path in tmp_path.iterdir() if path.name != "data"]
    done = pack(images, tmp_path / "out", 10**6, skip_unreadable=True)
    assert (done.num_images, len(done.left_out)) == (118, 2)
    assert images.paths[70].name in done.left_out[1]
    theirs = open_split(recipe(tmp_path / "out"), "train")
    without = images.subset([i for i in range(120) if i not in (5, 70)])
    assert theirs.summary() == without.summary()


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zip", "deflated below a folder", "shards"])
def test_a_changed_byte_is_found(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Of any byte: an image is read as it was, or refused."""
    root = tmp_path / made[name].name
    shutil.copytree(made[name], root) if made[name].is_dir() else shutil.copy(made[name], root)
    ours = open_split(recipe(made[name]), "train")
    right = [ours.read(i) for i in range(len(ours))]
    file = root if root.is_file() else root / "train" / "000001.tar"
    whole = file.read_bytes()
    rng, found = random.Random(0), 0
    for _ in range(40):
        place = rng.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            theirs = open_split(recipe(root), "train")
            for index in range(len(theirs)):
                same = torch.equal(theirs.read(index), right[index])
                assert (
                    same
                    or len(theirs) != len(ours)
                    or theirs.paths != tuple(root / p.relative_to(made[name]) for p in ours.paths)
                )
        except DataError:
            found += 1
    assert found > 10  # the others changed padding, or names


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_shard_names_itself_and_its_first_lost_image(shapes: Path, tmp_path: Path, share: float) -> None:
    root = packed(shapes, tmp_path / "packed")
    file = root / "train" / "000002.tar"
    images = read_index(root / "train")
    size = file.stat().st_size
    with file.open("rb+") as opened:
        opened.truncate(int(size * share))
    inside = [i for i, member in enumerate(images.members.tolist()) if member[0] == 2]
    lost = next((i for i in inside if int(images.members[i, 1:3].sum()) > int(size * share)), None)
    with pytest.raises(DataError) as caught:
        open_split(recipe(root), "train")
    assert f"{file}: truncated; it has {int(size * share):,} bytes" in str(caught.value)
    if lost is not None:
        assert str(images.paths[lost].relative_to(root / "train")) in str(caught.value)
    file.unlink()
    with pytest.raises(DataError, match=r"000002\.tar: No such file or directory"):
        open_split(recipe(root), "train")


def test_damaged_indices_are_refused(shapes: Path, tmp_path: Path) -> None:
    root = packed(shapes, tmp_path / "packed")
    file = root / "train" / INDEX
    whole = file.read_bytes()
    rng = random.Random(1)
    for _ in range(60):
        place = rng.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :])
        try:
            images = open_split(recipe(root), "train")
            for index in range(0, len(images), 17):
                images.read(index)  # what a changed offset points to has another checksum
        except DataError:
            continue
    for size in (0, 7, 8, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated or damaged"):
            open_split(recipe(root), "train")


def test_tar_files_that_cannot_be_indexed(shapes: Path, tmp_path: Path) -> None:
    image = open_split(recipe(shapes), "train").paths[0]
    cases = {"compressed": "w:gz", "truncated": "w", "empty": "w", "half": "w"}
    for name, mode in cases.items():
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "a.tar", mode) as tar:  # type: ignore[call-overload]
            if name != "empty":
                tar.add(image, arcname="0.jpg")
                tar.add(image, arcname="1.jpg")
            if name == "half":
                (tmp_path / "0.cls").write_text("3")
                tar.add(tmp_path / "0.cls", arcname="0.cls")
    file = tmp_path / "truncated" / "a.tar"
    file.write_bytes(file.read_bytes()[: 512 + 700])
    for name, said in {
        "compressed": r"a\.tar: compressed, so single images cannot be read",
        "truncated": r"a\.tar: truncated",
        "empty": r"no images in its 1 \.tar files",
        "half": r"1\.jpg has no \.cls file beside it, and other images have one",
        "absent": r"no \.tar files to index",
    }.items():
        with pytest.raises(UserError, match=said):
            index_shards(tmp_path / name)


def test_zip_bombs_and_strange_zip_files_are_refused(shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.zip"

    def refused(said: str, **keys: object) -> None:
        with pytest.raises(DataError, match=said):
            open_split(recipe(file, **keys), "train").read(0)

    file.write_bytes(b"PK\x03\x04" + bytes(300))
    refused(r"truncated or not a \.zip file")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a/0.png", bytes(300 << 20))
    refused(r"train/a/0\.png claims to unpack to 314,572,800 bytes; .* \(a zip bomb\?\)")
    # A header that claims less than what comes out: decompression stops one byte after the claim.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a/0.png", bytes(50 << 20))
    content = file.read_bytes()
    real, claim = (50 << 20).to_bytes(4, "little"), (5000).to_bytes(4, "little")
    assert content.count(real) == 2
    file.write_bytes(content.replace(real, claim))
    refused("CRC-32")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("train/a/0.png", b"x" * 100)
    refused(r"compressed by method 14; stored \(0\) and deflated \(8\) files can be read")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", b"nothing")
    refused("no images in it")
    zipped(shapes, file)
    with pytest.raises(DataError, match=r"no folder dev/ in it \(data\.test\); folders there: train, val"):
        open_split(recipe(file, test="dev"), "test")
    # Two names for the same bytes: how a small archive unpacks to a huge one.
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(50):
            archive.writestr(f"train/a/{number}.png", bytes(2000))
        for info in archive.infolist():
            info.header_offset = 0
    with zipfile.ZipFile(file, "a") as archive:
        archive.filelist += [archive.filelist[0]] * 100
        archive._didModify = True  # type: ignore[attr-defined]
    with zipfile.ZipFile(file) as archive:
        many = {info.filename for info in archive.infolist()}
    assert len(many) == 50


def test_overlapping_members_are_a_bomb(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train/a/0.png", bytes(4000))
        first = archive.infolist()[0]
        for number in range(1, 20):
            again = zipfile.ZipInfo(f"train/a/{number}.png")
            for name in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(again, name, getattr(first, name))
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    with pytest.raises(DataError, match="claim more bytes than the file has, so they overlap: a zip bomb"):
        open_split(recipe(file), "train")


def test_lists_that_are_wrong(shapes: Path, tmp_path: Path) -> None:
    image = open_split(recipe(shapes), "train").paths[0]
    file = tmp_path / "list.txt"
    for text, said in (
        ("", "empty; one path to a line was expected"),
        (f"{image}\n{image}\n", "1 paths stand there more than once"),
        (f"{image}\n{image.parent}/../{image.parent.name}/{image.name}\n", "more than once"),
        (f"{image}\na.jpg\nb.jpg\n", r"2 of its 3 files do not exist \(paths are relative to the list's folder\)"),
        (f"{image}\ta\n{image.with_suffix('.x')}\n", r"line 2 .*: 'path<TAB>class' was expected, as in other lines"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            open_split(recipe(file), "train")
    file.write_text("\n".join(f"{number}.jpg" for number in range(50)))
    with pytest.raises(DataError) as caught:
        open_split(recipe(file), "train")
    assert "50 of its 50 files do not exist" in str(caught.value)
    assert str(caught.value).count(".jpg") == 3  # the first ones


def test_tables_that_are_wrong(shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = table(open_split(recipe(shapes), "train").subset(range(8)))

    def refused(error: type[UserError], said: str, **keys: object) -> None:
        with pytest.raises(error, match=said):
            open_split(recipe(file, **keys), "train").read(0)

    pq.write_table(rows.select(["label"]), file)
    refused(DataError, r"no column of images \(bytes\); its columns are label \(int64\)")
    pq.write_table(rows.append_column("mask", rows["image"]), file)
    refused(DataError, r"several columns of images \(image, mask\); data\.image_column names one")
    assert len(open_split(recipe(file, image_column="mask"), "train")) == 8
    refused(ConfigError, r"data\.image_column: 'picture' is not a column of images", image_column="picture")
    refused(ConfigError, r"data\.label_column: 'size' is not a column", image_column="mask", label_column="size")
    assert open_split(recipe(file, image_column="mask", label_column="caption"), "train").classes == ("a picture",)
    pq.write_table(rows.drop_columns(["label", "caption"]), file)
    assert open_split(recipe(file), "train").classes == ()
    paths = pa.array([{"bytes": None, "path": "a.jpg"}] * 3)
    pq.write_table(pa.table({"image": paths}), file)
    refused(DataError, r"a\.jpg: holds no image, but a path or nothing")
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": [1, None]}), file)
    refused(DataError, "1 rows have no value in column 'label'")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), file)
    refused(DataError, "no rows")
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": [1, 10]}), file)
    assert open_split(recipe(file), "train").classes == ("1", "10")
    refused(DataError, "not a readable image")
    file.write_bytes(file.read_bytes()[:-20])
    refused(DataError, r"a\.parquet: truncated or not a table")


# --- what lies beside images -----------------------------------------------------------------------------------------


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


# --- shards of others ------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_to_a_tar_is_found_when_it_is_indexed(shapes: Path, tmp_path: Path) -> None:
    """tarfile itself takes a damaged header for the end of the file."""
    images = open_split(recipe(shapes), "train")
    source = tmp_path / "whole.tar.bak"
    with tarfile.open(source, "w") as tar:
        for number in range(6):
            tar.add(images.paths[number], arcname=f"{number}.jpg")
    with tarfile.open(source) as tar:
        starts = [member.offset for member in tar]
        end = tar.offset
    whole = source.read_bytes()
    damages = {
        "a byte of the fourth header": whole[: starts[3] + 150] + b"9" + whole[starts[3] + 151 :],
        "cut between two files": whole[: starts[3]],
        "cut inside of a header": whole[: starts[3] + 100],
        "a block of zeros": whole[: starts[3]] + bytes(512) + whole[starts[3] + 512 :],
        "cut inside of a file": whole[: starts[3] + 700],
        "no end": whole[:end],
    }
    for number, (name, content) in enumerate(damages.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.tar").write_bytes(content)
        with pytest.raises(DataError, match="truncated") as caught:
            index_shards(folder)
        assert "a.tar" in str(caught.value), name
        assert not (folder / INDEX).exists()


def test_what_an_index_could_not_tell_apart_is_refused(shapes: Path, tmp_path: Path) -> None:
    image = open_split(recipe(shapes), "train").paths[0]

    def indexed(*members: tuple[str, bytes | str]) -> str:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        folder.mkdir()
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                if isinstance(content, str):
                    member.type, member.linkname = tarfile.LNKTYPE, content
                    tar.addfile(member)
                else:
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        with pytest.raises(DataError) as caught:
            index_shards(folder)
        return str(caught.value)

    picture = image.read_bytes()
    assert "1.jpg is a link to 0.jpg" in indexed(("0.jpg", picture), ("1.jpg", "0.jpg"))
    assert "is in it more than once" in indexed(("0.jpg", picture), ("0.jpg", picture))
    both = indexed(("0.jpg", picture), ("0.seg.png", picture), ("0.cls", b"1"))
    assert "0.jpg and 0.seg.png are images of one sample" in both
    assert "has a line break" in indexed(("a\nb.jpg", picture))


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
