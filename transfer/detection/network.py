"""The base class of detectors' networks, which the torchvision engine trains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.engine.normalization import IMAGENET_MEAN, IMAGENET_STD
from mixmask.engine.precision import Precision
from mixmask.transfer.detection.detector import Detections, Targets

# RGB in [0, 255], the same numbers as in classification: what MoCo's detection configs call PIXEL_MEAN and PIXEL_STD.
PIXEL_MEAN = tuple(255 * value for value in IMAGENET_MEAN)
PIXEL_STD = tuple(255 * value for value in IMAGENET_STD)


class Detector(nn.Module, ABC):
    """The network of the torchvision engine. As in MoCo's protocol, nothing is frozen, BatchNorm included."""

    multiple_of: ClassVar[int] = 1  # batches are padded to sides that are multiples of it

    def __init__(self) -> None:
        super().__init__()
        self.memory_format: torch.memory_format = torch.contiguous_format
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    @property
    @abstractmethod
    def bottlenecks(self) -> bool:
        """Whether the trunk is a ResNet of bottlenecks."""

    def arrange(self, device: torch.device, precision: Precision) -> None:
        """Move to a device, in the memory format that is fastest there.

        Channels last is faster on a GPU, in bf16, and for bottlenecks (1.14 times on a CPU in fp32). On a CPU in fp32,
        the 3×3 convolutions of basic blocks are up to a quarter slower with it (`benchmarks/detection.py`).
        """
        last = device.type == "cuda" or precision != "fp32" or self.bottlenecks
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.to(device).to(memory_format=self.memory_format)

    def batch(self, images: list[Tensor]) -> Tensor:
        """Normalise (3, H, W) uint8 RGB images and pad them with zeros to one size, a multiple of `multiple_of`."""
        height, width = (
            math.ceil(max(image.shape[side] for image in images) / self.multiple_of) * self.multiple_of
            for side in (1, 2)
        )
        mean, std = self.get_buffer("pixel_mean"), self.get_buffer("pixel_std")
        # Padded after normalisation, as in Detectron2: the border has the mean colour.
        padded = [
            F.pad(
                (image.to(mean.device).float() - mean) / std,
                (0, width - image.shape[2], 0, height - image.shape[1]),
            )
            for image in images
        ]
        return torch.stack(padded).contiguous(memory_format=self.memory_format)

    @abstractmethod
    def losses(self, images: list[Tensor], targets: list[Targets], rng: list[torch.Generator]) -> dict[str, Tensor]:
        """The losses of one batch, each a scalar; training minimises their sum.

        Args:
            images: (3, H, W) uint8 RGB each.
            targets: Their objects.
            rng: One generator per image, from which anchors and proposals are sampled.
        """

    @abstractmethod
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """The detections of each image, in the pixels of the image given."""
