"""Several image sets as one (``data.root`` with several folders)."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, override

from mixmask.engine.errors import DataError
from mixmask.engine.images import Images, ImageSet

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class JoinedImages(Images):
    """The images of several sets, one after another.

    Attributes:
        parts: The sets.
        places: (N, 2) int64, for each image its set and its index there.
    """

    parts: tuple[ImageSet, ...]
    places: npt.NDArray[np.int64]

    @classmethod
    def of(cls, parts: Sequence[ImageSet]) -> JoinedImages:
        """Join sets; classes of the same name become one.

        Raises:
            DataError: If only some sets have labels, or images have several labels each.
        """
        without = [part for part in parts if not part.classes]
        if without and len(without) < len(parts):
            raise DataError(
                f"{without[0].root}: has no labels, and {next(part.root for part in parts if part.classes)} has; "
                f"data.labels=false reads all without labels"
            )
        several = next((part for part in parts if part.targets.ndim == 2), None)
        if several is not None:
            raise DataError(f"{several.root}: its images have several labels each, so it cannot be joined with others")
        order = {name: label for label, name in enumerate(sorted({name for part in parts for name in part.classes}))}
        labels = []
        for part in parts:
            new = np.array([order[name] for name in part.classes] or [0], np.int64)
            labels.append(new[part.targets])
        held = None
        if any(part.validation is not None for part in parts):
            held = np.concatenate(
                [np.zeros(len(part), np.bool_) if part.validation is None else part.validation for part in parts]
            )
        places = [(number, index) for number, part in enumerate(parts) for index in range(len(part))]
        paths = tuple(path for part in parts for path in part.paths)
        if len({*paths}) < len(paths):
            twice = next(path for path, count in Counter(paths).items() if count > 1)
            raise DataError(f"{twice}: stands in several of the folders that data.root joins")
        where = np.array(places, np.int64)
        return cls(paths, np.concatenate(labels), tuple(order), parts[0].root, tuple(parts), where, validation=held)

    def place(self, index: int) -> tuple[ImageSet, int]:
        """The set of image ``index``, and its index there."""
        part, row = self.places[index].tolist()
        return self.parts[part], row

    def read(self, index: int) -> Tensor:
        """Read image ``index`` from its set."""
        part, row = self.place(index)
        return part.read(row)

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index``, from its set."""
        part, row = self.place(index)
        return part.size(row)

    @override
    def header(self, index: int) -> tuple[int, int]:
        part, row = self.place(index)
        return part.header(row)

    def array(self) -> None:
        """None: the sets may have images of several sizes."""

    def with_decoding(self, channels: int | None = None, levels: tuple[int, int] | None = None) -> Self:
        """The same images with another `Decoding`."""
        return replace(self, parts=tuple(part.with_decoding(channels, levels) for part in self.parts))

    def states(self) -> Iterable[str]:
        """Those of the sets."""
        states = [[*part.states()] for part in self.parts]
        return [states[part][row] for part, row in self.places.tolist()]

    @override
    def encoded(self, index: int) -> Tensor:
        part, row = self.place(index)
        return part.encoded(row)

    @override
    def inner_name(self, index: int) -> str:
        part, row = self.place(index)
        return part.inner_name(row)

    @property
    @override
    def origin(self) -> str:
        counts = np.bincount(self.places[:, 0], minlength=len(self.parts)).tolist()
        return ", ".join(f"{part.origin} ({count:,})" for part, count in zip(self.parts, counts, strict=True))

    @override
    def problem(self, index: int) -> str | None:
        part, row = self.place(index)
        return part.problem(row)

    @override
    def summary(self) -> dict[str, str | int]:
        # Paths are told relative to the image's own root: the same folders may lie elsewhere on another machine.
        roots = [part.root for part in self.parts]
        digest = hashlib.sha256()
        for path, label, (part, _) in zip(self.paths, self.targets.tolist(), self.places.tolist(), strict=True):
            digest.update(f"{part} {self._shown(label)}/{os.path.relpath(path, roots[part])}\n".encode())
        return {"num_images": len(self), "num_classes": len(self.classes), "listing": digest.hexdigest()[:16]}

    @override
    def _chosen(self, chosen: list[int], root: Path) -> Self:
        return replace(super()._chosen(chosen, root), places=self.places[chosen])
