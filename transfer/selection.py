"""Held-out training images, on which hyperparameters are chosen; test images never are."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from mixmask.engine.errors import DataError
from mixmask.engine.images import ImageSet
from mixmask.engine.permutations import Permutations, draw_per_class
from mixmask.engine.randomness import derived_seed

Places = npt.NDArray[np.int64]


@overload
def split_for_choice(
    train: ImageSet, share: float, seed: int, rows: Literal[False] = False
) -> tuple[ImageSet, ImageSet]: ...


@overload
def split_for_choice(train: ImageSet, share: float, seed: int, rows: Literal[True]) -> tuple[Places, Places]: ...


def split_for_choice(train: ImageSet, share: float, seed: int, rows: bool = False) -> Any:
    """What hyperparameters are tried on, and the held-out images they are judged by.

    The official validation split, where the data set has one; else the share ``share`` of every class, at least one image
    and never all of them. Of multi-label images, the share of all images.

    Args:
        train: The training images.
        share: In (0, 1).
        seed: Of the draw.
        rows: Give (N,) indices into the training images instead of images.
    """
    held = train.validation
    if held is None:
        single = train.targets.ndim == 1  # images with several labels are drawn as one class
        held = draw_per_class(
            train.targets if single else np.zeros(len(train), np.int64),
            len(train.classes) if single else 1,
            lambda _, size: max(0, min(max(1, round(size * share)), size - 1)),
            Permutations(derived_seed(seed, "held out")),
        )
    learnt, kept = np.flatnonzero(~held), np.flatnonzero(held)
    return (learnt, kept) if rows else (train.subset(learnt.tolist()), train.subset(kept.tolist()))


def require_held_out(train: ImageSet, share: float, seed: int) -> None:
    """Refuse data of which nothing can be held out.

    Raises:
        DataError: If the held-out part, or what is left without it, is empty.
    """
    learnt, kept = split_for_choice(train, share, seed, rows=True)
    if not len(kept) or not len(learnt):
        which = "the held-out part" if not len(kept) else "what is left without the held-out part"
        raise DataError(
            f"{train.root}: {which} of the {len(train)} training images is empty, and hyperparameters are chosen on it; "
            f"give more images per class, or single values"
        )
