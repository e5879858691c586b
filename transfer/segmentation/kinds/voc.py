"""PASCAL VOC 2012 (Everingham et al., 2010) and SBD's additional label maps (Hariharan et al., 2011)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.errors import DataError
from mixmask.engine.texts import read_text
from mixmask.transfer.segmentation.dataset import Labelled, Labels, SegmentationKind, read_indices
from mixmask.transfer.segmentation.recipe import SegmentationData

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
AUGMENTED = "train_aug"
MORE = "SegmentationClassAug"  # SBD's maps as PNG, as many copies of the data set have them


class VOC(SegmentationKind):
    """A VOCdevkit. ``2012/train_aug`` is VOC's train and all of SBD that is not in VOC's train or val: 10,582 images."""

    kind: ClassVar[str] = "voc"

    @override
    def recognises(self, root: Path) -> bool:
        return any((folder / "JPEGImages").is_dir() for folder in root.glob("VOC*"))

    @override
    def classes(self, root: Path) -> tuple[str, ...]:
        return CLASSES

    @override
    def open(self, root: Path, data: SegmentationData, split: str) -> list[Labelled]:
        year, _, name = split.partition("/")
        if not name:
            raise DataError(f"{root}: a VOC devkit, whose splits have a year: '{split}' may be 2012/{split}")
        folder = root / f"VOC{year}"
        if name != AUGMENTED:
            return _pairs(folder, _names(folder, name, root), folder / "SegmentationClass", ".png", year)
        own, held = _names(folder, "train", root), _names(folder, "val", root)
        maps, suffix, listed = _more(root, folder, data)
        more = sorted(listed - {*own, *held})
        return _pairs(folder, own, folder / "SegmentationClass", ".png", year) + _pairs(
            folder, more, maps, suffix, year
        )

    @override
    def read(self, path: Path) -> Labels:
        if path.suffix != ".mat":
            return read_indices(path)
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        try:
            content = loadmat(path, simplify_cells=True)["GTcls"]["Segmentation"]
            return np.asarray(content, dtype=np.uint8)
        except (OSError, ValueError, KeyError, TypeError, IndexError, MatReadError) as error:
            raise DataError(f"{path}: not one of SBD's class maps ({type(error).__name__}: {error})") from None


def _names(folder: Path, name: str, root: Path) -> list[str]:
    listing = folder / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not name or not listing.is_file():
        there = sorted(f"{p.parts[-4][3:]}/{p.stem}" for p in root.glob("VOC*/ImageSets/Segmentation/*.txt"))
        lists = (
            f"Splits there: {', '.join(there)}, and 2012/{AUGMENTED}"
            if there
            else "VOC 2012's archive has lists in ImageSets/Segmentation and maps in SegmentationClass; this devkit has none"
        )
        raise DataError(f"{listing}: no such image list (data.root, and the splits data.train and data.test). {lists}")
    names = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
    if not names:
        raise DataError(f"{listing}: empty")
    return names


def _more(root: Path, folder: Path, data: SegmentationData) -> tuple[Path, str, set[str]]:
    """SBD's maps: their folder, their suffix, and the names of all of them."""
    if (folder / MORE).is_dir():
        return folder / MORE, ".png", {path.stem for path in (folder / MORE).glob("*.png")}
    places = [Path(data.sbd).expanduser()] if data.sbd is not None else [root / "benchmark_RELEASE", root / "SBD", root]
    for place in (own for one in places for own in (one, one / "dataset", one / "benchmark_RELEASE" / "dataset")):
        lists = [place / "train.txt", place / "val.txt"]
        if (place / "cls").is_dir() and all(one.is_file() for one in lists):
            names = {line.strip() for one in lists for line in read_text(one).splitlines() if line.strip()}
            return place / "cls", ".mat", names
    raise DataError(
        f"{root}: no SBD, which 2012/{AUGMENTED} needs: neither {folder.name}/{MORE} with PNG files, nor "
        f"benchmark_RELEASE/dataset with cls, train.txt and val.txt "
        f"(looked in {', '.join(map(str, places))}; data.sbd=PATH names another place). data.train=[2012/train] does without"
    )


def _pairs(folder: Path, names: list[str], maps: Path, suffix: str, year: str) -> list[Labelled]:
    return [
        Labelled(f"{year}/{name}", folder / "JPEGImages" / f"{name}.jpg", maps / f"{name}{suffix}") for name in names
    ]
