"""Images that are in memory as one array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, override

from mixmask.engine.errors import DataError
from mixmask.engine.images import Images
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ArrayImages(Images):
    """Images in memory, all of one size.

    Attributes:
        pixels: (N, C, H, W) uint8.
    """

    pixels: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        super().__post_init__()
        found = np.asarray(self.pixels)
        if found.dtype != np.uint8 or found.ndim != 4:
            raise DataError(
                f"{self.root}: its pixels are an array {found.shape} of {found.dtype}; valid: (N, C, H, W) uint8"
            )
        object.__setattr__(self, "pixels", np.require(found, np.uint8, "W"))

    def read(self, index: int) -> Tensor:
        """Image ``index`` as (C, H, W) uint8, a view of the array."""
        return torch.from_numpy(self.pixels[index])

    def size(self, index: int) -> tuple[int, int]:
        """Width and height, which all images share."""
        return self.pixels.shape[3], self.pixels.shape[2]

    def array(self) -> Tensor:
        """``pixels``, not a copy."""
        return torch.from_numpy(self.pixels)

    def with_decoding(self, channels: int | None = None, levels: tuple[int, int] | None = None) -> Self:
        """The same images; RGB can become grey. There are no 16-bit values."""
        if channels in (None, 0, self.pixels.shape[1]):
            return self
        if channels != 1 or self.pixels.shape[1] != 3:
            raise DataError(
                f"{self.root}: has images of {self.pixels.shape[1]} channels, and the network takes {channels} "
                f"(backbone.in_channels)"
            )
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        return replace(self, pixels=rgb_to_grayscale(self.array()).numpy())

    def states(self) -> Iterable[str]:
        """A digest of all pixels for every image."""
        digest = hashlib.sha256(self.pixels.tobytes()).hexdigest()
        return [digest] * len(self)

    @override
    def check(self) -> None:
        """Nothing to do: every image was read when the array was made."""

    @override
    def _chosen(self, chosen: list[int], root: Path) -> Self:
        return replace(super()._chosen(chosen, root), pixels=self.pixels[chosen])
