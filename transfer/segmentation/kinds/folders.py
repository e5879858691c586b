"""Images and label maps of the same names in two folders: the layout of one's own data."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.errors import DataError
from mixmask.engine.texts import read_text
from mixmask.transfer.segmentation.dataset import Labelled, SegmentationKind
from mixmask.transfer.segmentation.recipe import SegmentationData

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class LabelFolders(SegmentationKind):
    """``images/SPLIT/x.jpg`` and ``annotations/SPLIT/x.png``; ``classes.txt`` has one class name per line, class 0 first."""

    kind: ClassVar[str] = "folders"
    general: ClassVar[bool] = True

    @override
    def recognises(self, root: Path) -> bool:
        return (root / "images").is_dir() and (root / "annotations").is_dir()

    @override
    def classes(self, root: Path) -> tuple[str, ...]:
        file = root / "classes.txt"
        if not file.is_file():
            raise DataError(f"{file}: no such file; it names the classes, one per line, the class of label 0 first")
        names = tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
        if not 2 <= len(names) <= 255 or len({*names}) < len(names):
            raise DataError(f"{file}: names {len(names)} classes; 2 to 255 different ones are valid")
        return names

    @override
    def open(self, root: Path, data: SegmentationData, split: str) -> list[Labelled]:
        folder, maps = root / "images" / split, root / "annotations" / split
        for one in (folder, maps):
            if not one.is_dir():
                there = sorted(path.name for path in one.parent.glob("*") if path.is_dir())
                raise DataError(f"{one}: no such split; there are {', '.join(there) or 'none'}")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = [(path.relative_to(folder).with_suffix(""), path) for path in files]
        return [Labelled(f"{split}/{key}", path, maps / key.with_name(f"{key.name}.png")) for key, path in found]
