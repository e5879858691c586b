"""iNaturalist 2018 (Van Horn et al., 2018): official training and validation split; tests are on the latter."""

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


class INaturalist2018(BenchmarkSet):
    """``train2018.json`` and ``val2018.json`` list images, categories and annotations, as COCO's files do."""

    kind: ClassVar[str] = "inaturalist2018"
    title: ClassVar[str] = "iNaturalist 2018"
    sign: ClassVar[str] = "train2018.json"

    @override
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        file = home / ("train2018.json" if part == "train" else "val2018.json")
        if not file.is_file():
            raise DataError(f"{file}: missing; it is part of {self.title}")
        try:
            listed = json.loads(read_text(file))
            # Categories are numbered with zeros in front, so that the order of classes is that of the numbers.
            classes = {one["id"]: f"{int(one['id']):05d}" for one in listed["categories"]}
            files = {one["id"]: str(one["file_name"]) for one in listed["images"]}
            pairs = [(home / files[one["image_id"]], classes[one["category_id"]]) for one in listed["annotations"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{file}: images, categories and annotations were expected ({type(error).__name__}: {error})"
            ) from None
        return self.images(home, pairs, [*classes.values()])
