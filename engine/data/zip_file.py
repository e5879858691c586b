"""Folders of classes inside one .zip file, read without unpacking it."""

from __future__ import annotations

import posixpath
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.data.folder import USUAL_SPLITS, holds_class_folders, is_array, is_image, without_side_arrays
from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.late import torch
from mixmask.engine.members import MemberImages
from mixmask.engine.random_access import forget, read_at

if TYPE_CHECKING:
    from torch import Tensor

MAX_IMAGE = 1 << 28  # bytes of one image when unpacked: no encoded photograph is larger
LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class Zips(DataKind):
    """``data.root`` is a .zip file with ``train/`` and ``val/``, or a folder with ``train.zip`` and ``val.zip``."""

    kind: ClassVar[str] = "zip"

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return _is_zip(root) or (_zip_of(root, data.train) is not None and not holds_class_folders(root, data))

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> ZipImages:
        split = data.train if part == "train" else str(data.test)
        if not _is_zip(root):
            file = _zip_of(root, split)
            if file is None:
                there = sorted(path.name for path in root.iterdir() if _is_zip(path)) if root.is_dir() else []
                raise DataError(f"{root}: no {split}.zip (data.{part}); there are: {', '.join(there) or 'none'}")
            archive = ZipArchive.read(file)
            return archive.images(archive.folder_of(split), data.labels)
        archive = ZipArchive.read(root)
        inner = archive.folder_of(split)
        if inner is None and part == "test":
            raise DataError(
                f"{root}: no folder {split}/ in it (data.test); folders there: {', '.join(archive.folders()[:8])}. "
                f"data.holdout=0.2 keeps a fifth of every class for testing"
            )
        return archive.images(inner, data.labels)

    @override
    def splits(self, root: Path) -> list[str]:
        if not _is_zip(root):
            return [name for name in USUAL_SPLITS if root.is_dir() and _zip_of(root, name) is not None]
        archive = ZipArchive.read(root)
        return [name for name in USUAL_SPLITS if archive.folder_of(name) is not None] or ["."]

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        if data.test is None:
            return None
        there = (
            ZipArchive.read(root).folder_of(data.test) is not None
            if _is_zip(root)
            else _zip_of(root, data.test) is not None
        )
        return f"{root}: has a split '{data.test}', so data.holdout is not needed: leave it out" if there else None


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file()


def _zip_of(root: Path, split: str) -> Path | None:
    file = root / (split if split.lower().endswith(".zip") else f"{split}.zip")
    return file if _is_zip(file) else None


@dataclass(frozen=True)
class ZipArchive:
    """A .zip file's images, by their names in it."""

    path: Path
    members: dict[str, zipfile.ZipInfo]
    top: str  # the folder that holds everything, with a slash, if there is only one; else empty

    @classmethod
    def read(cls, path: Path) -> ZipArchive:
        """Read a .zip file's directory.

        Raises:
            DataError: If it is damaged, encrypted, or claims to unpack to more than it can hold (a zip bomb).
        """
        forget([path])
        try:
            with zipfile.ZipFile(path) as file:
                every = file.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
            raise DataError(f"{path}: truncated or not a .zip file ({error})") from None
        named = [(posixpath.normpath(one.filename), one) for one in every]
        if any(posixpath.basename(name) == "val_annotations.txt" for name, _ in named):
            raise DataError(f"{path}: Tiny-ImageNet's own layout, which is read from folders only; unpack it")
        images = [(name, one) for name, one in named if _is_member(name)]
        kept = {*without_side_arrays([name for name, _ in images])}
        found = {name: one for name, one in images if name in kept}
        if not found:
            raise DataError(f"{path}: no images in it")
        if len(found) < sum(name in kept for name, _ in images):
            twice = next(name for name, count in Counter(name for name, _ in images).items() if count > 1)
            raise DataError(f"{path}: {twice} is in it more than once")
        for one in found.values():
            _refuse(path, one)
        # Members that share their bytes are how a small archive unpacks to a huge one.
        if sum(one.compress_size for one in found.values()) > path.stat().st_size:
            raise DataError(f"{path}: its images claim more bytes than the file has, so they overlap: a zip bomb")
        tops = {name.split("/", 1)[0] for name in found if "/" in name}
        alone = len(tops) == 1 and all("/" in name for name in found)
        return cls(path, found, f"{tops.pop()}/" if alone else "")

    def folders(self) -> list[str]:
        """The names of the folders at the top."""
        return sorted({name.removeprefix(self.top).split("/", 1)[0] for name in self.members})

    def folder_of(self, split: str) -> str | None:
        """The folder of a split, with a slash: at the top, or below the only folder that is there."""
        places = (f"{split.strip('/')}/", f"{self.top}{split.strip('/')}/")
        return next((place for place in places if any(name.startswith(place) for name in self.members)), None)

    def images(self, inner: str | None, labels: bool) -> ZipImages:
        """The images below a folder, as `folder` would list them if it were unpacked.

        Args:
            inner: The split's folder; None for class folders at the top, or below the only folder that is there.
            labels: Whether folders are classes.

        Raises:
            DataError: If there are no class folders, or one of them holds images further down only.
        """
        pairs: list[tuple[str, int]] = []
        classes: tuple[str, ...] = ()
        for place in dict.fromkeys(("", self.top) if inner is None else (inner,)):
            names = [name.removeprefix(place) for name in self.members if name.startswith(place)]
            pairs, classes = in_class_folders(names) if labels else ([(name, 0) for name in sorted(names)], ())
            inner = place
            if pairs:
                break
        assert inner is not None
        root = self.path / inner.strip("/")
        if not pairs:
            raise DataError(
                f"{root}: no folders of classes with images in it; data.labels=false (--no-labels) reads images without "
                f"classes"
            )
        deeper = sorted({name.split("/")[0] for name in names if "/" in name} - {*classes}) if labels else []
        if deeper:
            raise DataError(
                f"{root / deeper[0]}: class folder without images, which lie further down; data.labels=false (--no-labels) "
                f"reads images at any depth, without classes"
            )
        infos = [self.members[inner + name] for name, _ in pairs]
        return ZipImages(
            tuple(root / name for name, _ in pairs),
            np.array([label for _, label in pairs], np.int64),
            classes,
            root,
            archive=self.path,
            members=np.array(
                [[one.header_offset, one.compress_size, one.file_size, one.CRC, one.compress_type] for one in infos],
                np.int64,
            ),
        )


