"""Caltech-101 (Fei-Fei et al., 2004): 30 training images of every class, the others for testing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.data.folder import class_folders, image_folder
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages
from mixmask.engine.permutations import Permutations, draw_per_class

BACKGROUND = "BACKGROUND_Google"  # pictures of anything; torchvision leaves it out, too
PER_CLASS = 30


class Caltech101(BenchmarkSet):
    """There is no official split. As is usual, 30 images per class are for training, drawn with ``data.holdout_seed``."""

    kind: ClassVar[str] = "caltech101"
    title: ClassVar[str] = "Caltech-101"
    sign: ClassVar[str] = "101_ObjectCategories"
    inner: ClassVar[tuple[str, ...]] = ("caltech101", "caltech-101")

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        folder = home / self.sign
        classes = [name for name in class_folders(folder) if name != BACKGROUND]
        whole = image_folder(folder)
        pairs = [(path, path.parent.name) for path in whole.paths if path.parent.name != BACKGROUND]
        images = self.images(folder, pairs, classes)
        permutations = Permutations(data.holdout_seed)

        def count(label: int, size: int) -> int:
            if size <= PER_CLASS:
                raise DataError(
                    f"{folder / images.classes[label]}: {size} images; {PER_CLASS} are for training, and none is left to "
                    f"test on"
                )
            return PER_CLASS

        drawn = draw_per_class(images.targets, len(images.classes), count, permutations)
        return images.subset(
            np.flatnonzero(drawn if part == "train" else ~drawn).tolist(),
            folder / f"({part}, {PER_CLASS} per class for training)",
        )
