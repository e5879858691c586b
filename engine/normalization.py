"""Per-channel means and standard deviations, and the normalisation of images with them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mixmask.engine.host_values import to_device
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor

NamedStatistics = Literal["imagenet", "cifar10", "cifar100", "tiny_imagenet"]


class Statistics(BaseModel):
    """Mean and standard deviation of each channel of images in [0, 1], of one's own data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_length(self) -> Statistics:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; one each per channel")
        return self

    def __str__(self) -> str:
        return f"mean {[*self.mean]}, std {[*self.std]}"


Normalization = NamedStatistics | Statistics

# Mean and standard deviation per channel of images in [0, 1], by the data set that they were taken from.
STATISTICS: dict[NamedStatistics, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # From the MoCo CIFAR demo and Un-Mix, which use them for CIFAR-100 too.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # W-MSE's code
    "tiny_imagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),  # W-MSE's code
}
assert STATISTICS.keys() == {*get_args(NamedStatistics)}
IMAGENET_MEAN, IMAGENET_STD = STATISTICS["imagenet"]


def statistics_of(normalization: Normalization, channels: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations per channel.

    Those of a data set are for RGB; of grey images (``channels`` 1) they are averaged over the three.

    Raises:
        ValueError: If there are none for this number of channels.
    """
    if isinstance(normalization, Statistics):
        if len(normalization.mean) != channels:
            raise ValueError(
                f"normalization has a mean and a deviation for {len(normalization.mean)} channels, and the images have "
                f"{channels}"
            )
        return normalization.mean, normalization.std
    mean, std = STATISTICS[normalization]
    if channels == 1:
        return (sum(mean) / 3,), (sum(std) / 3,)
    if channels != 3:
        raise ValueError(
            f"normalization '{normalization}' is for RGB or grey images; for {channels} channels give your own: "
            f"normalization={{mean: [...], std: [...]}}"
        )
    return mean, std


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], channels-first in memory; other types are returned unchanged."""
    if images.dtype != torch.uint8:
        return images
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def normalize(images: Tensor, normalization: Normalization = "imagenet") -> Tensor:
    """Subtract a data set's mean and divide by its standard deviation, per channel.

    Args:
        images: (N, C, H, W) uint8, or float in [0, 1].
        normalization: The data set, or the statistics themselves.
    """
    images = as_float(images)
    mean, factor = _constants(*statistics_of(normalization, images.shape[1]), images.device, images.dtype)
    return (images - mean).mul_(factor)


@cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std on a device. Made once: a copy to a GPU in every step would wait for all its work."""
    with torch.inference_mode(False):
        centre, spread = (
            to_device(torch.tensor(values, dtype=dtype).view(1, -1, 1, 1), device) for values in (mean, std)
        )
        return centre, 1 / spread
