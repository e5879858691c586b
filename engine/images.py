"""Sets of images: their interface, and encoded images, such as one file each (`array_images`: one array)."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from typing_extensions import Self, override

from mixmask.engine.damage import JPEG_END, JPEG_START, content_problem, file_problem
from mixmask.engine.decoding import ARRAYS, RGB, Decoding, decode_bytes, header_size, read_whole
from mixmask.engine.distributed import world
from mixmask.engine.errors import DataError, listed
from mixmask.engine.late import torch
from mixmask.engine.storage import state_of

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "`mixmask check-data` finds all unreadable images; data.skip_unreadable=true leaves them out"


class ImageSet(Protocol):
    """Images, and their labels if they have any."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """A path for each image: its file, or in an archive the split's path in the archive and the image's name in it."""

    @property
    def targets(self) -> npt.NDArray[Any]:
        """(N,) int64, indices into ``classes``; zeros if there are no classes.

        Of multi-label images (N, C) int8: 1 for a class that is present, 0 for one that is not, -1 if it does not count.
        """

    @property
    def labels(self) -> Tensor:
        """``targets`` as a tensor, which shares their memory."""

    @property
    def validation(self) -> npt.NDArray[np.bool_] | None:
        """(N,) bool: the official validation split among training images, on which hyperparameters are chosen.

        None if the data set has none.
        """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted; empty if the images have no labels."""

    @property
    def root(self) -> Path:
        """The folder or archive that was read, for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Image ``index`` as (C, H, W) uint8; RGB, unless `with_decoding` was asked for something else.

        Raises:
            DataError: If it is missing or damaged.
        """

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index`` in pixels, decoding as little as possible, for ``check-data --quick``.

        Raises:
            DataError: If it is missing or found to be damaged.
        """

    def header(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index`` in pixels, as its header says; damage is not looked for.

        Raises:
            DataError: If it is missing or has no header.
        """

    def array(self) -> Tensor | None:
        """All images as (N, C, H, W) uint8 if they are already in memory; else None."""

    def subset(self, indices: Sequence[int] | Tensor, root: Path | None = None) -> Self:
        """The images at ``indices``, in that order, with the same classes; ``root`` replaces the name in messages."""

    def shard(self) -> Self:
        """This rank's images for a pass that all ranks share: with world size n, every n-th one, in order."""

    def with_decoding(self, channels: int | None = None, levels: tuple[int, int] | None = None) -> Self:
        """The same images, decoded to other channels, or with other levels of 16-bit values (`Decoding`); None: as now.

        Raises:
            DataError: If images in memory cannot be converted.
        """

    def encoded(self, index: int) -> Tensor:
        """(n,) uint8, image ``index`` as a file: its own bytes, or a PNG of its pixels.

        Raises:
            DataError: If it is missing or damaged.
        """

    def inner_name(self, index: int) -> str:
        """The path of image ``index`` below the root that it was read from, with slashes."""

    @property
    def origin(self) -> str:
        """Where the images come from, for people: the root, or several with their counts."""

    def problem(self, index: int) -> str | None:
        """A message if image ``index`` is damaged; else None.

        A JPEG counts as whole if it begins and ends with its markers, which takes two small reads. Every other image is
        decoded.
        """

    def states(self) -> Iterable[str]:
        """For each image, a text that changes when its content does; found without reading it."""

    def check(self) -> None:
        """Find damaged images before long work starts; see `problem`.

        Raises:
            DataError: Naming the damaged images (the first ten).
        """

    def summary(self) -> dict[str, str | int]:
        """Counts, and as ``listing`` a digest of class and file names, which tells data sets of one name apart."""


