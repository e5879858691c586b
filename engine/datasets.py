"""Labelled images on disk: ImageFolder trees, Tiny-ImageNet's own layout, and CIFAR's archives."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

from engine import cifar
from engine.config import Recipe, added, operational
from engine.distributed import world
from engine.errors import DataError, listed
from engine.texts import read_text

# How many classes the data sets of these names have, which published numbers hold for.
KNOWN_CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet100": 100, "imagenet1k": 1000}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif")


class DataRecipe(Recipe):
    """Which images.

    ``name`` identifies the data set in fingerprints and tables; ``root`` only says where it lies on this machine. There,
    ``train`` and ``test`` are folders with one sub-folder per class (or Tiny-ImageNet's own layout). A root without them
    that holds ``cifar-10-python.tar.gz``, ``cifar-100-python.tar.gz`` or what they unpack to is read as that archive.
    ``storage: stream`` decodes in worker processes at every epoch; ``storage: resident`` decodes a small data set once
    and keeps it on the device (all images must have one size).

    A root that itself holds the class folders is read as its only split. ``holdout`` is the part of every class that makes
    the test split where the data have none, drawn with ``holdout_seed``; the rest is the training split. ``allow_overlap``
    lets images be trained and tested on.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    root: str = operational(..., min_length=1)
    train: str = "train"
    test: str | None = "val"
    storage: Literal["stream", "resident"] = "stream"
    num_workers: int = operational(4, ge=0)
    holdout: float = added(0.0, ge=0, lt=1)
    holdout_seed: int = added(0, ge=0, lt=1 << 63)
    allow_overlap: bool = added(False)

    @model_validator(mode="after")
    def _splits_differ(self) -> DataRecipe:
        if self.train == self.test and not self.holdout and not self.allow_overlap:
            raise ValueError(
                f"train and test are the same folder '{self.train}': a score on it would mean nothing; "
                f"allow_overlap: true allows it"
            )
        return self


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels.

    Attributes:
        paths: One file per image; of an archive, the archive's name and the image's file name in it.
        labels: (N,) int64, indices into ``classes``.
        classes: Class names, sorted.
        root: The folder or archive that was read, for messages.
        pixels: (N, 3, H, W) uint8 where the images do not lie in files of their own.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    root: Path
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """Image ``index`` as (3, H, W) uint8 RGB.

        Raises:
            DataError: If its file is missing or damaged.
        """
        return decode(self.paths[index]) if self.pixels is None else self.pixels[index]

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at ``indices``, in that order, with the same classes."""
        chosen = [int(i) for i in indices]
        pixels = None if self.pixels is None else self.pixels[chosen]
        return ImageSet(tuple(self.paths[i] for i in chosen), self.labels[chosen], self.classes, self.root, pixels)

    def shard(self) -> ImageSet:
        """This process's images, where several share a pass over them: every n-th one, in order."""
        return self if world().size == 1 else self.subset(range(world().rank, len(self), world().size))

    def check(self) -> None:
        """Find damaged files before long work starts (`check_files`); an archive was checked when it was read."""
        if self.pixels is None:
            check_files(self.paths)

    def summary(self) -> dict[str, str | int]:
        """Counts, and a digest of the class and file names that tells two data sets of one name apart."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            digest.update(f"{self.classes[label]}/{path.name}\n".encode())
        return {"num_images": len(self), "num_classes": len(self.classes), "listing": digest.hexdigest()[:16]}


OpenImages = Callable[[DataRecipe, Literal["train", "test"]], ImageSet]


def open_split(data: DataRecipe, split: Literal["train", "test"]) -> ImageSet:
    """List one split of a data set.

    Raises:
        DataError: If the folder is missing or empty, a class folder has no images, or Tiny-ImageNet's annotation file
            does not fit its images.
    """
    root = Path(data.root).expanduser()
    if not root.exists():
        raise DataError(f"{root}: no such data folder (data.root of '{data.name}')")
    if data.holdout:
        return _held_out(data, root, split)
    folder = data.train if split == "train" else data.test
    if folder is None:
        raise DataError(
            f"the data set '{data.name}' has no test split: set data.test to a folder of {data.root}, or "
            f"data.holdout=0.2 to keep a fifth of every class for testing"
        )
    path = root / folder
    if not path.is_dir() and is_only_split(root):
        if split == "train":
            return _image_folder(root)
        raise DataError(
            f"{root}: holds class folders itself, and no split to test on: data.holdout=0.2 keeps a fifth of every class "
            f"for testing"
        )
    if not path.is_dir() and (archive := cifar.find(root)) is not None:
        return _archived(archive, split)
    if not path.is_dir():
        present = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise DataError(
            f"{path}: no such folder (data.{split} of '{data.name}'), and no CIFAR archive. "
            f"Folders there: {', '.join(present) or 'none'}"
        )
    if (path / "val_annotations.txt").is_file():
        return _tiny_imagenet_val(path, _class_folders(root / data.train))
    return _image_folder(path)


def is_only_split(root: Path) -> bool:
    """Whether a folder holds class folders with images, and none of the usual splits."""
    if not root.is_dir() or cifar.find(root) is not None:
        return False
    classes = _class_folders(root)
    return (
        bool(classes)
        and not {"train", "val", "test"} & set(classes)
        and any(_images_in(root / name) for name in classes)
    )


def is_unlabelled(path: Path) -> bool:
    """Whether a folder holds images and says nothing of their classes, as Tiny-ImageNet's ``test``."""
    if not path.is_dir() or (path / "val_annotations.txt").is_file():
        return False
    folders = _class_folders(path)
    return (not folders and bool(_images_in(path))) or (folders == ("images",) and bool(_images_in(path / "images")))


def _held_out(data: DataRecipe, root: Path, split: Literal["train", "test"]) -> ImageSet:
    """A part of the training split for testing, of every class alike, or what is left of it for training."""
    if data.test is not None and (root / data.test).is_dir():
        raise DataError(
            f"{root / data.test}: is there, so data.holdout is not needed: leave it out, or set data.test=null to test on "
            f"a part of '{data.train}' all the same"
        )
    if not (root / data.train).is_dir() and cifar.find(root) is not None:
        raise DataError(f"{root}: a CIFAR archive has a test split of its own; leave data.holdout out")
    images = open_split(data.model_copy(update={"holdout": 0.0}), "train")
    generator = torch.Generator().manual_seed(data.holdout_seed)
    chosen: list[int] = []
    for label, name in enumerate(images.classes):
        own = (images.labels == label).nonzero().flatten()
        num = max(1, round(len(own) * data.holdout))
        if num >= len(own):
            raise DataError(
                f"{images.root}: class '{name}' has {len(own)} images; data.holdout={data.holdout:g} would leave none to "
                f"train on"
            )
        order = torch.randperm(len(own), generator=generator)
        kept = order[:num] if split == "test" else order[num:]
        chosen += own[kept.sort().values].tolist()
    part = images.subset(sorted(chosen))
    return replace(part, root=images.root / f"({'held out' if split == 'test' else 'not held out'}: {data.holdout:g})")


def _archived(archive: cifar.Archive, split: Literal["train", "test"]) -> ImageSet:
    pixels, labels, names, classes = archive.read(split)
    order = sorted(range(len(classes)), key=classes.__getitem__)  # as sorted folders would be numbered
    rank = torch.tensor(order).argsort()
    paths = tuple(archive.path / split / name for name in names)
    return ImageSet(paths, rank[labels], tuple(classes[i] for i in order), archive.path / split, pixels)


def _class_folders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")))


def _images_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(EXTENSIONS))


