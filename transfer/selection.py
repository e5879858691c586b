"""Held-out training images, on which hyperparameters are chosen; test images never are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from mixmask.engine.errors import DataError
from mixmask.engine.images import ImageSet
from mixmask.engine.late import torch
from mixmask.engine.randomness import draw_per_class, generator

if TYPE_CHECKING:
    from torch import Tensor


@overload
def split_for_choice(
    train: ImageSet, share: float, seed: int, rows: Literal[False] = False
) -> tuple[ImageSet, ImageSet]: ...


@overload
def split_for_choice(train: ImageSet, share: float, seed: int, rows: Literal[True]) -> tuple[Tensor, Tensor]: ...


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
        single = train.labels.ndim == 1  # images with several labels are drawn as one class
        held = draw_per_class(
            train.labels if single else torch.zeros(len(train), dtype=torch.int64),
            len(train.classes) if single else 1,
            lambda _, size: max(0, min(max(1, round(size * share)), size - 1)),
            generator(seed, "held out"),
        )
    learnt, kept = (~held).nonzero().flatten(), held.nonzero().flatten()
    return (learnt, kept) if rows else (train.subset(learnt), train.subset(kept))


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
