"""CIFAR archives made here, in the published format; their checksums stand in for the published ones."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from mixmask.engine.data import cifar, open_split
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.errors import DataError
from mixmask.engine.loader import BatchPlan, open_source
from mixmask.engine.preflight import check_data, find_splits
from tests.engine.test_loader import CPU, RECIPE

CLASSES = {"cifar-10-batches-py": ["truck", "cat", "dog"], "cifar-100-python": ["wolf", "apple", "bear", "whale"]}


def write(root: Path, kind: cifar.Kind, rng: np.random.Generator, per_file: int = 6) -> Path:
    """Write an unpacked archive as the authors' Python 2 did, and return its folder."""
    folder = root / kind.folder
    folder.mkdir(parents=True)
    classes = CLASSES[kind.folder]
    for split in (kind.train, kind.test):
        for name in split:
            batch = {
                "data": rng.integers(0, 256, (per_file, 3072), dtype=np.uint8),
                kind.labels: [int(value) for value in rng.integers(0, len(classes), per_file)],
                "filenames": [f"{name}_{i}.png" for i in range(per_file)],
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / kind.meta[0]).write_bytes(pickle.dumps({kind.meta[1]: classes}, protocol=2))
    return folder


def checked(kind: cifar.Kind, folder: Path, tarball: Path | None = None) -> cifar.Kind:
    """The kind, with the checksums of these files for the published ones."""

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    return replace(
        kind,
        train={name: md5(folder / name) for name in kind.train},
        test={name: md5(folder / name) for name in kind.test},
        meta=(kind.meta[0], kind.meta[1], md5(folder / kind.meta[0])),
        checksum=md5(tarball) if tarball is not None else kind.checksum,
    )


def pack(folder: Path, kind: cifar.Kind, into: Path) -> Path:
    tarball = into / kind.tarball
    with tarfile.open(tarball, "w:gz") as tar:
        tar.add(folder, arcname=kind.folder)
    return tarball


def recipe(root: Path) -> DataRecipe:
    return DataRecipe(name="cifar", root=str(root), train="train", test="test", storage="resident")


@pytest.mark.parametrize(("number", "theirs"), [(0, datasets.CIFAR10), (1, datasets.CIFAR100)])
def test_names_and_checksums_are_torchvisions(number: int, theirs: type[datasets.CIFAR10]) -> None:
    kind = cifar.KINDS[number]
    assert (kind.folder, kind.tarball, kind.checksum) == (theirs.base_folder, theirs.filename, theirs.tgz_md5)
    assert (kind.train, kind.test) == (dict(theirs.train_list), dict(theirs.test_list))
    assert kind.meta == (theirs.meta["filename"], theirs.meta["key"], theirs.meta["md5"])


@pytest.mark.parametrize("number", [0, 1])
def test_unpacked_and_packed_archives_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kind = cifar.KINDS[number]
    folder = write(tmp_path / "unpacked", kind, np.random.default_rng(0))
    (tmp_path / "packed").mkdir()
    tarball = pack(folder, kind, tmp_path / "packed")
    monkeypatch.setattr(cifar, "KINDS", (checked(kind, folder, tarball),))
    for split, files in (("train", kind.train), ("test", kind.test)):
        sets = [
            open_split(recipe(root), split) for root in (tmp_path / "unpacked", folder, tmp_path / "packed", tarball)
        ]
        raw = [pickle.loads((folder / name).read_bytes()) for name in files]
        for images in sets:
            assert len(images) == 6 * len(files)
            assert list(images.classes) == sorted(CLASSES[kind.folder])
            for index in range(len(images)):
                batch, row = raw[index // 6], index % 6
                assert images.classes[int(images.labels[index])] == CLASSES[kind.folder][batch[kind.labels][row]]
                pixels = torch.from_numpy(batch["data"][row].reshape(3, 32, 32))
                assert torch.equal(images.read(index), pixels)
                assert images.paths[index].name == batch["filenames"][row]
            assert images.summary() == sets[0].summary()
            images.check()


def test_batches_come_from_an_archive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = cifar.KINDS[1]
    folder = write(tmp_path, kind, np.random.default_rng(0), per_file=40)
    monkeypatch.setattr(cifar, "KINDS", (checked(kind, folder),))
    images = open_split(recipe(tmp_path), "train")
    part = images.subset([3, 1])
    assert torch.equal(part.read(0), images.read(3))
    plan = BatchPlan(40, 8, True, seed=0)
    for storage in ("resident", "stream"):
        data = DataRecipe(name="x", root=str(tmp_path), test="test", storage=storage, num_workers=0)
        batch = next(iter(open_source(images, data, CPU).training(plan, [RECIPE], 0, 1)))
        assert batch.labels.tolist() == images.labels[plan.indices(0)[0]].tolist()
    reports, problems, _ = check_data(tmp_path, find_splits(tmp_path), quick=False)
    assert [report.name for report in reports] == ["train", "test"]
    assert problems == []
    assert reports[0].sizes == {(32, 32): 40}
    assert "40 in 4 classes" in reports[0].describe()


def test_a_wrong_checksum_is_refused_before_anything_is_unpickled(tmp_path: Path) -> None:
    kind = cifar.KINDS[1]
    folder = write(tmp_path / "unpacked", kind, np.random.default_rng(0))
    with pytest.raises(
        DataError, match=r"cifar-100-python/train: its md5 is [0-9a-f]{32}, the published file's is 16019"
    ):
        open_split(recipe(tmp_path / "unpacked"), "train")
    (tmp_path / "packed").mkdir()
    tarball = pack(folder, kind, tmp_path / "packed")
    tarball.write_bytes(tarball.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz: its md5 .* download it again"):
        open_split(recipe(tmp_path / "packed"), "test")
    (folder / "test").unlink()
    with pytest.raises(DataError, match=r"test: missing from cifar-100-python; unpack cifar-100-python\.tar\.gz again"):
        open_split(recipe(tmp_path / "unpacked"), "test")


def test_two_archives_in_one_folder_are_not_guessed_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write(tmp_path, kind, np.random.default_rng(0)) for kind in cifar.KINDS]
    monkeypatch.setattr(cifar, "KINDS", tuple(checked(kind, folder) for kind, folder in zip(cifar.KINDS, folders)))
    with pytest.raises(DataError, match="name one of them as data"):
        open_split(recipe(tmp_path), "train")
    assert len(open_split(recipe(folders[1]), "train")) == 6
