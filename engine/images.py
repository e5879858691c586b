"""Labelled images: what the rest of the project asks of them, in files of their own or in one array."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from typing_extensions import Self, override

from mixmask.engine.distributed import world
from mixmask.engine.errors import DataError, listed


class ImageSet(Protocol):
    """Images and their labels."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """What each image is called: its file; of an archive, the archive's name and the image's file name in it."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64, indices into ``classes``."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted."""

    @property
    def root(self) -> Path:
        """The folder or archive that was read, for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Image ``index`` as (3, H, W) uint8 RGB.

        Raises:
            DataError: If it is missing or damaged.
        """

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index`` in pixels, without decoding it; for `mixmask check-data --quick`.

        Raises:
            DataError: If it is missing, or seen to be damaged.
        """

    def array(self) -> Tensor | None:
        """All images as (N, 3, H, W) uint8 where they lie in memory already; else None."""

    def subset(self, indices: Sequence[int] | Tensor, root: Path | None = None) -> Self:
        """The images at ``indices``, in that order, with the same classes; ``root`` replaces what messages call them."""

    def shard(self) -> Self:
        """This process's images, where several share a pass over them: every n-th one, in order."""

    def check(self) -> None:
        """Find damaged images before long work starts.

        Raises:
            DataError: With their names.
        """

    def summary(self) -> dict[str, str | int]:
        """Counts, and under ``listing`` a digest of class and file names that tells two data sets of one name apart."""


@dataclass(frozen=True)
class Images:
    """What the two kinds of image sets share; attributes as in `ImageSet`."""

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int] | Tensor, root: Path | None = None) -> Self:
        """The images at ``indices``, in that order, with the same classes."""
        chosen = [int(i) for i in indices]
        return self._chosen(chosen, self.root if root is None else root)

    def _chosen(self, chosen: list[int], root: Path) -> Self:
        return type(self)(tuple(self.paths[i] for i in chosen), self.labels[chosen], self.classes, root)

    def shard(self) -> Self:
        """This process's images: every n-th one, in order."""
        return self if world().size == 1 else self.subset(range(world().rank, len(self), world().size))

    def summary(self) -> dict[str, str | int]:
        """Counts, and a digest of the class and file names; of the whole paths below the root where names repeat."""
        names = [
            f"{self.classes[label]}/{path.name}" for path, label in zip(self.paths, self.labels.tolist(), strict=True)
        ]
        if len({*names}) < len(
            names
        ):  # as of frames of several videos in one class: the names alone do not tell them apart
            names = [f"{name} {os.path.relpath(path, self.root)}" for name, path in zip(names, self.paths, strict=True)]
        digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode())
        return {"num_images": len(self), "num_classes": len(self.classes), "listing": digest.hexdigest()[:16]}


@dataclass(frozen=True)
class FileImages(Images):
    """Images in files of their own."""

    def read(self, index: int) -> Tensor:
        """Decode one file; see `decode`."""
        return decode(self.paths[index])

    def size(self, index: int) -> tuple[int, int]:
        """From the file's header; its end is looked at, too."""
        path = self.paths[index]
        problem = file_problem(path)
        if problem is not None:
            raise DataError(problem)
        try:
            with Image.open(path) as image:
                width, height = image.size
                return width, height
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: not a readable image ({error})") from None

    def array(self) -> None:
        """They lie on disk."""

    def check(self) -> None:
        """Find damaged files; see `check_files`."""
        check_files(self.paths)


@dataclass(frozen=True)
class ArrayImages(Images):
    """Images in memory, all of one size.

    Attributes:
        pixels: (N, 3, H, W) uint8.
    """

    pixels: Tensor

    def read(self, index: int) -> Tensor:
        """One row of the array."""
        return self.pixels[index]

    def size(self, index: int) -> tuple[int, int]:
        """That of all."""
        return self.pixels.shape[3], self.pixels.shape[2]

    def array(self) -> Tensor:
        """The array."""
        return self.pixels

    def check(self) -> None:
        """There is nothing left to find: whoever made the array has read everything."""

    @override
    def _chosen(self, chosen: list[int], root: Path) -> Self:
        paths = tuple(self.paths[i] for i in chosen)
        return type(self)(paths, self.labels[chosen], self.classes, root, self.pixels[chosen])


def decode(path: Path) -> Tensor:
    """Read one image as (3, H, W) uint8 RGB; grey, palette, CMYK and 16-bit images are converted.

    Raises:
        DataError: If the file is missing, truncated or not an image. The message names it.
    """
    try:
        image: Tensor = decode_image(read_file(str(path)), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
        raise DataError(f"{path}: not a readable image ({reason})") from None
    if image.ndim == 4:  # an animation: its first picture
        image = image[0]
    if image.dtype == torch.uint16:
        image = (image.int() >> 8).to(torch.uint8)
    return image


def check_files(paths: Sequence[Path]) -> None:
    """Find damaged images before long work starts, at the price of two small reads per file.

    A JPEG that begins and ends with its markers is taken as whole; every other file is decoded to make sure.

    Raises:
        DataError: Naming the damaged files (the first ten).
    """

    with ThreadPoolExecutor(8) as pool:
        problems = [found for found in pool.map(file_problem, paths) if found is not None]
    if problems:
        raise DataError(*listed(problems))


def file_problem(path: Path) -> str | None:
    """What is wrong with one file, or None; see `check_files`."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 2))
            end = file.read(2)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if start == b"\xff\xd8" and end == b"\xff\xd9":
        return None
    try:
        decode(path)
    except DataError as error:
        return str(error)
    return None
