"""What the keypoints of a COCO file are called, and which change places in a mirror."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.engine.errors import DataError

MIRRORED = (("left", "right"), ("right", "left"), ("Left", "Right"), ("Right", "Left"))


@dataclass(frozen=True)
class Keypoints:
    """The keypoints of an object.

    Attributes:
        names: Of each, as the file has them.
        skeleton: Pairs of indices that drawings connect.
        sigmas: How precisely each can be placed (COCO's OKS).
    """

    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]

    @property
    def mirrored(self) -> list[int]:
        """Which keypoint is at the place of each in a mirrored picture: "left" and "right" in their names change."""
        return [self.names.index(_counterpart(name, self.names)) for name in self.names]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs that change places in a mirror, each once."""
        both = ((name, _counterpart(name, self.names)) for name in self.names)
        return [(name, other) for name, other in both if self.names.index(name) < self.names.index(other)]


def _counterpart(name: str, names: Sequence[str]) -> str:
    candidates = (name.replace(side, other) for side, other in MIRRORED if side in name)
    return next((other for other in candidates if other in names), name)


def read_keypoints(categories: Sequence[Mapping[str, Any]], file: Path, sigmas: Sequence[float]) -> Keypoints:
    """The keypoints that a document's categories name.

    Args:
        categories: Of a COCO document.
        file: For messages.
        sigmas: Of the detector, one for each keypoint.

    Raises:
        DataError: If a category names none, they differ, or their number is not that of the sigmas.
    """
    found: Keypoints | None = None
    for category in categories:
        where, names, lines = (
            f"{file}: category '{category['name']}'",
            category.get("keypoints"),
            category.get("skeleton"),
        )
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: keypoints is {str(names)[:80]}; a list of names is valid")
        if len(set(names)) < len(names):
            raise DataError(f"{where}: several keypoints have the same name")
        if len(names) != len(sigmas):
            raise DataError(
                f"{where} has {len(names)} keypoints ({', '.join(names)[:120]}), detector.oks_sigmas {len(sigmas)} values: "
                f"give one for each keypoint"
            )
        own = Keypoints(tuple(names), _skeleton(lines or [], len(names), where), tuple(sigmas))
        if found is not None and found != own:
            raise DataError(f"{where} has other keypoints than '{categories[0]['name']}': one detector finds one kind")
        found = own
    assert found is not None  # a document without categories has no annotations, and is refused before
    return found


def _skeleton(lines: object, number: int, where: str) -> tuple[tuple[int, int], ...]:
    """Pairs of indices from 0; COCO counts from 1."""
    usable = isinstance(lines, list) and all(
        isinstance(line, list) and len(line) == 2 and all(type(end) is int and 1 <= end <= number for end in line)
        for line in lines
    )
    if not usable or not isinstance(lines, list):
        raise DataError(f"{where}: skeleton is {str(lines)[:80]}; pairs of numbers from 1 to {number} are valid")
    return tuple((line[0] - 1, line[1] - 1) for line in lines)
