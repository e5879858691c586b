"""Food-101 (Bossard et al., 2014): official training and test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages
from mixmask.engine.texts import read_text


class Food101(BenchmarkSet):
    """``meta/train.json`` and ``test.json`` map classes to lists of names in ``images/``."""

    kind: ClassVar[str] = "food101"
    title: ClassVar[str] = "Food-101"
    sign: ClassVar[str] = "meta/train.json"
    inner: ClassVar[tuple[str, ...]] = ("food-101",)

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        file = home / "meta" / f"{part}.json"
        if not file.is_file():
            raise DataError(f"{file}: missing; it is part of {self.title}")
        try:
            listed = json.loads(read_text(file))
            pairs = [(home / "images" / f"{name}.jpg", label) for label, names in listed.items() for name in names]
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise DataError(f"{file}: classes with lists of image names were expected") from None
        return self.images(home, pairs, [*listed])
