"""CUB-200-2011 (Wah et al., 2011): official training and test split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages


class Cub200(BenchmarkSet):
    """``images.txt`` numbers the images, ``train_test_split.txt`` says of each number whether it is for training."""

    kind: ClassVar[str] = "cub200"
    title: ClassVar[str] = "CUB-200-2011"
    sign: ClassVar[str] = "train_test_split.txt"
    inner: ClassVar[tuple[str, ...]] = ("CUB_200_2011",)

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        names = dict(self.lines(home / "images.txt", 2))
        wanted = "1" if part == "train" else "0"
        numbers = [number for number, split in self.lines(home / "train_test_split.txt", 2) if split == wanted]
        strange = next((number for number in numbers if number not in names), None)
        if strange is not None:
            raise DataError(f"{home / 'images.txt'}: image {strange} of train_test_split.txt is not in it")
        listed = [names[number] for number in numbers]
        classes = {name.split("/")[0] for name in names.values()}
        return self.images(home, [(home / "images" / one, one.split("/")[0]) for one in listed], [*classes])
