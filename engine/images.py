"""Sets of labelled images: their interface, and its two implementations (one file per image, or one array)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
        """A path for each image: its file, or for an archive the archive's path and the image's file name in it."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64, indices into ``classes``.

        Of multi-label images (N, C) int8: 1 for a class that is present, 0 for one that is not, -1 if it does not count.
        """

    @property
    def validation(self) -> Tensor | None:
        """(N,) bool: the official validation split among training images, on which hyperparameters are chosen.

        None if the data set has none.
        """

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
        """Width and height of image ``index`` in pixels, decoding as little as possible, for ``check-data --quick``.

        Raises:
            DataError: If it is missing or found to be damaged.
        """

    def array(self) -> Tensor | None:
        """All images as (N, 3, H, W) uint8 if they are already in memory; else None."""

    def subset(self, indices: Sequence[int] | Tensor, root: Path | None = None) -> Self:
        """The images at ``indices``, in that order, with the same classes; ``root`` replaces the name in messages."""

    def shard(self) -> Self:
        """This rank's images for a pass that all ranks share: with world size n, every n-th one, in order."""

    def check(self) -> None:
        """Find damaged images before long work starts.

        Raises:
            DataError: Naming the damaged files.
        """

    def summary(self) -> dict[str, str | int]:
        """Counts, and as ``listing`` a digest of class and file names, which tells data sets of one name apart."""


@dataclass(frozen=True)
class Images:
    """Base class of the two kinds of image sets; attributes as in `ImageSet`."""

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    root: Path
    validation: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int] | Tensor, root: Path | None = None) -> Self:
        """The images at ``indices``, in that order, with the same classes."""
        chosen = [int(i) for i in indices]
        return self._chosen(chosen, self.root if root is None else root)

    def _chosen(self, chosen: list[int], root: Path) -> Self:
        held = None if self.validation is None else self.validation[chosen]
        paths = tuple(self.paths[i] for i in chosen)
        return replace(self, paths=paths, labels=self.labels[chosen], root=root, validation=held)

    def shard(self) -> Self:
        """This rank's images: with world size n, every n-th one, in order (`gather_dealt` restores the whole order)."""
        return self if world().size == 1 else self.subset(range(world().rank, len(self), world().size))

    def summary(self) -> dict[str, str | int]:
        """Counts, and a digest of class and file names; if names repeat, of the paths below the root, too."""
        names = [
            f"{self._shown(label)}/{path.name}" for path, label in zip(self.paths, self.labels.tolist(), strict=True)
        ]
        # Names can repeat within a class, as for frames of several videos. The paths then tell two data sets apart.
        if len({*names}) < len(names):
            names = [f"{name} {os.path.relpath(path, self.root)}" for name, path in zip(names, self.paths, strict=True)]
        if self.validation is not None:  # it decides what is chosen, and with it numbers
            names.append(f"validation {self.validation.int().tolist()}")
        digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode())
        return {"num_images": len(self), "num_classes": len(self.classes), "listing": digest.hexdigest()[:16]}

    def _shown(self, label: int | list[int]) -> str:
        return self.classes[label] if isinstance(label, int) else " ".join(map(str, label))


@dataclass(frozen=True)
class FileImages(Images):
    """Images with one file each, decoded whenever they are read."""

    def read(self, index: int) -> Tensor:
        """Decode one file; see `decode`."""
        return decode(self.paths[index])

    def size(self, index: int) -> tuple[int, int]:
        """Width and height from the header. To find truncation, a JPEG's end is read, and any other file is decoded."""
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
        """None: the images are on disk."""

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
        """Image ``index`` as (3, H, W) uint8, a view of the array."""
        return self.pixels[index]

    def size(self, index: int) -> tuple[int, int]:
        """Width and height, which all images share."""
        return self.pixels.shape[3], self.pixels.shape[2]

    def array(self) -> Tensor:
        """``pixels``, not a copy."""
        return self.pixels

    def check(self) -> None:
        """Nothing to do: every image was read when the array was made."""

    @override
    def _chosen(self, chosen: list[int], root: Path) -> Self:
        return replace(super()._chosen(chosen, root), pixels=self.pixels[chosen])


def decode(path: Path) -> Tensor:
    """Read one image as (3, H, W) uint8 RGB; grey, palette, CMYK and 16-bit images are converted.

    Raises:
        DataError: If the file is missing, truncated or not an image. The message names it.
    """
    try:
        image: Tensor = decode_image(read_file(str(path)), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
        reason = re.sub(r"^\w+, \S+:\d+, ", "", said)  # without torchvision's function and source file
        raise DataError(f"{path}: not a readable image ({reason})") from None
    if image.ndim == 4:  # an animation: keep the first frame
        image = image[0]
    if image.dtype == torch.uint16:
        # Keep the high byte. int() first, because torch supports few operations on uint16.
        image = (image.int() >> 8).to(torch.uint8)
    return image


def check_files(paths: Sequence[Path]) -> None:
    """Find damaged images before long work starts.

    A JPEG counts as whole if it begins and ends with its markers, which takes two small reads. Every other file is
    decoded.

    Raises:
        DataError: Naming the damaged files (the first ten).
    """

    with ThreadPoolExecutor(8) as pool:
        problems = [found for found in pool.map(file_problem, paths) if found is not None]
    if problems:
        raise DataError(*listed(problems))


def file_problem(path: Path) -> str | None:
    """A message about what is wrong with one file, or None; see `check_files`."""
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
