"""Describable Textures (Cimpoi et al., 2014): the first of the ten official partitions."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.images import FileImages


class Dtd(BenchmarkSet):
    """``labels/train1.txt``, ``val1.txt`` and ``test1.txt`` list files below ``images/``, whose folders are the classes."""

    kind: ClassVar[str] = "dtd"
    title: ClassVar[str] = "DTD"
    sign: ClassVar[str] = "labels/train1.txt"
    inner: ClassVar[tuple[str, ...]] = ("dtd/dtd", "dtd")

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        found = {
            name: [line[0] for line in self.lines(home / "labels" / f"{name}1.txt")]
            for name in ("train", "val", "test")
        }
        listed = found["train"] + found["val"] if part == "train" else found["test"]
        held = [False] * len(found["train"]) + [True] * len(found["val"]) if part == "train" else None
        classes = {one.split("/")[0] for names in found.values() for one in names}
        return self.images(home, [(home / "images" / one, one.split("/")[0]) for one in listed], [*classes], held)
