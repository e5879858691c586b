"""What the recipes of detectors on a feature pyramid share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.transfer.detection.detector import DetectorRecipe
from mixmask.transfer.detection.layers.recipes import (
    BoxHeadRecipe,
    PyramidRoIRecipe,
    PyramidRPNRecipe,
    configure_roi,
    configure_rpn,
)
from mixmask.transfer.detection.layers.tensor_names import (
    RPN_AND_BOXES,
    pyramid_from_detectron2,
    pyramid_to_detectron2,
    renamed,
    reversed_names,
)


class PyramidRecipe(DetectorRecipe):
    """A pyramid of ``channels`` channels on a trunk's maps.

    ``norm`` is batch normalisation in the pyramid, which MoCo's protocol adds to what is newly initialised
    (arXiv:1911.05722, section 4.2; ``MODEL.FPN.NORM: SyncBN`` in the configs of DenseCL, PixPro, SoCo, DetCo and mmselfsup).

    Attributes:
        finest: The level of its finest map: 2 for stride 4.
        heads: Beginnings of the names of the heads' tensors, and those in Detectron2.
    """

    finest: ClassVar[int]
    heads: ClassVar[dict[str, str]]

    channels: int = Field(256, ge=1)
    norm: bool = True

    @property
    @abstractmethod
    @override
    def label(self) -> str: ...

    @override
    def check_backbone(self, backbone: BackboneRecipe) -> None:
        from mixmask.transfer.detection.layers.pyramid import check_maps

        check_maps(backbone, f"detection ({self.label})")

    @property
    @override
    def detectron2_module(self) -> None:
        return None

    def configure_pyramid(self, cfg: Any, name: str, stages: Sequence[str]) -> None:
        """Set the keys of a Detectron2 config for a backbone of that ``name`` on stages of the trunk."""
        model = cfg.MODEL
        model.BACKBONE.NAME = name
        model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = list(stages)
        model.FPN.OUT_CHANNELS, model.FPN.NORM = self.channels, model.RESNETS.NORM if self.norm else ""

    @override
    def name_in_detectron2(self, name: str) -> str | None:
        return renamed(name, self.heads) or pyramid_to_detectron2(name, self.finest)

    @override
    def name_here(self, name: str) -> str | None:
        return renamed(name, reversed_names(self.heads)) or pyramid_from_detectron2(name, self.finest)

    @override
    def place_in_detectron2(self, name: str) -> str:
        return f"backbone.bottom_up.{name}"


class PyramidRCNNRecipe(PyramidRecipe):
    """A two-stage detector on the trunk's four maps: the RPN on five levels, RoI heads on four."""

    finest: ClassVar[int] = 2
    heads: ClassVar[dict[str, str]] = {**RPN_AND_BOXES, "roi_heads.box_head.": "roi_heads.box_head."}

    box_head: BoxHeadRecipe = BoxHeadRecipe()

    @property
    @abstractmethod
    @override
    def label(self) -> str: ...

    def configure_heads(self, cfg: Any, rpn: PyramidRPNRecipe, roi: PyramidRoIRecipe, num_classes: int) -> None:
        """Set the keys of a Detectron2 config for the pyramid, the RPN and the box head."""
        model = cfg.MODEL
        levels = ["p2", "p3", "p4", "p5"]
        self.configure_pyramid(cfg, "build_resnet_fpn_backbone", ["res2", "res3", "res4", "res5"])
        model.RPN.IN_FEATURES, model.ROI_HEADS.IN_FEATURES = [*levels, "p6"], levels
        configure_rpn(model, rpn, rpn.sizes)
        configure_roi(cfg, roi, "StandardROIHeads", num_classes)
        box = model.ROI_BOX_HEAD
        box.NAME = "FastRCNNConvFCHead"
        box.NUM_CONV, box.CONV_DIM = self.box_head.num_conv, self.box_head.conv_dim
        box.NUM_FC, box.FC_DIM = self.box_head.num_fc, self.box_head.fc_dim
        box.NORM = model.RESNETS.NORM if self.box_head.norm else ""
