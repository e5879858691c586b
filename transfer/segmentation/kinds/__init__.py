"""Layouts of segmentation data, one module each. A module added here is found, and opens the roots it recognises."""

from __future__ import annotations

from pathlib import Path

from mixmask.engine.errors import DataError
from mixmask.engine.registry import Registry
from mixmask.transfer.segmentation.dataset import SegmentationKind, SegmentationSet, require_files
from mixmask.transfer.segmentation.recipe import SegmentationData

KINDS: Registry[SegmentationKind] = Registry(
    SegmentationKind,
    __name__,
    "mixmask.segmentation",
    "segmentation layout",
    lambda one: [one.kind] if "kind" in vars(one) else [],
)


def kind_of(root: Path, data: SegmentationData) -> SegmentationKind:
    """The layout of the data in ``root``.

    Raises:
        DataError: If none or several recognise it.
        ConfigError: If ``data.layout`` names none that exists.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder (data.root of '{data.name}')")
    if data.layout is not None:
        return KINDS.get(data.layout, "data.layout")()
    every = [one() for one in KINDS.classes()]
    found = [one for general in (False, True) for one in every if one.general == general and one.recognises(root)]
    if not found:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{root}: neither a VOCdevkit (VOC2012), nor Cityscapes (leftImg8bit, gtFine), nor images/SPLIT with "
            f"annotations/SPLIT; it holds {there}"
        )
    specific = [one for one in found if not one.general]
    if len(specific) > 1:
        names = [one.kind for one in specific]
        raise DataError(f"{root}: looks like {' and like '.join(names)}; data.layout={names[0]} says which it is")
    return found[0]


def open_segmentation(data: SegmentationData) -> tuple[SegmentationSet, SegmentationSet]:
    """List the training and the test images.

    Raises:
        DataError: If files are missing, or an image is in both.
    """
    root = Path(data.root).expanduser()
    kind = kind_of(root, data)
    classes = kind.classes(root)
    sets = []
    for splits in (data.train, data.test):
        pairs = [pair for split in splits for pair in require_files(kind.open(root, data, split), f"{root}, {split}")]
        keys = [pair.key for pair in pairs]
        if len({*keys}) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{root}: {twice} is listed twice in {', '.join(splits)}; list every split once")
        sets.append(SegmentationSet(root, tuple(pairs), classes, kind.read))
    both = {one.image.resolve() for one in sets[0].images} & {one.image.resolve() for one in sets[1].images}
    if both and not data.allow_overlap:
        raise DataError(
            f"{min(both)}: is both a training and a test image, as are {len(both) - 1} more: a score on it would mean "
            f"nothing. data.allow_overlap=true allows it"
        )
    return sets[0], sets[1]
