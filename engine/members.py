"""Images inside larger files, each at a known place and with a checksum: the base of zip files and shards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, override

from mixmask.engine.images import EncodedImages
from mixmask.engine.random_access import read_at


@dataclass(frozen=True, eq=False)
class MemberImages(EncodedImages):
    """Images whose places are the rows of a table.

    Attributes:
        members: (N, k) int64, a row for each image; column `CRC` is its CRC-32.
    """

    CRC: ClassVar[int] = 3

    members: npt.NDArray[np.int64]

    @abstractmethod
    def plain_bytes(self, index: int) -> tuple[Path, int, int] | None:
        """File, offset and size of image ``index``; None if it is compressed there."""

    @override
    def ends(self, index: int) -> bytes | None:
        found = self.plain_bytes(index)
        if found is None or found[2] < 4:
            return None
        file, offset, size = found
        pieces = (read_at(file, place, 2, self.paths[index]) for place in (offset, offset + size - 2))
        return b"".join(piece.numpy().tobytes() for piece in pieces)

    def states(self) -> Iterable[str]:
        """Checksums of the images."""
        return [str(crc) for crc in self.members[:, self.CRC].tolist()]

    @override
    def _chosen(self, chosen: list[int], root: Path) -> Self:
        return replace(super()._chosen(chosen, root), members=self.members[chosen])
