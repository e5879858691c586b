"""A kind of data: ``images.npz`` with classes, ``train_images`` (N, H, W, 3) uint8, ``train_labels`` (N,), and val."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typing_extensions import override

from mixmask.engine.array_images import ArrayImages
from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError

FILE = "images.npz"


class Npz(DataKind):
    """Images in one NumPy file."""

    kind = "npz"

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return (root / FILE).is_file()

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> ArrayImages:
        split = data.train if part == "train" else data.test
        with np.load(root / FILE, allow_pickle=False) as file:
            if f"{split}_images" not in file:
                raise DataError(f"{root / FILE}: no array {split}_images; it has {', '.join(file)}")
            pixels = np.ascontiguousarray(file[f"{split}_images"].transpose(0, 3, 1, 2))
            labels = file[f"{split}_labels"].astype(np.int64)
            classes = tuple(map(str, file["classes"]))
        paths = tuple(Path(f"{split}-{number:06d}") for number in range(len(labels)))
        return ArrayImages(paths, labels, classes, root / FILE / str(split), pixels)

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        return None if data.test is None else f"{root / FILE} has a test part: data.holdout=0 uses it"

    @override
    def splits(self, root: Path) -> list[str]:
        return ["train", "val"] if self.recognises(root, DataRecipe(name="x", root=str(root))) else []
