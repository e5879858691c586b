"""The base class of detectors: the recipe, which builds one on either engine, and what networks are given and return.

A detector is a package of its own in ``transfer/detection/detectors/``, with a class derived from `DetectorRecipe`. Its
fields are the keys under ``detector:`` in configs, and ``kind: Literal["…"]`` is its name there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import Recipe
from mixmask.engine.flops import forward_flops

if TYPE_CHECKING:
    from torch import Tensor

    from mixmask.transfer.detection.network import Detector


@dataclass(frozen=True)
class Targets:
    """The objects of one image.

    Attributes:
        boxes: (G, 4).
        labels: (G,) int64.
        polygons: Of each object; empty without masks.
        keypoints: (G, K, 3), x, y and COCO's flag of each (0: not labelled), or None.
    """

    boxes: Tensor
    labels: Tensor
    polygons: list[list[list[float]]]
    keypoints: Tensor | None = None


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes: (D, 4) in the pixels of the image that the network saw.
        scores: (D,) in [0, 1].
        labels: (D,) int64.
        masks: (D, M, M) probabilities inside each box, or None.
        keypoints: (D, K, 3), x, y and probability of each, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None


class DetectorRecipe(Recipe, ABC):
    """The keys of a detector, and how it is built on both engines.

    Attributes:
        measures: What is measured of it on COCO, in COCO's names (``bbox``, ``segm``, ``keypoints``). On VOC, it is boxes.
        losses: Detectron2's names of its losses, and those of `Detector.losses`; both engines log the latter.
        ours_alone: Tensors of our network that Detectron2 does not keep.
    """

    kind: str
    measures: ClassVar[tuple[str, ...]] = ("bbox", "segm")
    losses: ClassVar[Mapping[str, str]] = {
        "loss_rpn_cls": "rpn_objectness",
        "loss_rpn_loc": "rpn_box",
        "loss_cls": "roi_class",
        "loss_box_reg": "roi_box",
        "loss_mask": "roi_mask",
    }
    ours_alone: ClassVar[tuple[str, ...]] = ()

    @property
    def sigmas(self) -> tuple[float, ...]:
        """How precisely each keypoint of an object can be placed (COCO's OKS); empty if it finds no keypoints."""
        return ()

    @property
    def suffix(self) -> str:
        """What follows the protocol's name in records and tables (``detect_coco_fpn``): results of detectors differ."""
        return f"_{self.kind}"

    @property
    def label(self) -> str:
        """What follows "detection" in the titles of its results."""
        return self.kind

    @abstractmethod
    def check_backbone(self, backbone: BackboneRecipe) -> None:
        """Refuse a trunk on which the detector cannot be built.

        Raises:
            ConfigError: The message says which trunks are valid.
        """

    def operations(self, backbone: BackboneRecipe, height: int, width: int, training: bool) -> float:
        """Floating-point operations of an image's forward pass, for estimates.

        Of detectors on a pyramid, the pyramid and the heads take about as many as the trunk.
        """
        return 2.0 * forward_flops(backbone, height, width)

    @abstractmethod
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> Detector:
        """Build the network of the torchvision engine.

        Args:
            backbone: A trunk that `check_backbone` accepts.
            state: Its state dict under torchvision's (or timm's) names, loaded strictly.
            num_classes: Foreground classes.
            masks: Whether to add a mask head.
        """

    @property
    @abstractmethod
    def detectron2_module(self) -> str | None:
        """The module to import so that Detectron2 knows all parts of the detector; None if it has them itself."""

    @abstractmethod
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        """Set the keys of a Detectron2 config that describe the network; what all detectors share is set already."""

    @abstractmethod
    def name_in_detectron2(self, name: str) -> str | None:
        """Detectron2's name of a tensor of the torchvision engine's network; None if it has none there."""

    @abstractmethod
    def name_here(self, name: str) -> str | None:
        """The inverse of `name_in_detectron2`; None for a name that is not the detector's."""

    def to_detectron2(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the state dict of the torchvision engine's network to Detectron2's names, without `ours_alone`.

        Raises:
            KeyError: If a tensor has no counterpart.
        """
        return _with_names({n: t for n, t in state.items() if n not in self.ours_alone}, self.name_in_detectron2)

    def from_detectron2(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_detectron2`.

        Raises:
            KeyError: If a tensor has no place here.
        """
        return _with_names(state, self.name_here)

    @abstractmethod
    def place_in_detectron2(self, name: str) -> str:
        """The name of a trunk tensor in Detectron2's detector, given that in its ResNet (``res5.0.conv1.weight``)."""


def _with_names(state: Mapping[str, Tensor], name_of: Callable[[str], str | None]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        other = name_of(name)
        if other is None:
            raise KeyError(name)
        found[other] = tensor
    return found