@dataclass(frozen=True, eq=False)
class Images(ABC):
    """Base class of image sets; attributes and methods as in `ImageSet`."""

    paths: tuple[Path, ...]
    targets: npt.NDArray[Any]
    classes: tuple[str, ...]
    root: Path
    validation: npt.NDArray[np.bool_] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # A kind of data may give a list, a tensor, or whole numbers of another type.
        found = np.asarray(self.targets)
        if found.ndim not in (1, 2) or (found.size and found.dtype.kind not in "iub"):
            raise DataError(
                f"{self.root}: its labels are an array {found.shape} of {found.dtype}; valid: (N,) whole numbers, or "
                f"(N, classes) of images with several labels each"
            )
        object.__setattr__(self, "targets", np.require(found, np.int8 if found.ndim == 2 else np.int64, ["C", "W"]))
        if self.validation is not None:
            object.__setattr__(self, "validation", np.asarray(self.validation, np.bool_))

    @property
    def labels(self) -> Tensor:
        """The targets as a tensor."""
        return torch.from_numpy(self.targets)

    def __len__(self) -> int:
        return len(self.paths)

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Image ``index`` as (C, H, W) uint8."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index``."""

    def header(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index`` as its header says."""
        return self.size(index)

    @abstractmethod
    def array(self) -> Tensor | None:
        """All images, if they are in memory."""

    @abstractmethod
    def with_decoding(self, channels: int | None = None, levels: tuple[int, int] | None = None) -> Self:
        """The same images with another `Decoding`."""

    @abstractmethod
    def states(self) -> Iterable[str]:
        """For each image, a text that changes when its content does."""

    def encoded(self, index: int) -> Tensor:
        """Image ``index`` as PNG."""
        from torchvision.io import encode_png

        png: Tensor = encode_png(self.read(index).contiguous())
        return png

    def inner_name(self, index: int) -> str:
        """The path of image ``index`` below the root."""
        return Path(os.path.relpath(self.paths[index], self.root)).as_posix()

    @property
    def origin(self) -> str:
        """The root."""
        return str(self.root)

    def without_labels(self) -> Self:
        """The same images, with no classes."""
        return replace(self, targets=np.zeros(len(self), np.int64), classes=(), validation=None)

    def subset(self, indices: Sequence[int] | Tensor, root: Path | None = None) -> Self:
        """The images at ``indices``, in that order, with the same classes."""
        chosen = [int(i) for i in indices]
        return self._chosen(chosen, self.root if root is None else root)

    def _chosen(self, chosen: list[int], root: Path) -> Self:
        held = None if self.validation is None else self.validation[chosen]
        paths = tuple(self.paths[i] for i in chosen)
        return replace(self, paths=paths, targets=self.targets[chosen], root=root, validation=held)

    def shard(self) -> Self:
        """This rank's images: with world size n, every n-th one, in order (`gather_dealt` restores the whole order)."""
        return self if world().size == 1 else self.subset(range(world().rank, len(self), world().size))

    def summary(self) -> dict[str, str | int]:
        """Counts, and a digest of class and file names; if names repeat, of the paths below the root, too."""
        names = [
            f"{self._shown(label)}/{path.name}" for path, label in zip(self.paths, self.targets.tolist(), strict=True)
        ]
        # Names can repeat within a class, as for frames of several videos. The paths then tell two data sets apart.
        if len({*names}) < len(names):
            names = [f"{name} {os.path.relpath(path, self.root)}" for name, path in zip(names, self.paths, strict=True)]
        if self.validation is not None:  # it decides what is chosen, and with it numbers
            names.append(f"validation {self.validation.astype(int).tolist()}")
        digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode())
        return {"num_images": len(self), "num_classes": len(self.classes), "listing": digest.hexdigest()[:16]}

    def _shown(self, label: int | list[int]) -> str:
        if isinstance(label, int):
            return self.classes[label] if self.classes else ""
        return " ".join(map(str, label))

    def problem(self, index: int) -> str | None:
        """A message if image ``index`` is damaged; images in memory are not."""
        return None

    def check(self) -> None:
        """Look at every image, with a few threads."""
        with ThreadPoolExecutor(8) as pool:
            problems = [found for found in pool.map(self.problem, range(len(self)), chunksize=256) if found is not None]
        if problems:
            raise DataError(*listed(problems), REMEDY)


@dataclass(frozen=True, eq=False)
class EncodedImages(Images):
    """Images that are decoded whenever they are read.

    A container of images (an archive, a table) derives from this class and says where the bytes of image ``index`` are.

    Attributes:
        decoding: What they are decoded to.
    """

    decoding: Decoding = field(default=RGB, kw_only=True)

    @abstractmethod
    def content(self, index: int) -> Tensor:
        """(n,) uint8, the encoded image.

        Raises:
            DataError: If it is missing or damaged.
        """

    def read(self, index: int) -> Tensor:
        """Decode image ``index``."""
        return decode_bytes(self.content(index), self.paths[index], self.decoding)

    def size(self, index: int) -> tuple[int, int]:
        """Width and height from the header. To find truncation, a JPEG's end is read, and any other image is decoded."""
        content = self.content(index)
        problem = content_problem(content, self.paths[index], self.decoding)
        if problem is not None:
            raise DataError(problem)
        return header_size(content, self.paths[index])

    @override
    def header(self, index: int) -> tuple[int, int]:
        return header_size(self.content(index), self.paths[index])

    def array(self) -> None:
        """None: the images are not in memory."""

    def with_decoding(self, channels: int | None = None, levels: tuple[int, int] | None = None) -> Self:
        """The same images with another `Decoding`."""
        now = self.decoding
        how = Decoding(now.channels if channels is None else channels, now.levels if levels is None else levels)
        return replace(self, decoding=how)

    @override
    def encoded(self, index: int) -> Tensor:
        return self.content(index)

    def ends(self, index: int) -> bytes | None:
        """The first two and the last two bytes of image ``index``, if they can be had without reading it whole."""
        return None

    @override
    def problem(self, index: int) -> str | None:
        try:
            if self.ends(index) == JPEG_START + JPEG_END:
                return None
            return content_problem(self.content(index), self.paths[index], self.decoding)
        except DataError as error:
            return error.one_line()


@dataclass(frozen=True, eq=False)
class FileImages(EncodedImages):
    """Images with one file each."""

    @override
    def content(self, index: int) -> Tensor:
        return read_whole(self.paths[index])

    @override
    def size(self, index: int) -> tuple[int, int]:
        """Width and height from the header. To find truncation, a JPEG's end is read, and any other file is decoded."""
        problem = file_problem(self.paths[index], self.decoding)
        if problem is not None:
            raise DataError(problem)
        return self.header(index)

    @override
    def header(self, index: int) -> tuple[int, int]:
        path = self.paths[index]
        if path.name.lower().endswith(ARRAYS):
            return super().header(index)
        try:
            with Image.open(path) as image:
                return image.size
        except Exception as error:  # Pillow's readers raise many types
            raise DataError(f"{path}: not a readable image ({error})") from None

    @override
    def problem(self, index: int) -> str | None:
        return file_problem(self.paths[index], self.decoding)

    def states(self) -> Iterable[str]:
        """Sizes of the files, and times of their last change."""
        with ThreadPoolExecutor(16) as pool:
            yield from pool.map(state_of, self.paths, chunksize=256)
