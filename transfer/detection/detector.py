"""What a detector is: a recipe that builds it on either engine, and the network that the torchvision engine trains.

A detector is a package of its own in ``transfer/detection/detectors/``, with a class derived from `DetectorRecipe`. Its
fields are the keys under ``detector:`` in configs, and ``kind: Literal["…"]`` is its name there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import Recipe
from mixmask.engine.normalization import IMAGENET_MEAN, IMAGENET_STD
from mixmask.engine.precision import Precision

# RGB in [0, 255], the same numbers as in classification: what MoCo's detection configs call PIXEL_MEAN and PIXEL_STD.
PIXEL_MEAN = tuple(255 * value for value in IMAGENET_MEAN)
PIXEL_STD = tuple(255 * value for value in IMAGENET_STD)


@dataclass(frozen=True)
class Targets:
    """The objects of one image: ``boxes`` (G, 4), ``labels`` (G,) int64, ``polygons`` per object (empty without masks)."""

    boxes: Tensor
    labels: Tensor
    polygons: list[list[list[float]]]


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes: (D, 4) in the pixels of the image that the network saw.
        scores: (D,) in [0, 1].
        labels: (D,) int64.
        masks: (D, M, M) probabilities inside each box, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


class Detector(nn.Module, ABC):
    """The network, for the torchvision engine; BatchNorm everywhere and trained."""

    def __init__(self) -> None:
        super().__init__()
        self.memory_format: torch.memory_format = torch.contiguous_format
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def arrange(self, device: torch.device, precision: Precision) -> None:
        """Move to a device, in the order of memory that is fastest there."""
        self.to(device).to(memory_format=self.memory_format)

    def batch(self, images: list[Tensor]) -> Tensor:
        """Normalise (3, H, W) uint8 RGB images and pad them with zeros to the largest height and width."""
        height = max(image.shape[1] for image in images)
        width = max(image.shape[2] for image in images)
        mean, std = self.get_buffer("pixel_mean"), self.get_buffer("pixel_std")
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
        """The losses of one batch, each a scalar; their sum is what is minimised.

        Args:
            images: (3, H, W) uint8 RGB each.
            targets: Their objects.
            rng: A generator for the samples of each image.
        """

    @abstractmethod
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """What is in each image, in its own pixels."""


class DetectorRecipe(Recipe, ABC):
    """A detector and what it is told."""

    kind: str

    @abstractmethod
    def check_backbone(self, backbone: BackboneRecipe) -> None:
        """Refuse a trunk on which it cannot be built.

        Raises:
            ConfigError: With what would be valid.
        """

    @abstractmethod
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> Detector:
        """The network of the torchvision engine.

        Args:
            backbone: A trunk that `check_backbone` lets pass.
            state: Its weights under torchvision's (or timm's) names; every tensor must land.
            num_classes: Foreground classes.
            masks: Whether masks are found, too.
        """

    @property
    @abstractmethod
    def detectron2_module(self) -> str | None:
        """The module whose import registers what Detectron2 lacks for it; None if nothing."""

    @abstractmethod
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        """Set the keys of a Detectron2 config that describe the network; what all detectors share is set already."""

    @abstractmethod
    def to_detectron2(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of its network here as that of Detectron2's.

        Raises:
            KeyError: If a tensor has no place there.
        """

    @abstractmethod
    def place_in_detectron2(self, name: str) -> str:
        """Where Detectron2's network keeps a tensor of the trunk, given its name there (``res5.0.conv1.weight``)."""
