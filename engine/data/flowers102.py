"""Oxford Flowers-102 (Nilsback and Zisserman, 2008): official training, validation and test split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages


class Flowers102(BenchmarkSet):
    """``imagelabels.mat`` has a class for ``jpg/image_00001.jpg`` and so on, ``setid.mat`` the numbers of each split."""

    kind: ClassVar[str] = "flowers102"
    title: ClassVar[str] = "Flowers-102"
    sign: ClassVar[str] = "setid.mat"
    inner: ClassVar[tuple[str, ...]] = ("flowers-102",)

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        labels = np.atleast_1d(self.matlab(home / "imagelabels.mat", "labels"))
        names = ("trnid", "valid") if part == "train" else ("tstid",)
        numbers = [np.atleast_1d(self.matlab(home / "setid.mat", name)) for name in names]
        try:
            listed = [int(number) for own in numbers for number in own]
            pairs = [(home / "jpg" / f"image_{number:05d}.jpg", f"{int(labels[number - 1]):03d}") for number in listed]
        except (ValueError, IndexError, TypeError) as error:
            raise DataError(f"{home / 'setid.mat'}: does not fit imagelabels.mat ({error})") from None
        held = [False] * len(numbers[0]) + [True] * len(numbers[1]) if part == "train" else None
        return self.images(home, pairs, [f"{int(label):03d}" for label in labels], held)
