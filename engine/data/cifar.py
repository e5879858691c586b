"""CIFAR-10 and CIFAR-100 as their authors publish them: python archives, checked against the published checksums.

The checksums are those in torchvision, which tests compare.
"""

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
import numpy.typing as npt
from typing_extensions import override

from mixmask.engine.array_images import ArrayImages
from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError


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


KINDS = (
    Kind(
        folder="cifar-10-batches-py",
        tarball="cifar-10-python.tar.gz",
        checksum="c58f30108f718f92721af3b95e74349a",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        meta=("batches.meta", "label_names", "5ff9c542aee3614f3951f8cda6e48888"),
        labels="labels",
    ),
    Kind(
        folder="cifar-100-python",
        tarball="cifar-100-python.tar.gz",
        checksum="eb9058c3a382ffc7106e4002c42a8d85",
        train={
            "train": "16019d7e3df5f24257cddd939b257f8d",
        },
        test={
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
        meta=("meta", "fine_label_names", "7973b15100ade9c7d40fb424638fde48"),
        labels="fine_labels",
    ),
)


@dataclass(frozen=True)
class Archive:
    """An archive on disk, packed or unpacked."""

    kind: Kind
    path: Path

    def read(
        self, split: Literal["train", "test"]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str], list[str]]:
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
        return pixels, np.array(labels, np.int64), names, classes

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
        rank = np.argsort(order)
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
