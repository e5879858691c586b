"""SUN397 (Xiao et al., 2010): the first of the ten official partitions, 50 training and 50 test images per class."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.images import FileImages


class Sun397(BenchmarkSet):
    """``Training_01.txt`` and ``Testing_01.txt`` (from Partitions.zip) lie beside the images or in ``Partitions/``."""

    kind: ClassVar[str] = "sun397"
    title: ClassVar[str] = "SUN397"
    sign: ClassVar[str] = "ClassName.txt"
    inner: ClassVar[tuple[str, ...]] = ("SUN397",)

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        name = "Training_01.txt" if part == "train" else "Testing_01.txt"
        file = next((place / name for place in (home, home / "Partitions") if (place / name).is_file()), home / name)
        classes = [line[0].strip("/") for line in self.lines(home / "ClassName.txt")]
        listed = [line[0].strip("/") for line in self.lines(file)]
        return self.images(home, [(home / one, one.rpartition("/")[0]) for one in listed], classes)
