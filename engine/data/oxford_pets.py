"""Oxford-IIIT Pets (Parkhi et al., 2012): official trainval and test split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.images import FileImages


class OxfordPets(BenchmarkSet):
    """``annotations/trainval.txt`` and ``test.txt`` list the images; the breed is the file name without its number."""

    kind: ClassVar[str] = "oxford_pets"
    title: ClassVar[str] = "Oxford-IIIT Pets"
    sign: ClassVar[str] = "annotations/trainval.txt"
    inner: ClassVar[tuple[str, ...]] = ("oxford-iiit-pet",)

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        found = {
            name: [line[0] for line in self.lines(home / "annotations" / f"{name}.txt", 2, split_all=True)]
            for name in ("trainval", "test")
        }
        classes = {one.rpartition("_")[0] for names in found.values() for one in names}
        listed = found["trainval" if part == "train" else "test"]
        return self.images(
            home, [(home / "images" / f"{one}.jpg", one.rpartition("_")[0]) for one in listed], [*classes]
        )
