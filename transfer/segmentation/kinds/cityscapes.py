"""Cityscapes (Cordts et al., 2016), fine annotations: leftImg8bit and gtFine with label ids."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.errors import DataError
from mixmask.transfer.segmentation.dataset import IGNORED, Labelled, Labels, SegmentationKind, mapped, read_indices
from mixmask.transfer.segmentation.recipe import SegmentationData

# Label ids of the 19 evaluated classes, in the order of their training ids (cityscapesScripts, helpers/labels.py).
IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
TABLE = {
    **dict.fromkeys((*range(34), IGNORED), IGNORED),  # 255 is the id -1, a licence plate
    **{number: label for label, number in enumerate(IDS)},
}


class Cityscapes(SegmentationKind):
    """Files ``leftImg8bit/SPLIT/CITY/x_leftImg8bit.png`` and ``gtFine/SPLIT/CITY/x_gtFine_labelIds.png``."""

    kind: ClassVar[str] = "cityscapes"

    @override
    def recognises(self, root: Path) -> bool:
        return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()

    @override
    def classes(self, root: Path) -> tuple[str, ...]:
        return tuple(IDS.values())

    @override
    def open(self, root: Path, data: SegmentationData, split: str) -> list[Labelled]:
        folder = root / "leftImg8bit" / split
        if not folder.is_dir():
            there = sorted(path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir())
            raise DataError(f"{folder}: no such split; there are {', '.join(there) or 'none'}")
        pairs = []
        for path in sorted(folder.glob("*/*_leftImg8bit.png")):
            name = path.name.removesuffix("_leftImg8bit.png")
            labels = root / "gtFine" / split / path.parent.name / f"{name}_gtFine_labelIds.png"
            pairs.append(Labelled(f"{split}/{name}", path, labels))
        return pairs

    @override
    def read(self, path: Path) -> Labels:
        return mapped(read_indices(path), TABLE, path)
