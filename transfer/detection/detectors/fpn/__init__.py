"""R50-FPN: Faster and Mask R-CNN on a feature pyramid (arXiv:1612.03144), as self-supervised work finetunes it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.transfer.detection.detectors.fpn.network import FPNDetector
from mixmask.transfer.detection.layers.pyramid_recipe import PyramidRecipe
from mixmask.transfer.detection.layers.recipes import (
    BoxHeadRecipe,
    MaskHeadRecipe,
    PyramidRoIRecipe,
    PyramidRPNRecipe,
    configure_roi,
    configure_rpn,
)
from mixmask.transfer.detection.layers.tensor_names import RPN_AND_BOXES


class FPNRecipe(PyramidRecipe):
    """A pyramid on the trunk's four maps, the RPN on five levels, and RoI heads on four."""

    finest: ClassVar[int] = 2
    heads: ClassVar[dict[str, str]] = {**RPN_AND_BOXES, "roi_heads.box_head.": "roi_heads.box_head."}

    kind: Literal["fpn"] = "fpn"
    rpn: PyramidRPNRecipe = PyramidRPNRecipe()
    roi: PyramidRoIRecipe = PyramidRoIRecipe()
    box_head: BoxHeadRecipe = BoxHeadRecipe()
    mask_head: MaskHeadRecipe = MaskHeadRecipe()

    @property
    @override
    def label(self) -> str:
        return "FPN"

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

    @override
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        model = cfg.MODEL
        levels = ["p2", "p3", "p4", "p5"]
        self.configure_pyramid(cfg, "build_resnet_fpn_backbone", ["res2", "res3", "res4", "res5"])
        model.RPN.IN_FEATURES, model.ROI_HEADS.IN_FEATURES = [*levels, "p6"], levels
        norm = model.RESNETS.NORM
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
