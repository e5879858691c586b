"""Images on disk, one module per layout. A module added here is found, and opens the roots it recognises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import Images, ImageSet
from mixmask.engine.joined import JoinedImages
from mixmask.engine.permutations import Permutations, draw_per_class
from mixmask.engine.registry import Registry
from mixmask.engine.texts import read_text
from mixmask.engine.wording import closest_first

KINDS: Registry[DataKind] = Registry(
    DataKind, __name__, "mixmask.data", "kind of data", lambda one: [one.kind] if "kind" in vars(one) else []
)


def open_split(data: DataRecipe, part: Part) -> ImageSet:
    """Open the training or the test part of a data set.

    Raises:
        DataError: If it is missing, empty or damaged, or no kind of data recognises it.
        ConfigError: If ``data.layout`` names none that exists.
    """
    images = _held_out(data, part) if data.holdout else _opened(data, part)
    if data.levels is not None:
        images = images.with_decoding(levels=data.levels)
    return images


def _opened(data: DataRecipe, part: Part) -> Images:
    """One part of the data, from all its roots."""
    roots = _roots(data)
    if part == "test" and data.test is None:
        raise DataError(
            f"the data set '{data.name}' has no test split: set data.test to a folder of {roots[0]}, or "
            f"data.holdout=0.2 to keep a fifth of every class for testing"
        )
    kinds = [(kind_of(root, data), root) for root in roots]
    for key in ("image_column", "label_column"):
        if getattr(data, key) is not None and not any(kind.has_columns for kind, _ in kinds):
            kind, root = kinds[0]
            raise DataError(
                f"{root}: has no columns (data.layout: {kind.kind}), so data.{key}={getattr(data, key)} names nothing; "
                f"leave it out"
            )
    if part == "test" and len(kinds) > 1:  # further roots may hold training images only
        kinds = [one for one in kinds if one[0].has_test(one[1], data) is not None] or kinds[:1]
    opened = [kind.open(root, data, part) for kind, root in kinds]
    if not data.labels:
        opened = [images.without_labels() for images in opened]
    images = opened[0] if len(opened) == 1 else JoinedImages.of(opened)
    return images if data.class_list is None else _of_classes(images, Path(data.class_list).expanduser())


def _roots(data: DataRecipe) -> list[Path]:
    roots = [Path(root).expanduser() for root in data.roots]
    for root in roots:
        if not root.exists():
            raise DataError(
                f"{root}: no such data folder; give the place of '{data.name}' with data.root=PATH, or in a suite "
                f"with data.{data.name}=PATH"
            )
    return roots


def kind_of(root: Path, data: DataRecipe) -> DataKind:
    """The layout of the data in ``root``; plain class folders if no other layout recognises it.

    Raises:
        DataError: If two layouts recognise it; set ``data.layout`` to choose.
        ConfigError: If ``data.layout`` names none that exists.
    """
    if data.layout is not None:
        return KINDS.get(data.layout, "data.layout")()
    every = [one() for one in KINDS.classes()]
    found = [one for one in every if not one.general and one.recognises(root, data)]
    if len(found) > 1:
        names = [one.kind for one in found]
        raise DataError(f"{root}: looks like {' and like '.join(names)}; data.layout={names[0]} says which it is")
    return found[0] if found else next(one for one in every if one.general)


def _of_classes(images: Images, file: Path) -> Images:
    """The images of the classes that a text file lists, one to a line."""
    if not file.is_file():
        raise DataError(f"{file}: no such file (data.class_list: a text file with one class folder to a line)")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    names = [*dict.fromkeys(line if line in images.classes else line.split()[0] for line in lines)]
    unknown = [name for name in names if name not in images.classes]
    if unknown or not names:
        problem = (
            f"{len(unknown)} of its classes {'are' if len(unknown) > 1 else 'is'} not in {images.root}: "
            f"{', '.join(unknown[:3])}; there are {', '.join(closest_first(unknown[0], images.classes)[:5])} …"
            if names
            else "empty"
        )
        raise DataError(f"{file}: {problem} (data.class_list: one class per line)")
    if images.targets.ndim == 2:
        raise DataError(
            f"data.class_list: the images of {images.root} have several labels each; classes cannot be chosen"
        )
    classes = tuple(sorted(names))
    place = np.full(len(images.classes), -1, np.int64)
    for label, name in enumerate(classes):
        place[images.classes.index(name)] = label
    chosen = images.subset(np.flatnonzero(place[images.targets] >= 0).tolist())
    return replace(chosen, targets=place[chosen.targets], classes=classes)


def _held_out(data: DataRecipe, part: Part) -> Images:
    """The held-out share of every class of the training images (``test``), or the remaining images (``train``)."""
    for root in _roots(data):
        reason = kind_of(root, data).has_test(root, data)
        if reason is not None:
            raise DataError(reason)
    images = _opened(data, "train")
    if not images.classes:
        raise DataError(
            f"{images.root}: its images have no labels; data.holdout keeps a share of every class for testing"
        )
    if images.targets.ndim == 2:
        raise DataError(
            f"{images.root}: its images have several labels each, so no share of every class can be held out"
        )
    # Both parts repeat the same draws, so they share no image. The seed is not the run's: all runs share a test split.
    permutations = Permutations(data.holdout_seed)

    def count(label: int, size: int) -> int:
        num = max(1, round(size * data.holdout))
        if num >= size:
            raise DataError(
                f"{images.root}: class '{images.classes[label]}' has {size} images; data.holdout={data.holdout:g} would "
                f"leave none to train on"
            )
        return num

    held = draw_per_class(images.targets, len(images.classes), count, permutations)
    which = f"({'held out' if part == 'test' else 'not held out'}: {data.holdout:g})"
    return images.subset(np.flatnonzero(held if part == "test" else ~held).tolist(), images.root / which)
