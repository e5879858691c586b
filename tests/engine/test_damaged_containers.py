"""Containers that are damaged, hostile, or not what they seem."""

from __future__ import annotations

import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixmask.engine.data import open_split
from mixmask.engine.data.shards import INDEX, read_index
from mixmask.engine.errors import ConfigError, DataError, UserError
from mixmask.engine.packing import index_shards
from tests.engine.containers import packed, recipe, table, zipped


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
    for name in ("compressed", "truncated", "empty", "half"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "a.tar", "w:gz" if name == "compressed" else "w") as tar:
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


def test_an_index_with_numbers_that_numpy_lacks(shapes: Path, tmp_path: Path) -> None:
    out = packed(shapes, tmp_path / "shards")
    file = out / "train" / INDEX
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
    save_file({**tensors, "labels": tensors["labels"].bfloat16()}, file, metadata)
    with pytest.raises(DataError, match="truncated or damaged"):
        open_split(recipe(out), "train")
