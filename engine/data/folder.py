"""Folders of classes (ImageFolder): one folder per split with one folder per class, or the class folders alone.

Without labels, all images of a folder at any depth.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.decoding import ARRAYS, EXTENSIONS
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages

USUAL_SPLITS = ("train", "val", "test")
NO_CLASSES = (
    "holds images, and no folder per class. If it is one class of several, name the folder above it; for pretraining, "
    "data.labels=false (--no-labels) reads images without classes"
)


class Folders(DataKind):
    """Any tree of class folders; the fallback if no other layout matches."""

    kind: ClassVar[str] = "folder"
    general: ClassVar[bool] = True

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return (root / data.train).is_dir() or is_only_split(root)

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> FileImages:
        path = root / (data.train if part == "train" else str(data.test))
        if not data.labels:
            return all_images(path if path.is_dir() or part == "test" else root)
        if path.is_dir():
            return image_folder(path)
        if is_only_split(root):
            if part == "train":
                return image_folder(root)
            raise DataError(
                f"{root}: holds class folders itself, and no split to test on: data.holdout=0.2 keeps a fifth of every "
                f"class for testing"
            )
        if root.is_dir() and images_in(root) and not class_folders(root):
            raise DataError(f"{root}: {NO_CLASSES}")
        present = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise DataError(
            f"{path}: no such folder (data.{part} of '{data.name}'), and no archive that is known. "
            f"Folders there: {', '.join(present) or 'none'}"
            + "; data.labels=false (--no-labels) reads all images below, without classes"
            * (part == "train" and bool(present))
        )

    @override
    def splits(self, root: Path) -> list[str]:
        found = [name for name in USUAL_SPLITS if (root / name).is_dir()]
        return found or (["."] if is_only_split(root) else [])

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        if data.test is None or not (root / data.test).is_dir():
            return None
        return (
            f"{root / data.test}: is there, so data.holdout is not needed: leave it out, or set data.test=null to test on "
            f"a part of '{data.train}' all the same"
        )


def is_only_split(root: Path) -> bool:
    """Whether a folder holds class folders with images, and none of the usual splits."""
    if not root.is_dir():
        return False
    classes = class_folders(root)
    return bool(classes) and not {*USUAL_SPLITS} & set(classes) and any(images_in(root / name) for name in classes)


def is_unlabelled(path: Path) -> bool:
    """Whether a folder holds images without class labels, like Tiny-ImageNet's ``test``."""
    if not path.is_dir() or (path / "val_annotations.txt").is_file():
        return False
    folders = class_folders(path)
    return (not folders and bool(images_in(path))) or (folders == ("images",) and bool(images_in(path / "images")))


def all_images(path: Path) -> FileImages:
    """All images in a folder and below it, at any depth, sorted by path; no labels.

    Raises:
        DataError: If there is no such folder, or it holds no images.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    found: list[str] = []
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(path, followlinks=True, onerror=unreadable):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:  # a link to a folder above, or to one that was read already
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in files if is_image(name) or is_array(name)]
    found = without_side_arrays(found)
    if not found:
        raise DataError(f"{path}: no images in it or below it ({', '.join(EXTENSIONS)})")
    return FileImages(tuple(map(Path, sorted(found))), np.zeros(len(found), np.int64), (), path)


def is_image(name: str) -> bool:
    """Whether a file is an image by its name. Hidden files are not (macOS puts ``._x.jpg`` beside ``x.jpg``)."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def is_array(name: str) -> bool:
    """Whether a file may be an image that is kept as an array."""
    return name.lower().endswith(ARRAYS) and not name.startswith(".")


def without_side_arrays(names: list[str]) -> list[str]:
    """The names without arrays, unless all are arrays: features and masks often lie beside images."""
    images = [name for name in names if not name.lower().endswith(ARRAYS)]
    return images or names


def holds_class_folders(root: Path, data: DataRecipe) -> bool:
    """Whether ``root`` has folders of classes for the training split, so that it is no other kind of data."""
    split = root / data.train
    if split.is_dir():
        return any(images_in(split / name) or (split / name / "images").is_dir() for name in class_folders(split)[:3])
    return is_only_split(root)


def class_folders(path: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted."""
    return tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")))


def images_in(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted."""
    names = [entry.name for entry in os.scandir(folder) if is_image(entry.name) or is_array(entry.name)]
    return sorted(without_side_arrays(names))


def image_folder(path: Path) -> FileImages:
    """List the images of one split, sorted by class and file name.

    Raises:
        DataError: If there are no class folders, or one of them has no images.
    """
    classes = class_folders(path)
    if not classes:
        raise DataError(
            f"{path}: no class folders. Expected one folder per class with images ({', '.join(EXTENSIONS)}); "
            f"data.labels=false (--no-labels) reads images without classes"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = path / name
        if (folder / "images").is_dir():  # Tiny-ImageNet keeps n01443537/images/*.JPEG beside a list of boxes
            folder = folder / "images"
        files = images_in(folder)
        if not files:
            raise DataError(
                f"{folder}: class folder without images (expected {', '.join(EXTENSIONS)}); data.labels=false (--no-labels) "
                f"reads images at any depth, without classes"
            )
        paths.extend(folder / file for file in files)
        labels.extend([label] * len(files))
    return FileImages(tuple(paths), np.array(labels, np.int64), classes, path)
