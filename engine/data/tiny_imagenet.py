"""Tiny-ImageNet as it is published: the validation images lie in one folder, and a text file names their classes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.data.folder import USUAL_SPLITS, class_folders, image_folder
from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages
from mixmask.engine.texts import read_text

ANNOTATIONS = "val_annotations.txt"


class TinyImageNet(DataKind):
    """``train/<class>/images/*.JPEG`` and ``val/images/*.JPEG`` with ``val/val_annotations.txt``."""

    kind: ClassVar[str] = "tiny_imagenet"

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return any((root / folder / ANNOTATIONS).is_file() for folder in (data.train, data.test) if folder is not None)

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> FileImages:
        path = root / (data.train if part == "train" else str(data.test))
        if (path / ANNOTATIONS).is_file():
            return _validation(path, class_folders(root / data.train))
        if not path.is_dir():
            raise DataError(f"{path}: no such folder (data.{part} of '{data.name}')")
        return image_folder(path)

    @override
    def splits(self, root: Path) -> list[str]:
        if not any((root / name / ANNOTATIONS).is_file() for name in USUAL_SPLITS):
            return []
        return [name for name in USUAL_SPLITS if (root / name).is_dir()]

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        if data.test is None or not (root / data.test).is_dir():
            return None
        return f"{root / data.test}: is there, so data.holdout is not needed: leave it out"


def _validation(path: Path, classes: tuple[str, ...]) -> FileImages:
    """``val/images/*.JPEG`` with ``val_annotations.txt``: file, wnid and a box per line, separated by tabs."""
    index = {name: label for label, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    annotations = path / ANNOTATIONS
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
    return FileImages(tuple(paths), np.array(labels, np.int64), classes, path)
