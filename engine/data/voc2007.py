"""PASCAL VOC 2007 as a multi-label classification data set: official training, validation and test split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages

VALUES = {"1": 1, "-1": 0, "0": -1}  # present, absent, and only as a difficult object: it does not count


class Voc2007(BenchmarkSet):
    """``ImageSets/Main/<class>_trainval.txt`` and ``_test.txt`` say of every image whether the class is present."""

    kind: ClassVar[str] = "voc2007"
    title: ClassVar[str] = "VOC 2007"
    sign: ClassVar[str] = "ImageSets/Main/aeroplane_trainval.txt"
    inner: ClassVar[tuple[str, ...]] = ("VOCdevkit/VOC2007", "VOC2007")

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        lists, split = home / "ImageSets" / "Main", "trainval" if part == "train" else "test"
        names = [line[0] for line in self.lines(lists / f"{split}.txt")]
        classes = sorted(file.name.removesuffix("_trainval.txt") for file in lists.glob("*_trainval.txt"))
        columns = [self._column(lists / f"{name}_{split}.txt", names) for name in classes]
        held = None
        if part == "train":
            kept = {line[0] for line in self.lines(lists / "val.txt")}
            held = np.array([name in kept for name in names])
        labels = np.ascontiguousarray(np.array(columns, np.int8).T)
        paths = tuple(home / "JPEGImages" / f"{name}.jpg" for name in names)
        return FileImages(paths, labels, tuple(classes), home, validation=held)

    def _column(self, file: Path, names: list[str]) -> list[int]:
        """What one class's list says of every image."""
        found = {line[0]: line[1] for line in self.lines(file, 2)}
        wrong = next((name for name in names if found.get(name) not in VALUES), None)
        if wrong is not None:
            raise DataError(f"{file}: image {wrong} has {found.get(wrong, 'no value')}; valid: {', '.join(VALUES)}")
        return [VALUES[found[name]] for name in names]
