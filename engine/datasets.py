"""Which images a recipe names, and what a kind of data on disk is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mixmask.engine.config import Recipe, added, operational
from mixmask.engine.errors import DataError
from mixmask.engine.images import ImageSet

# How many classes the data sets of these names have, which published numbers hold for.
KNOWN_CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet100": 100, "imagenet1k": 1000}
Part = Literal["train", "test"]


class DataRecipe(Recipe):
    """Which images.

    ``name`` identifies the data set in fingerprints and tables; ``root`` only says where it lies on this machine. There,
    ``train`` and ``test`` are folders with one sub-folder per class, unless another kind of data (`engine.data`) recognises
    what lies there: Tiny-ImageNet's own layout, CIFAR's published archives. ``layout`` names the
    kind where two do.
    ``storage: stream`` decodes in worker processes at every epoch; ``storage: resident`` decodes a small data set once
    and keeps it on the device (all images must have one size).

    A root that itself holds the class folders is read as its only split. ``holdout`` is the part of every class that makes
    the test split where the data have none, drawn with ``holdout_seed``; the rest is the training split. ``allow_overlap``
    lets images be trained and tested on.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    root: str = operational(..., min_length=1)
    train: str = "train"
    test: str | None = "val"
    storage: Literal["stream", "resident"] = "stream"
    num_workers: int = operational(4, ge=0)
    holdout: float = added(0.0, ge=0, lt=1)
    holdout_seed: int = added(0, ge=0, lt=1 << 63)
    allow_overlap: bool = added(False)
    layout: str | None = operational(None)

    @model_validator(mode="after")
    def _splits_differ(self) -> DataRecipe:
        if self.train == self.test and not self.holdout and not self.allow_overlap:
            raise ValueError(
                f"train and test are the same folder '{self.train}': a score on it would mean nothing; "
                f"allow_overlap: true allows it"
            )
        return self


OpenImages = Callable[[DataRecipe, Part], ImageSet]


class DataKind(ABC):
    """A way in which labelled images lie on disk.

    A kind is a class derived from this one, in a file of its own in ``engine/data/``. It is found by being there, and opens
    every root that it recognises.
    """

    kind: ClassVar[str]  # its name
    general: ClassVar[bool] = False  # takes what no other kind recognises

    @abstractmethod
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        """Whether ``root``, which exists, is of this kind; reads next to nothing."""

    @abstractmethod
    def open(self, root: Path, data: DataRecipe, part: Part) -> ImageSet:
        """List the images of one part.

        Raises:
            DataError: If something is missing or damaged; with the file.
        """

    def splits(self, root: Path) -> list[str]:
        """The names of the splits that lie in ``root``, for ``mixmask check-data``; none if it is not of this kind."""
        return []

    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        """Why ``data.holdout`` is not needed: a sentence, if there is a test part; else None."""
        return None


def require_same_classes(train: ImageSet, test: ImageSet, allow_overlap: bool = False) -> None:
    """Refuse a test split whose class folders differ from the training split's, or that is the same folder by another name.

    Raises:
        DataError: With the classes that only one of them has, or the folder.
    """
    if not allow_overlap and train.array() is None and test.root.resolve() == train.root.resolve():
        raise DataError(
            f"{train.root} and {test.root} are the same folder: a score on it would mean nothing. data.allow_overlap=true "
            f"allows it"
        )
    both = {*train.paths} & {*test.paths} if train.array() is None and not allow_overlap else set()
    if both:
        raise DataError(
            f"{min(both)}: is both a training and a test image, as are {len(both) - 1:,} more: a score on them would mean "
            f"nothing. data.allow_overlap=true allows it"
        )
    if train.classes != test.classes:
        only_train = sorted(set(train.classes) - set(test.classes))[:5]
        only_test = sorted(set(test.classes) - set(train.classes))[:5]
        raise DataError(
            f"{train.root} and {test.root} have different classes: only in the first {only_train}, "
            f"only in the second {only_test}"
        )


def other_classes(name: str, num_classes: int) -> str:
    """What must be said beside an expectation for a data set that has another number of classes than its name says."""
    known = KNOWN_CLASSES.get(name)
    if known is None or known == num_classes:
        return ""
    return f" — holds for the {known:,} classes of {name}; these data have {num_classes:,}, give them another data.name"
