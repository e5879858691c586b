"""Stanford Cars (Krause et al., 2013): official training and test split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages


class StanfordCars(BenchmarkSet):
    """MATLAB files list the images of ``cars_train/`` and ``cars_test/`` and their classes."""

    kind: ClassVar[str] = "stanford_cars"
    title: ClassVar[str] = "Stanford Cars"
    sign: ClassVar[str] = "devkit/cars_train_annos.mat"
    inner: ClassVar[tuple[str, ...]] = ("stanford_cars",)

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        names = [str(name) for name in np.atleast_1d(self.matlab(home / "devkit" / "cars_meta.mat", "class_names"))]
        file = home / ("devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat")
        listed = np.atleast_1d(self.matlab(file, "annotations"))
        try:
            pairs = [(home / f"cars_{part}" / str(one["fname"]), names[int(one["class"]) - 1]) for one in listed]
        except (ValueError, IndexError, TypeError) as error:
            raise DataError(f"{file}: damaged, or without fname and class of every image ({error})") from None
        return self.images(home, pairs, names)
