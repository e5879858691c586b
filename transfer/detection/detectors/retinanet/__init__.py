"""RetinaNet R50-FPN (arXiv:1708.02002), as DetCo's configs finetune it (``coco_R_50_RetinaNet_1x_moco.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import Recipe
from mixmask.transfer.detection.layers.pyramid_recipe import PyramidRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from mixmask.transfer.detection.network import Detector

Positive = Annotated[float, Field(gt=0)]


class DenseAnchorRecipe(Recipe):
    """Anchors and how they are matched; the defaults are Detectron2's ``Base-RetinaNet.yaml``.

    ``sizes`` has, for each of the strides 8, 16, 32, 64 and 128, the square root of the smallest anchor's area; ``octaves``
    further anchors follow at equal ratios up to twice the size (section 4).
    """

    sizes: tuple[Positive, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    octaves: int = Field(3, ge=1)
    aspect_ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    iou_negative: float = Field(0.4, ge=0, le=1)
    iou_positive: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> DenseAnchorRecipe:
        if len(self.sizes) != 5:
            raise ValueError(f"sizes: one for each of the 5 maps; {len(self.sizes)} are given")
        if self.iou_negative > self.iou_positive:
            raise ValueError(f"iou_negative {self.iou_negative} is above iou_positive {self.iou_positive}")
        return self

    @property
    def of_each_map(self) -> list[list[float]]:
        """All anchor sizes of each map."""
        return [[size * 2 ** (step / self.octaves) for step in range(self.octaves)] for size in self.sizes]


class RetinaNetRecipe(PyramidRecipe):
    """Class and box of every anchor on a pyramid of strides 8 to 128; without masks.

    The head has no batch normalisation. ``focal_alpha`` and ``focal_gamma`` are the focal
    loss's (equation 5), ``prior`` is the initial probability of an object (section 4.1).
    """

    finest: ClassVar[int] = 3
    heads: ClassVar[dict[str, str]] = {"head.": "head."}
    ours_alone: ClassVar[tuple[str, ...]] = ("normalizer",)  # Detectron2 forgets it when a run is resumed
    measures: ClassVar[tuple[str, ...]] = ("bbox",)
    losses: ClassVar[Mapping[str, str]] = {"loss_cls": "class", "loss_box_reg": "box"}

    kind: Literal["retinanet"] = "retinanet"
    num_conv: int = Field(4, ge=0)
    anchors: DenseAnchorRecipe = DenseAnchorRecipe()
    focal_alpha: float = Field(0.25, ge=0, le=1)
    focal_gamma: float = Field(2.0, ge=0)
    prior: float = Field(0.01, gt=0, lt=1)
    score_threshold: float = Field(0.05, ge=0, lt=1)
    pre_nms: int = Field(1000, ge=1)
    nms_threshold: float = Field(0.5, gt=0, le=1)
    detections_per_image: int = Field(100, ge=1)

    @property
    @override
    def label(self) -> str:
        return "RetinaNet"

    @override
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> Detector:
        from mixmask.transfer.detection.detectors.retinanet.network import RetinaNet

        assert not masks
        return RetinaNet(
            backbone,
            state,
            num_classes,
            channels=self.channels,
            norm=self.norm,
            num_conv=self.num_conv,
            sizes=self.anchors.of_each_map,
            aspect_ratios=self.anchors.aspect_ratios,
            ious=(self.anchors.iou_negative, self.anchors.iou_positive),
            focal=(self.focal_alpha, self.focal_gamma),
            prior=self.prior,
            score_threshold=self.score_threshold,
            pre_nms=self.pre_nms,
            nms_threshold=self.nms_threshold,
            detections_per_image=self.detections_per_image,
        )

    @override
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        model = cfg.MODEL
        model.META_ARCHITECTURE = "RetinaNet"
        self.configure_pyramid(cfg, "build_retinanet_resnet_fpn_backbone", ["res3", "res4", "res5"])
        model.ANCHOR_GENERATOR.SIZES = self.anchors.of_each_map
        model.ANCHOR_GENERATOR.ASPECT_RATIOS = [list(self.anchors.aspect_ratios)]
        head = model.RETINANET
        head.NUM_CLASSES, head.NUM_CONVS, head.PRIOR_PROB = num_classes, self.num_conv, self.prior
        head.IOU_THRESHOLDS = [self.anchors.iou_negative, self.anchors.iou_positive]
        head.FOCAL_LOSS_ALPHA, head.FOCAL_LOSS_GAMMA = self.focal_alpha, self.focal_gamma
        head.SMOOTH_L1_LOSS_BETA = 0.0  # L1
        head.SCORE_THRESH_TEST, head.NMS_THRESH_TEST = self.score_threshold, self.nms_threshold
        head.TOPK_CANDIDATES_TEST = self.pre_nms
        cfg.TEST.DETECTIONS_PER_IMAGE = self.detections_per_image
