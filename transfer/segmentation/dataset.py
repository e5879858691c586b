"""Images with a label map each, and the base class of the layouts in which they lie on disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mixmask.engine.damage import check_files
from mixmask.engine.errors import DataError, listed
from mixmask.engine.late import torch
from mixmask.engine.progress import track
from mixmask.transfer.segmentation.recipe import SegmentationData

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = 255  # a pixel without a class: it is neither learnt nor counted
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Labelled:
    """An image file and its label map; ``key`` tells it from the others of the data set."""

    key: str
    image: Path
    labels: Path


@dataclass(frozen=True)
class SegmentationSet:
    """The images of one split.

    Attributes:
        root: The data set's folder, for messages.
        images: The files.
        classes: Class names; label ``i`` means ``classes[i]``.
        read: Reads a label map: (H, W) uint8, the class or `IGNORED`.
    """

    root: Path
    images: tuple[Labelled, ...]
    classes: tuple[str, ...]
    read: Callable[[Path], Labels]

    def __len__(self) -> int:
        return len(self.images)

    def summary(self) -> dict[str, str | int]:
        """The count, and under ``listing`` a digest of the keys and of the sizes of the label files."""
        digest = hashlib.sha256()
        for one in self.images:
            digest.update(f"{one.key} {one.labels.stat().st_size}\n".encode())
        return {"num_images": len(self), "listing": digest.hexdigest()[:16]}

    def check(self) -> None:
        """Read every label map, and the header of every image.

        Raises:
            DataError: If a file is damaged, a label map has another size than its image, or a label is no class.
        """
        check_files([one.image for one in self.images])

        def problem(one: Labelled) -> str | None:
            try:
                labels = self.labels_of(one)
                with Image.open(one.image) as image:
                    width, height = image.size
            except DataError as error:
                return str(error)
            except (OSError, SyntaxError, UnidentifiedImageError) as error:
                return f"{one.image}: not a readable image ({error})"
            if labels.shape != (height, width):
                given = f"{labels.shape[1]}×{labels.shape[0]}"
                return f"{one.labels}: is {given} pixels, its image {one.image} is {width}×{height}"
            return None

        with ThreadPoolExecutor(8) as pool:
            found = pool.map(problem, self.images)
            problems = [
                text for text in track(f"{self.root.name}: label maps", found, len(self), 1) if text is not None
            ]
        if problems:
            raise DataError(*listed(problems))

    def labels_of(self, one: Labelled) -> Labels:
        """The label map of an image.

        Raises:
            DataError: If it is damaged, or holds a label that is no class.
        """
        labels = self.read(one.labels)
        strange = np.unique(labels)
        strange = strange[(strange >= len(self.classes)) & (strange != IGNORED)]
        if len(strange):
            raise DataError(
                f"{one.labels}: holds the label {', '.join(map(str, strange[:5].tolist()))}; the {len(self.classes)} "
                f"classes are 0 to {len(self.classes) - 1}, and {IGNORED} is ignored"
            )
        return labels


class SegmentationKind(ABC):
    """A layout of images and label maps on disk. A module in ``transfer/segmentation/kinds/`` is found.

    Attributes:
        kind: Its name, a value of ``data.layout``.
        general: Whether it is only asked when no other layout recognises a folder.
    """

    kind: ClassVar[str]
    general: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, root: Path) -> bool:
        """Whether a folder has this layout."""

    @abstractmethod
    def classes(self, root: Path) -> tuple[str, ...]:
        """The class names.

        Raises:
            DataError: If the folder does not say.
        """

    @abstractmethod
    def open(self, root: Path, data: SegmentationData, split: str) -> list[Labelled]:
        """The files of a split.

        Raises:
            DataError: If a list, folder or file is missing; says what was expected and what is there.
        """

    def read(self, path: Path) -> Labels:
        """A label map as the class of every pixel; the base reads the indices of a PNG."""
        return read_indices(path)


def read_indices(path: Path) -> Labels:
    """The values of a grey or palette image as they are stored.

    Raises:
        DataError: If it cannot be read, or holds colours.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1"):
                raise DataError(
                    f"{path}: an image of mode {image.mode}; a label map is a grey or palette image whose values are classes"
                )
            values: Labels = np.array(image.convert("L") if image.mode == "1" else image, dtype=np.uint8)
            return values
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: not a readable label map ({error})") from None


def mapped(labels: npt.NDArray[np.integer], table: Mapping[int, int], path: Path) -> Labels:
    """Replace the ids of a data set by classes.

    Args:
        labels: The ids.
        table: Class (or `IGNORED`) of every id.
        path: For the message.

    Raises:
        DataError: If an id is not in the table.
    """
    lookup = np.full(256, -1, dtype=np.int16)
    for number, label in table.items():
        lookup[number % 256] = label
    found = lookup[labels]
    if (found < 0).any():
        strange = np.unique(np.asarray(labels)[found < 0])[:5].tolist()
        raise DataError(f"{path}: holds the unknown label id {', '.join(map(str, strange))}")
    classes: Labels = found.astype(np.uint8)
    return classes


def require_files(pairs: Sequence[Labelled], where: str) -> list[Labelled]:
    """The pairs, if all of their files are there.

    Raises:
        DataError: If there are none, or files are missing; names the first ones.
    """
    if not pairs:
        raise DataError(f"{where}: no images")
    missing = [f"{path}: no such file" for one in pairs for path in (one.image, one.labels) if not path.is_file()]
    if missing:
        raise DataError(*listed(missing))
    return list(pairs)


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1)
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from None
