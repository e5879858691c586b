"""FGVC Aircraft (Maji et al., 2013), variants: official training, validation and test split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.images import FileImages


class FgvcAircraft(BenchmarkSet):
    """``images_variant_trainval.txt`` (and ``train``, ``val``, ``test``) lists image numbers and variants."""

    kind: ClassVar[str] = "fgvc_aircraft"
    title: ClassVar[str] = "FGVC Aircraft"
    sign: ClassVar[str] = "images_variant_trainval.txt"
    inner: ClassVar[tuple[str, ...]] = ("fgvc-aircraft-2013b/data", "data")

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        listed = list(self.lines(home / f"images_variant_{'trainval' if part == 'train' else 'test'}.txt", 2))
        classes = [line[0] for line in self.lines(home / "variants.txt")]
        held = None
        if part == "train":
            kept = {line[0] for line in self.lines(home / "images_variant_val.txt", 2)}
            held = [number in kept for number, _ in listed]
        return self.images(home, [(home / "images" / f"{number}.jpg", name) for number, name in listed], classes, held)
