"""Public data sets as their archives unpack, which is how torchvision lays them out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import FileImages
from mixmask.engine.texts import read_text


class BenchmarkSet(DataKind):
    """A public data set with files that say which images are for training and for testing.

    Attributes:
        title: What it is called.
        sign: The file or folder by which it is recognised.
        inner: The folders that its archives unpack to; ``data.root`` may also name the folder above them.
        has_official_test: Whether there is an official test split, or a split that is stated in the class.
    """

    title: ClassVar[str]
    sign: ClassVar[str]
    inner: ClassVar[tuple[str, ...]] = ()
    has_official_test: ClassVar[bool] = True

    def home(self, root: Path) -> Path | None:
        """The folder that holds `sign`."""
        return next(
            (place for place in (root, *(root / one for one in self.inner)) if (place / self.sign).exists()), None
        )

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return self.home(root) is not None

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> FileImages:
        home = self.home(root)
        if home is None:
            there = sorted(path.name for path in root.iterdir())[:10] if root.is_dir() else []
            places = " or ".join(["there", *(f"in {one}/" for one in self.inner)])
            raise DataError(
                f"{root}: not {self.title} as its archives unpack: {self.sign} was expected {places}; found "
                f"{', '.join(there) or 'nothing'}"
            )
        images = self.read(home, data, part)
        if not len(images):
            raise DataError(f"{home}: {self.title} lists no image for {part}")
        return images if images.root != home else replace(images, root=home / f"({part})")

    @abstractmethod
    def read(self, home: Path, data: DataRecipe, part: Part) -> FileImages:
        """List the images of one part of the data set in ``home``."""

    @override
    def splits(self, root: Path) -> list[str]:
        if self.home(root) is None:
            return []
        return ["train", "test"] if self.has_official_test else ["train"]

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        if not self.has_official_test:
            return None
        return f"{root}: {self.title} has a test split; leave data.holdout out"

    # --- what readers share ------------------------------------------------------------------------------------------

    def lines(self, file: Path, fields: int = 1, split_all: bool = False) -> Iterator[list[str]]:
        """The fields of every line that is not empty.

        Args:
            file: One of the data set's lists.
            fields: How many fields a line has at least.
            split_all: Split at every space; else the last field keeps its spaces.

        Raises:
            DataError: If the file is missing, or a line is shorter; with its number.
        """
        if not file.is_file():
            raise DataError(
                f"{file}: missing; it is part of {self.title}, whose lists say which images are for training"
            )
        for number, line in enumerate(read_text(file).splitlines(), 1):
            found = line.split() if split_all else line.split(maxsplit=fields - 1) if fields > 1 else [line.strip()]
            if not line.strip():
                continue
            if len(found) < fields:
                raise DataError(f"{file}, line {number}: {fields} fields were expected, got {line.strip()!r}")
            yield [one.strip() for one in found]

    def images(
        self, home: Path, named: Iterable[tuple[Path, str]], classes: Sequence[str], held: Iterable[bool] | None = None
    ) -> FileImages:
        """Images from files and class names.

        Args:
            home: What messages name.
            named: Every image and its class.
            classes: All classes, in any order.
            held: Whether each image belongs to the official validation split.

        Raises:
            DataError: If a class is not among ``classes``.
        """
        pairs, order = list(named), sorted({*classes})
        index = {name: label for label, name in enumerate(order)}
        strange = next((pair for pair in pairs if pair[1] not in index), None)
        if strange is not None:
            raise DataError(f"{strange[0]}: its class {strange[1]!r} is not one of the {len(order)} of {self.title}")
        labels = np.array([index[name] for _, name in pairs], np.int64)
        validation = None if held is None else np.array([*held], np.bool_)
        return FileImages(tuple(path for path, _ in pairs), labels, tuple(order), home, validation=validation)

    def matlab(self, file: Path, name: str) -> Any:
        """A variable of a MATLAB file.

        Raises:
            DataError: If the file is missing, or cannot be read.
        """
        from scipy.io import loadmat

        if not file.is_file():
            raise DataError(
                f"{file}: missing; it is part of {self.title}, whose lists say which images are for training"
            )
        try:
            return loadmat(file, squeeze_me=True)[name]
        except Exception as error:  # SciPy's reader raises anything at all on a damaged file
            raise DataError(f"{file}: damaged, or not of {self.title} ({type(error).__name__}: {error})") from None
