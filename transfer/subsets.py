"""Which labelled images a semi-supervised run may see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mixmask.engine.errors import DataError
from mixmask.engine.images import ImageSet
from mixmask.engine.permutations import Permutations
from mixmask.engine.randomness import derived_seed
from mixmask.engine.texts import read_text


def balanced_subset(images: ImageSet, percent: float, seed: int) -> ImageSet:
    """Draw the same share of every class, at least one image each.

    With the same seed, a smaller share is a subset of a larger one.

    Args:
        images: The full training set.
        percent: Share in percent, in (0, 100].
        seed: Shuffles the images of each class; a share takes the first of them.
    """
    chosen: list[int] = []
    for label in range(len(images.classes)):
        members = np.flatnonzero(images.targets == label)
        order = Permutations(derived_seed(seed, "subset", label)).next(len(members))
        # Half up: round() would take halves to the even number.
        count = max(1, math.floor(len(members) * percent / 100 + 0.5))
        chosen += members[order[:count]].tolist()
    return images.subset(sorted(chosen))


def listed_subset(images: ImageSet, listing: Path) -> ImageSet:
    """Read a list of labelled images: one file name per line, as in SimCLR's ``1percent.txt`` (``.gz`` works, too).

    Raises:
        DataError: If the list is missing, empty or not readable, names files that the data set does not have, or
            if file names repeat in the data set, so that a name is ambiguous.
    """
    if not listing.is_file():
        raise DataError(f"{listing}: no such list of labelled images")
    names = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
    if not names:
        raise DataError(f"{listing}: empty")
    # SimCLR's lists hold bare file names, which are unique in ImageNet but not in every data set.
    where = {path.name: index for index, path in enumerate(images.paths)}
    if len(where) < len(images):
        raise DataError(f"{listing}: cannot be used with {images.root}, where one file name stands in several classes")
    absent = [name for name in names if name not in where]
    if absent:
        raise DataError(
            f"{listing}: names {len(absent)} of {len(names)} files that {images.root} does not have, "
            f"for example {', '.join(absent[:3])}"
        )
    return images.subset([where[name] for name in names])