def in_class_folders(names: Iterable[str]) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Images in class folders, as `folder.image_folder` finds them on disk.

    Args:
        names: Paths below the split's folder: ``class/x.jpg``, or ``class/images/x.jpg`` as in Tiny-ImageNet.

    Returns:
        Path and label of each image, sorted by class and file name, and the sorted class names.
    """
    direct: dict[str, list[str]] = {}
    inner: dict[str, list[str]] = {}
    for name in names:
        folders = name.split("/")[:-1]
        if len(folders) == 1:
            direct.setdefault(folders[0], []).append(name)
        elif len(folders) == 2 and folders[1] == "images":
            inner.setdefault(folders[0], []).append(name)
    classes = tuple(sorted({*direct, *inner}))
    pairs = [
        (name, label) for label, one in enumerate(classes) for name in sorted(inner.get(one) or direct.get(one, []))
    ]
    return pairs, classes


def _is_member(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts[:-1])
    return not hidden and (is_image(parts[-1]) or is_array(parts[-1]))


def _refuse(path: Path, one: zipfile.ZipInfo) -> None:
    what = f"{path}: {one.filename}"
    if one.flag_bits & 1:
        raise DataError(f"{what} is encrypted; unpack the archive with its password")
    if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{what} is compressed by method {one.compress_type}; stored (0) and deflated (8) files can be read"
        )
    if one.file_size > MAX_IMAGE:
        raise DataError(
            f"{what} claims to unpack to {one.file_size:,} bytes; at most {MAX_IMAGE:,} are read (a zip bomb?)"
        )


@dataclass(frozen=True, eq=False)
class ZipImages(MemberImages):
    """Images in a .zip file.

    Attributes:
        archive: The file.
        members: (N, 5) int64: offset of the local header, packed size, size, CRC-32 and compression of each image.
    """

    archive: Path

    def _start(self, index: int) -> int:
        """Where the packed bytes of an image begin: after a local header of variable length."""
        start, what = int(self.members[index, 0]), self.paths[index]
        header = read_at(self.archive, start, LOCAL_HEADER.size, what).numpy().tobytes()
        magic, *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
        if magic != b"PK\x03\x04":
            raise DataError(f"{self.archive}: damaged; no local header of {what} at {start:,}")
        return start + LOCAL_HEADER.size + int(name_length) + int(extra_length)

    @override
    def plain_bytes(self, index: int) -> tuple[Path, int, int] | None:
        _, _, size, _, compression = self.members[index].tolist()
        return None if compression != zipfile.ZIP_STORED else (self.archive, self._start(index), size)

    @override
    def content(self, index: int) -> Tensor:
        _, packed, size, crc, compression = self.members[index].tolist()
        what = self.paths[index]
        content = read_at(self.archive, self._start(index), packed, what)
        if compression == zipfile.ZIP_DEFLATED:
            content = _inflated(content, size, what)
        if len(content) != size or zlib.crc32(content.numpy().data) != crc:
            raise DataError(f"{self.archive}: damaged; the CRC-32 of {what} is not the one it was packed with")
        return content


def _inflated(packed: Tensor, size: int, what: Path) -> Tensor:
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = engine.decompress(packed.numpy().data, size + 1)  # never more than was claimed
    except zlib.error as error:
        raise DataError(f"{what}: damaged in its archive ({error})") from None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
