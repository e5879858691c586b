"""CIFAR-10 and CIFAR-100 as their authors publish them: python archives, checked against the published checksums."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets as published
from typing_extensions import override

from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import ArrayImages


@dataclass(frozen=True)
class Kind:
    """File names, keys and checksums of CIFAR-10 or CIFAR-100.

    Attributes:
        folder: What the archive unpacks to.
        tarball: The archive's file name.
        checksum: md5 of the archive.
        train: md5 of each batch file of the training split, by name.
        test: The same for the test split.
        meta: File and key of the class names, and its md5.
        labels: Key of the labels.
    """

    folder: str
    tarball: str
    checksum: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    meta: tuple[str, str, str]
    labels: str


def _kind(source: Any, labels: str) -> Kind:
    meta = source.meta
    return Kind(
        folder=source.base_folder,
        tarball=source.filename,
        checksum=source.tgz_md5,
        train=dict(source.train_list),
        test=dict(source.test_list),
        meta=(meta["filename"], meta["key"], meta["md5"]),
        labels=labels,
    )


KINDS = (_kind(published.CIFAR10, "labels"), _kind(published.CIFAR100, "fine_labels"))


@dataclass(frozen=True)
class Archive:
    """An archive on disk, packed or unpacked."""

    kind: Kind
    path: Path

    def read(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor, list[str], list[str]]:
        """Read one split.

        Returns:
            (N, 3, 32, 32) uint8 pixels, (N,) int64 labels, N file names, and the class names in the archive's order.

        Raises:
            DataError: If a file is missing or its checksum is not the published one.
        """
        name, key, checksum = self.kind.meta
        files = self._contents({**getattr(self.kind, split), name: checksum})
        classes = [str(value) for value in _unpickled(files.pop(name))[key]]
        batches = [_unpickled(content) for content in files.values()]
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = [label for batch in batches for label in batch[self.kind.labels]]
        names = [file for batch in batches for file in batch["filenames"]]
        return torch.from_numpy(pixels), torch.tensor(labels, dtype=torch.int64), names, classes

    def _contents(self, wanted: Mapping[str, str]) -> dict[str, bytes]:
        """The bytes of the wanted files, verified against their published checksums."""
        files: dict[str, bytes] = {}
        if self.path.is_dir():
            for name in wanted:
                file = self.path / name
                if not file.is_file():
                    raise DataError(f"{file}: missing from {self.kind.folder}; unpack {self.kind.tarball} again")
                files[name] = file.read_bytes()
        else:
            content = self.path.read_bytes()
            _compare(self.path, content, self.kind.checksum)
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                for name in wanted:
                    member = tar.extractfile(f"{self.kind.folder}/{name}")
                    assert member is not None  # the checksum says that this is the published archive
                    files[name] = member.read()
        for name, checksum in wanted.items():
            _compare(self.path / name, files[name], checksum)
        return files


def find(root: Path) -> Archive | None:
    """The archive that ``root`` is or holds, packed or unpacked; None if there is none.

    Raises:
        DataError: If there are both CIFAR-10 and CIFAR-100.
    """
    found = [archive for kind in KINDS if (archive := _find(root, kind)) is not None]
    if len(found) > 1:
        raise DataError(
            f"{root}: holds {' and '.join(str(archive.path) for archive in found)}; name one of them as data.root"
        )
    return found[0] if found else None


def _find(root: Path, kind: Kind) -> Archive | None:
    for path in (root, root / kind.folder):
        if path.is_dir() and (path / kind.meta[0]).is_file() and any((path / name).exists() for name in kind.train):
            return Archive(kind, path)
    for path in (root, root / kind.tarball):
        if path.is_file() and path.name == kind.tarball:
            return Archive(kind, path)
    return None


class Cifar(DataKind):
    """The published archives, packed or unpacked, checked against the published checksums."""

    kind: ClassVar[str] = "cifar"

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return not (root / data.train).is_dir() and find(root) is not None

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> ArrayImages:
        archive = find(root)
        if archive is None:
            raise DataError(
                f"{root}: no CIFAR archive; valid: {', '.join(kind.tarball for kind in KINDS)}, or unpacked"
            )
        pixels, labels, names, classes = archive.read(part)
        # Number the classes alphabetically, as ImageFolder does, and not in the archive's order.
        order = sorted(range(len(classes)), key=classes.__getitem__)
        rank = torch.tensor(order).argsort()
        paths = tuple(archive.path / part / name for name in names)
        return ArrayImages(paths, rank[labels], tuple(classes[i] for i in order), archive.path / part, pixels)

    @override
    def splits(self, root: Path) -> list[str]:
        return ["train", "test"] if find(root) is not None else []

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        return f"{root}: a CIFAR archive has a test split of its own; leave data.holdout out"


def _compare(path: Path, content: bytes, published_checksum: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != published_checksum:
        raise DataError(
            f"{path}: its md5 is {found}, the published file's is {published_checksum}: truncated or changed, "
            f"so it was not read; download it again"
        )


def _unpickled(content: bytes) -> dict[str, Any]:
    """Unpickle a batch file. Unpickling can run code, so this is called only after the checksum has been verified."""
    # The archives were pickled by Python 2, whose byte strings need an encoding.
    batch: dict[str, Any] = pickle.loads(content, encoding="latin1")
    return batch
