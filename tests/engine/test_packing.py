"""``mixmask pack``, and the index of .tar files of others."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mixmask.engine.array_images import ArrayImages
from mixmask.engine.data import open_split
from mixmask.engine.data.shards import INDEX
from mixmask.engine.errors import DataError, RunFailure, UserError
from mixmask.engine.packing import index_shards, pack
from tests.engine.containers import packed, recipe


@pytest.mark.slow
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


@pytest.mark.parametrize("which", [1, 2])  # the index and the folder get their names
def test_a_broken_off_packing_is_not_taken_for_a_whole_one(
    which: int, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = open_split(recipe(shapes), "train"), tmp_path / "out"
    left = [which]

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
