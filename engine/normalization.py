"""Per-channel means and standard deviations, and the normalisation of images with them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Normalization = Literal["imagenet", "cifar10", "cifar100", "tiny_imagenet"]

# Mean and standard deviation per channel of images in [0, 1], by the data set that they were taken from.
STATISTICS: dict[Normalization, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # From the MoCo CIFAR demo and Un-Mix, which use them for CIFAR-100 too.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # W-MSE's code
    "tiny_imagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),  # W-MSE's code
}
assert STATISTICS.keys() == {*get_args(Normalization)}
IMAGENET_MEAN, IMAGENET_STD = STATISTICS["imagenet"]


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], channels-first in memory; other types are returned unchanged."""
    if images.dtype != torch.uint8:
        return images
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def normalize(images: Tensor, normalization: Normalization = "imagenet") -> Tensor:
    """Subtract a data set's mean and divide by its standard deviation, per channel.

    Args:
        images: (N, 3, H, W) uint8, or float in [0, 1].
        normalization: The data set.
    """
    images = as_float(images)
    mean, std = (
        torch.tensor(values, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
        for values in STATISTICS[normalization]
    )
    return (images - mean).mul_(1 / std)
