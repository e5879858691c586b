"""The data section of a recipe, and the base class for data layouts on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mixmask.engine.config import Recipe, added, operational
from mixmask.engine.errors import DataError
from mixmask.engine.images import Images, ImageSet

# Number of classes of the data sets that published numbers refer to, by data.name.
KNOWN_CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet100": 100, "imagenet1k": 1000,
    "food101": 101, "sun397": 397, "stanford_cars": 196, "fgvc_aircraft": 100, "voc2007": 20, "dtd": 47, "oxford_pets": 37,
    "caltech101": 101, "flowers102": 102, "cub200": 200, "eurosat": 10, "places205": 205, "places365": 365,
    "inaturalist2018": 8142,
}  # fmt: skip
Part = Literal["train", "test"]
Root = Annotated[str, Field(min_length=1)]


class DataRecipe(Recipe):
    """The data set of a recipe.

    ``name`` identifies the data set in fingerprints and tables; ``root`` only says where it is on this machine. By
    default ``train`` and ``test`` are folders in ``root`` with one sub-folder per class. Other layouts (`engine.data`),
    such as Tiny-ImageNet's own and CIFAR's published archives, are recognised automatically. If two layouts match,
    ``layout`` names the one to use.

    ``storage: stream`` decodes in worker processes at every epoch; ``storage: resident`` decodes a small data set once
    and keeps it on the device (all images must have one size).

    If ``root`` itself holds the class folders, it is read as a single split. ``holdout`` is the share of every class
    that is held out as the test split if the data have none. It is drawn with ``holdout_seed``; the rest is the
    training split. ``allow_overlap`` allows the same images in both splits.

    ``root`` may also be a .zip file, a list of paths (.txt), a folder of packed shards (``mixmask pack``) or of parquet or
    arrow files, or a list of several roots, whose images are joined. ``labels: false`` reads all images below a root, at
    any depth and without classes, which is enough for pretraining.

    ``skip_unreadable`` decodes every image once when the run starts and leaves out those that cannot be read; by default
    one such image stops the run. ``levels`` are the values of 16-bit images that become 0 and 255. ``label_column`` and
    ``image_column`` name columns of parquet and arrow files where they cannot be found.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    root: Root | tuple[Root, ...] = operational(..., min_length=1)
    train: str = "train"
    test: str | None = "val"
    storage: Literal["stream", "resident"] = "stream"
    num_workers: int = operational(4, ge=0)
    holdout: float = added(0.0, ge=0, lt=1)
    holdout_seed: int = added(0, ge=0, lt=1 << 63)
    allow_overlap: bool = added(False)
    layout: str | None = operational(None)
    class_list: str | None = added(None, min_length=1)
    labels: bool = added(True)
    skip_unreadable: bool = added(False)
    levels: tuple[int, int] | None = added(None)
    image_column: str | None = added(None, min_length=1)
    label_column: str | None = added(None, min_length=1)

    @property
    def roots(self) -> tuple[str, ...]:
        """All roots."""
        return (self.root,) if isinstance(self.root, str) else self.root

    @model_validator(mode="after")
    def _fits_without_labels(self) -> DataRecipe:
        if not self.labels and self.holdout:
            raise ValueError("holdout keeps a share of every class for testing, and labels: false reads no classes")
        if not self.labels and self.class_list is not None:
            raise ValueError("class_list chooses classes, and labels: false reads none")
        if self.levels is not None and not 0 <= self.levels[0] < self.levels[1] <= 65535:
            raise ValueError(f"levels must satisfy 0 <= low < high <= 65535, got {list(self.levels)}")
        return self

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
    """A layout of images on disk.

    To add one, derive a class from this one in a new file in ``engine/data/``. It needs no registration, and opens
    every root that it recognises.
    """

    kind: ClassVar[str]  # its name
    general: ClassVar[bool] = False  # the fallback for roots that no other kind recognises
    has_columns: ClassVar[bool] = False  # for `data.image_column` and `data.label_column` to name

    @abstractmethod
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        """Whether ``root``, which exists, has this layout. Must be fast: look for files, do not read them."""

    @abstractmethod
    def open(self, root: Path, data: DataRecipe, part: Part) -> Images:
        """List the images of one part. Without ``data.labels``, images outside class folders count, too.

        Raises:
            DataError: If something is missing or damaged; names the file.
        """

    def splits(self, root: Path) -> list[str]:
        """Names of the splits in ``root``, for ``mixmask check-data``; an empty list for any other layout."""
        return []

    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        """A message that refuses ``data.holdout`` because the data have a test split; None if they have none."""
        return None


def require_same_classes(train: ImageSet, test: ImageSet, allow_overlap: bool = False) -> None:
    """Refuse a test split with other classes than the training split, or with images of the training split.

    Raises:
        DataError: Naming the classes that only one split has, or the shared folder or image.
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
    for images in (train, test):
        if not images.classes:
            raise DataError(f"{images.root}: its images have no labels, and a score needs them")
    if train.classes != test.classes:
        only_train = sorted(set(train.classes) - set(test.classes))[:5]
        only_test = sorted(set(test.classes) - set(train.classes))[:5]
        raise DataError(
            f"{train.root} and {test.root} have different classes: only in the first {only_train}, "
            f"only in the second {only_test}"
        )


def other_classes(name: str, num_classes: int) -> str:
    """A remark for an expected score if the data have another number of classes than ``name`` implies; else empty."""
    known = KNOWN_CLASSES.get(name)
    if known is None or known == num_classes:
        return ""
    return f"; holds for the {known:,} classes of {name}; these data have {num_classes:,}, give them another data.name"
