"""Places205 and Places365 (Zhou et al., 2014 and 2017): official training and validation split; tests are on the latter."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages


class Places365(BenchmarkSet):
    """Places365-Standard, large or small (256 × 256): ``places365_train_standard.txt`` and ``places365_val.txt``."""

    kind: ClassVar[str] = "places365"
    title: ClassVar[str] = "Places365"
    sign: ClassVar[str] = "places365_train_standard.txt"
    inner: ClassVar[tuple[str, ...]] = ("places365_standard",)

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        classes = {number: name.strip("/") for name, number in self.lines(home / "categories_places365.txt", 2)}
        sizes = (("data_large_standard", "val_large"), ("data_256_standard", "val_256"))
        whole = [pair for pair in sizes if all((home / one).is_dir() for one in pair)]
        if not whole:
            raise DataError(f"{home}: no folders with the images: {' or '.join(' and '.join(pair) for pair in sizes)}")
        folder = home / whole[0][0 if part == "train" else 1]
        file = home / ("places365_train_standard.txt" if part == "train" else "places365_val.txt")
        listed = [(folder / name.strip("/"), classes.get(number, number)) for name, number in self.lines(file, 2)]
        return self.images(home, listed, [*classes.values()])


class Places205(BenchmarkSet):
    """``train_places205.csv`` and ``val_places205.csv`` list files, whose folders are the classes."""

    kind: ClassVar[str] = "places205"
    title: ClassVar[str] = "Places205"
    sign: ClassVar[str] = "trainvalsplit_places205/train_places205.csv"
    inner: ClassVar[tuple[str, ...]] = ("places205",)

    IMAGES: ClassVar[tuple[str, ...]] = ("data/vision/torralba/deeplearning/images256", "images256", ".")

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        lists = home / "trainvalsplit_places205"
        found = {
            name: [line[0] for line in self.lines(lists / f"{name}_places205.csv", 2)] for name in ("train", "val")
        }
        folder = next(home / one for one in self.IMAGES if (home / one).is_dir())
        classes = {one.rpartition("/")[0] for one in found["train"]}
        listed = found["train" if part == "train" else "val"]
        return self.images(home, [(folder / one, one.rpartition("/")[0]) for one in listed], [*classes])