def _image_folder(path: Path) -> ImageSet:
    classes = _class_folders(path)
    if not classes:
        raise DataError(
            f"{path}: no class folders. Expected one folder per class with images ({', '.join(EXTENSIONS)})"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = path / name
        if (folder / "images").is_dir():  # Tiny-ImageNet keeps n01443537/images/*.JPEG beside a list of boxes
            folder = folder / "images"
        files = _images_in(folder)
        if not files:
            raise DataError(f"{folder}: class folder without images (expected {', '.join(EXTENSIONS)})")
        paths.extend(folder / file for file in files)
        labels.extend([label] * len(files))
    return ImageSet(tuple(paths), torch.tensor(labels, dtype=torch.int64), classes, path)


def _tiny_imagenet_val(path: Path, classes: tuple[str, ...]) -> ImageSet:
    """``val/images/*.JPEG`` with ``val_annotations.txt``: file, wnid and a box per line, separated by tabs."""
    index = {name: label for label, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    annotations = path / "val_annotations.txt"
    for number, line in enumerate(read_text(annotations).splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in index:
            raise DataError(
                f"{annotations}, line {number}: expected 'file<TAB>class' with a training class, got {line!r}"
            )
        image = path / "images" / fields[0]
        if not image.is_file():
            raise DataError(f"{annotations}, line {number}: {image} does not exist")
        paths.append(image)
        labels.append(index[fields[1]])
    if not paths:
        raise DataError(f"{annotations}: empty")
    return ImageSet(tuple(paths), torch.tensor(labels, dtype=torch.int64), classes, path)


def require_same_classes(train: ImageSet, test: ImageSet, allow_overlap: bool = False) -> None:
    """Refuse a test split whose class folders differ from the training split's, or that is the same folder by another name.

    Raises:
        DataError: With the classes that only one of them has, or the folder.
    """
    if not allow_overlap and train.pixels is None and test.root.resolve() == train.root.resolve():
        raise DataError(
            f"{train.root} and {test.root} are the same folder: a score on it would mean nothing. data.allow_overlap=true "
            f"allows it"
        )
    if train.classes != test.classes:
        only_train = sorted(set(train.classes) - set(test.classes))[:5]
        only_test = sorted(set(test.classes) - set(train.classes))[:5]
        raise DataError(
            f"{train.root} and {test.root} have different classes: only in the first {only_train}, "
            f"only in the second {only_test}"
        )


def other_classes(name: str, num_classes: int) -> str:
    """What must be said beside an expectation for a data set that has another number of classes than its name says."""
    known = KNOWN_CLASSES.get(name)
    if known is None or known == num_classes:
        return ""
    return f" — holds for the {known:,} classes of {name}; these data have {num_classes:,}, give them another data.name"


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
