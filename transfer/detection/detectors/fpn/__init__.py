"""R50-FPN: Faster and Mask R-CNN on a feature pyramid (arXiv:1612.03144), as self-supervised work finetunes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.transfer.detection.detector import DetectorRecipe
from mixmask.transfer.detection.detectors.fpn.names import detector_from_detectron2, detector_to_detectron2
from mixmask.transfer.detection.detectors.fpn.network import FPNDetector
from mixmask.transfer.detection.layers.pyramid import check_maps
from mixmask.transfer.detection.layers.recipes import (
    BoxHeadRecipe,
    MaskHeadRecipe,
    PyramidRoIRecipe,
    PyramidRPNRecipe,
    configure_roi,
    configure_rpn,
)


class FPNRecipe(DetectorRecipe):
    """The trunk's four maps, a pyramid of ``channels`` channels, and heads on it.

    ``norm`` is batch normalisation in the pyramid, which MoCo's protocol adds to what is newly initialised
    (arXiv:1911.05722, section 4.2; ``MODEL.FPN.NORM: SyncBN`` in the configs of DenseCL, PixPro, SoCo, DetCo and mmselfsup).
    """

    kind: Literal["fpn"] = "fpn"
    channels: int = Field(256, ge=1)
    norm: bool = True
    rpn: PyramidRPNRecipe = PyramidRPNRecipe()
    roi: PyramidRoIRecipe = PyramidRoIRecipe()
    box_head: BoxHeadRecipe = BoxHeadRecipe()
    mask_head: MaskHeadRecipe = MaskHeadRecipe()

    @property
    @override
    def label(self) -> str:
        return "FPN"

    @override
    def check_backbone(self, backbone: BackboneRecipe) -> None:
        check_maps(backbone, "detection (FPN)")

    @override
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> FPNDetector:
        return FPNDetector(
            backbone,
            state,
            num_classes,
            channels=self.channels,
            norm=self.norm,
            rpn=self.rpn,
            roi=self.roi,
            box_head=self.box_head,
            mask_head=self.mask_head if masks else None,
        )

    @property
    @override
    def detectron2_module(self) -> None:
        return None

    @override
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        model = cfg.MODEL
        stages, levels = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
        model.BACKBONE.NAME = "build_resnet_fpn_backbone"
        model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = stages
        model.RPN.IN_FEATURES, model.ROI_HEADS.IN_FEATURES = [*levels, "p6"], levels
        norm = model.RESNETS.NORM
        model.FPN.OUT_CHANNELS, model.FPN.NORM = self.channels, norm if self.norm else ""
        configure_rpn(model, self.rpn, self.rpn.sizes)
        configure_roi(cfg, self.roi, "StandardROIHeads", num_classes)
        box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
        box.NAME = "FastRCNNConvFCHead"
        box.NUM_CONV, box.CONV_DIM = self.box_head.num_conv, self.box_head.conv_dim
        box.NUM_FC, box.FC_DIM = self.box_head.num_fc, self.box_head.fc_dim
        box.NORM = norm if self.box_head.norm else ""
        mask.NUM_CONV, mask.CONV_DIM = self.mask_head.num_conv, self.mask_head.conv_dim
        mask.NORM = norm if self.mask_head.norm else ""
        mask.POOLER_RESOLUTION = self.roi.mask_pooler_resolution

    @override
    def to_detectron2(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return detector_to_detectron2(state)

    @override
    def from_detectron2(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return detector_from_detectron2(state)

    @override
    def place_in_detectron2(self, name: str) -> str:
        return f"backbone.bottom_up.{name}"
