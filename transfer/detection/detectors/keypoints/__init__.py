"""Keypoint R-CNN R50-FPN (arXiv:1703.06870, section 5) on COCO's persons, as DetCo's configs finetune it.

Sources: ``keypoint_rcnn_R_50_FPN_2x_moco.yaml`` of DetCo and of mmselfsup, and Detectron2's
``Base-Keypoint-RCNN-FPN.yaml``, on which both rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.transfer.detection.layers.pyramid_recipe import PyramidRCNNRecipe
from mixmask.transfer.detection.layers.recipes import (
    BoxHeadRecipe,
    KeypointHeadRecipe,
    PyramidRoIRecipe,
    PyramidRPNRecipe,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mixmask.transfer.detection.network import Detector

Positive = Annotated[float, Field(gt=0)]
# COCO's, of the 17 keypoints of a person
OF_PERSONS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089
)  # fmt: skip


class KeypointRPNRecipe(PyramidRPNRecipe):
    """With more proposals than FPN's: 1,000 in each image are too few for its boxes (Detectron2)."""

    post_nms_train: int = Field(1500, ge=1)


class KeypointRoIRecipe(PyramidRoIRecipe):
    """With a smooth L1 loss: plain L1 is better for boxes, worse for keypoints (Detectron2)."""

    smooth_l1_beta: float = Field(0.5, ge=0)


class KeypointRecipe(PyramidRCNNRecipe):
    """Boxes and keypoints of objects, on a pyramid.

    ``oks_sigmas`` has a value for each keypoint: how precisely it can be placed, as a share of the object's size. COCO's
    metric needs them; the default is that of its 17 keypoints of a person.
    """

    measures: ClassVar[tuple[str, ...]] = ("bbox", "keypoints")
    losses: ClassVar[Mapping[str, str]] = {
        **{theirs: ours for theirs, ours in PyramidRCNNRecipe.losses.items() if ours != "roi_mask"},
        "loss_keypoint": "roi_keypoint",
    }

    kind: Literal["keypoints"] = "keypoints"
    rpn: KeypointRPNRecipe = KeypointRPNRecipe()
    roi: KeypointRoIRecipe = KeypointRoIRecipe()
    box_head: BoxHeadRecipe = BoxHeadRecipe(num_conv=0, num_fc=2, norm=False)
    keypoint_head: KeypointHeadRecipe = KeypointHeadRecipe()
    oks_sigmas: tuple[Positive, ...] = Field(OF_PERSONS, min_length=1)

    @property
    @override
    def label(self) -> str:
        return "Keypoint R-CNN"

    @property
    @override
    def sigmas(self) -> tuple[float, ...]:
        return self.oks_sigmas

    @override
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> Detector:
        from mixmask.transfer.detection.layers.pyramid_rcnn import PyramidRCNN

        assert not masks
        return PyramidRCNN(
            backbone,
            state,
            num_classes,
            channels=self.channels,
            norm=self.norm,
            rpn=self.rpn,
            roi=self.roi,
            box_head=self.box_head,
            keypoint_head=self.keypoint_head,
            num_keypoints=len(self.oks_sigmas),
        )

    @override
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        self.configure_heads(cfg, self.rpn, self.roi, num_classes)
        head = cfg.MODEL.ROI_KEYPOINT_HEAD
        cfg.MODEL.KEYPOINT_ON = True
        head.NAME, head.NUM_KEYPOINTS = "KRCNNConvDeconvUpsampleHead", len(self.oks_sigmas)
        head.CONV_DIMS = list(self.keypoint_head.conv_dims)
        head.POOLER_RESOLUTION = self.keypoint_head.pooler_resolution
        cfg.TEST.KEYPOINT_OKS_SIGMAS = list(self.oks_sigmas)
