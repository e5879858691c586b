"""EuroSAT (Helber et al., 2019): no split of its own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.benchmark_sets import BenchmarkSet
from mixmask.engine.data.folder import image_folder
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages


class EuroSat(BenchmarkSet):
    """The RGB images, a folder per class in ``2750/``; ``data.holdout`` keeps a share of every class for testing."""

    kind: ClassVar[str] = "eurosat"
    title: ClassVar[str] = "EuroSAT"
    sign: ClassVar[str] = "2750"
    inner: ClassVar[tuple[str, ...]] = ("eurosat", "EuroSAT")
    has_official_test: ClassVar[bool] = False

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        if part == "test":
            raise DataError(
                f"{home}: EuroSAT has no test split: data.holdout=0.2 keeps a fifth of every class for testing"
            )
        return image_folder(home / self.sign)
