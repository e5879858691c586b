"""Text files that list images, one path to a line, with or without a class."""

from __future__ import annotations

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.data.folder import holds_class_folders
from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError, listed
from mixmask.engine.images import FileImages
from mixmask.engine.texts import read_text

ENDINGS = (".txt", ".lst", ".list", ".txt.gz")
NUMBERED = re.compile(r"(.*\S)[ ](\d+)")  # "n01440764/n01440764_18.JPEG 0", as Caffe and many after it have it


class Lists(DataKind):
    """``data.root`` is a list itself, or a folder with the lists that ``data.train`` and ``data.test`` name.

    A line is a path, relative to the list or absolute. A class may follow after a tab. In a list whose every line ends in
    a space and a number, the numbers are the classes. Other lists have no labels.
    """

    kind: ClassVar[str] = "list"

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return _is_list(root) or (_is_list(root / data.train) and not holds_class_folders(root, data))

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> FileImages:
        if _is_list(root):
            if part == "test":
                raise DataError(
                    f"{root}: one list, and no split to test on: data.holdout=0.2 keeps a fifth of every class, or let "
                    f"data.root be the folder and data.train and data.test the names of two lists in it"
                )
            return listed_images(root)
        if not root.is_dir():
            raise DataError(f"{root}: not a list of images ({', '.join(ENDINGS)})")
        name = data.train if part == "train" else str(data.test)
        if not _is_list(root / name):
            there = sorted(path.name for path in root.iterdir() if _is_list(path))
            raise DataError(f"{root / name}: no such list (data.{part}); lists there: {', '.join(there[:10])}")
        return listed_images(root / name)

    @override
    def splits(self, root: Path) -> list[str]:
        return ["."] if _is_list(root) else []

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        if _is_list(root) or data.test is None or not _is_list(root / data.test):
            return None
        return f"{root / data.test}: is there, so data.holdout is not needed: leave it out"


def _is_list(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS) and path.is_file()


def listed_images(file: Path) -> FileImages:
    """The images of a list, in its order.

    Raises:
        DataError: If the list is empty, repeats a path, or names files that are missing; or if only some lines have a
            class.
    """
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{file}: empty; one path to a line was expected")
    names, classes = _fields(file, lines)
    paths = [Path(os.path.normpath(file.parent / name)) for name in names]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(
            *listed(
                [
                    f"{file}: {len(twice):,} paths stand there more than once; leave each once:",
                    *(f"  {path}" for path in twice),
                ],
                4,
            )
        )
    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(os.path.isfile, paths, chunksize=256)]
    missing = [path for path, there in zip(paths, found, strict=True) if not there]
    if missing:
        where = "paths are relative to the list's folder"
        if len(missing) == len(paths) and not classes:
            where += "; a class follows after a tab"
        raise DataError(
            *listed(
                [
                    f"{file}: {len(missing):,} of its {len(paths):,} files do not exist ({where}):",
                    *(f"  {path}" for path in missing),
                ],
                4,
            )
        )
    order = {name: label for label, name in enumerate(sorted({*classes}))}
    labels = np.array([order[name] for name in classes] or [0] * len(paths), np.int64)
    return FileImages(tuple(paths), labels, tuple(order), file)


def _fields(file: Path, lines: list[str]) -> tuple[list[str], list[str]]:
    """The path of every line, and its class; no classes if the list has none."""
    tabs = [line.split("\t") for line in lines]
    if any(len(fields) > 1 for fields in tabs):
        wrong = next(
            (n for n, fields in enumerate(tabs, 1) if len(fields) != 2 or not all(map(str.strip, fields))), None
        )
        if wrong is not None:
            raise DataError(
                f"{file}, line {wrong} (of those that are not empty): 'path<TAB>class' was expected, as in other lines; "
                f"got {lines[wrong - 1]!r}"
            )
        return [fields[0].strip() for fields in tabs], [fields[1].strip() for fields in tabs]
    numbered = [NUMBERED.fullmatch(line.strip()) for line in lines]
    if all(numbered):
        found = [match.groups() for match in numbered if match is not None]
        return [path for path, _ in found], [number for _, number in found]
    return [line.strip() for line in lines], []
