"""R50-C4: Faster and Mask R-CNN on the stride-16 map, with MoCo's BatchNorm after res5 (arXiv:1911.05722, appendix)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.flops import forward_flops
from mixmask.transfer.detection.detector import DetectorRecipe
from mixmask.transfer.detection.detectors.c4 import names
from mixmask.transfer.detection.layers.recipes import RoIRecipe, RPNRecipe, configure_roi, configure_rpn

if TYPE_CHECKING:
    from torch import Tensor

    from mixmask.transfer.detection.network import Detector

HEADS = "Res5ROIHeadsExtraNorm"  # as `heads` registers them


class C4Recipe(DetectorRecipe):
    """conv1 … layer3 of a ResNet as the backbone, layer4 as the RoI head."""

    kind: Literal["c4"] = "c4"
    rpn: RPNRecipe = RPNRecipe()
    roi: RoIRecipe = RoIRecipe()

    @property
    @override
    def suffix(self) -> str:
        return ""  # it was there first

    @property
    @override
    def label(self) -> str:
        return ""

    @override
    def check_backbone(self, backbone: BackboneRecipe) -> None:
        from mixmask.transfer.detection.detectors.c4.network import check_backbone

        check_backbone(backbone)

    @override
    def operations(self, backbone: BackboneRecipe, height: int, width: int, training: bool) -> float:
        # The last stage, a fifth of a ResNet, runs on every region.
        regions = self.roi.batch_per_image if training else self.rpn.post_nms_test
        return 0.8 * forward_flops(backbone, height, width) + 0.2 * regions * forward_flops(backbone, 224)

    @override
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> Detector:
        from mixmask.transfer.detection.detectors.c4.network import C4Detector

        return C4Detector(backbone, state, num_classes, masks, self.rpn, self.roi)

    @property
    @override
    def detectron2_module(self) -> str:
        return "mixmask.transfer.detection.detectors.c4.heads"

    @override
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        configure_rpn(cfg.MODEL, self.rpn, [self.rpn.anchor_sizes])
        configure_roi(cfg, self.roi, HEADS, num_classes)

    @override
    def name_in_detectron2(self, name: str) -> str | None:
        return names.name_in_detectron2(name)

    @override
    def name_here(self, name: str) -> str | None:
        return names.name_here(name)

    @override
    def place_in_detectron2(self, name: str) -> str:
        return f"{'roi_heads' if name.startswith('res5') else 'backbone'}.{name}"
