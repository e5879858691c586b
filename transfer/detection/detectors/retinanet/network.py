"""RetinaNet: one head on five levels of a pyramid, trained with the focal loss (arXiv:1708.02002)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.collectives import mean
from mixmask.transfer.detection.detector import Detections, Targets
from mixmask.transfer.detection.layers.anchors import Anchors, by_anchor
from mixmask.transfer.detection.layers.boxes import IGNORED, POSITIVE, clip_boxes, decode_boxes, encode_boxes, match
from mixmask.transfer.detection.layers.pyramid import Pyramid, trunk_maps
from mixmask.transfer.detection.network import Detector

STRIDES = (8, 16, 32, 64, 128)
WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the deltas (Detectron2's RETINANET.BBOX_REG_WEIGHTS)
# The number of positive anchors is averaged over steps: in a small batch it varies much (as in Detectron2).
MOMENTUM, START = 0.9, 100.0


class RetinaNetHead(nn.Module):
    """Two towers of 3×3 convolutions, for classes and for boxes, shared by all maps; names and weights as Detectron2's."""

    def __init__(self, channels: int, num_conv: int, num_anchors: int, num_classes: int, prior: float) -> None:
        super().__init__()
        self.num_classes = num_classes

        def tower() -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(num_conv):
                layers += [nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.ReLU()]
            return nn.Sequential(*layers)

        self.cls_subnet, self.bbox_subnet = tower(), tower()
        self.cls_score = nn.Conv2d(channels, num_anchors * num_classes, kernel_size=3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, num_anchors * 4, kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        assert self.cls_score.bias is not None
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior) / prior))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each (N, C, H, W) map the class logits (N, H · W · A, classes) and the deltas (N, H · W · A, 4)."""
        logits = [by_anchor(self.cls_score(self.cls_subnet(one)), self.num_classes) for one in maps]
        return logits, [by_anchor(self.bbox_pred(self.bbox_subnet(one)), 4) for one in maps]


class RetinaNet(Detector):
    """A dense detector; every anchor enters the loss, so nothing is sampled.

    Args:
        backbone: A trunk that `check_maps` accepts.
        state: Its weights, loaded strictly.
        num_classes: Foreground classes.
        channels: Channels of the pyramid and of the head.
        norm: Whether the pyramid has batch normalisation.
        num_conv: Convolutions in each tower.
        sizes: The anchor sizes of each map.
        aspect_ratios: Heights over widths.
        ious: Overlaps under which an anchor is background, and from which it is an object's.
        focal: The focal loss's α and γ.
        prior: The initial probability of an object.
        score_threshold: Detections have higher scores.
        pre_nms: Candidates of each map.
        nms_threshold: Of the suppression within a class.
        detections_per_image: At most as many are kept.
    """

    multiple_of = 32
    normalizer: Tensor

    def __init__(
        self,
        backbone: BackboneRecipe,
        state: dict[str, Tensor],
        num_classes: int,
        *,
        channels: int,
        norm: bool,
        num_conv: int,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        ious: tuple[float, float],
        focal: tuple[float, float],
        prior: float,
        score_threshold: float,
        pre_nms: int,
        nms_threshold: float,
        detections_per_image: int,
    ) -> None:
        super().__init__()
        self.num_classes, self.ious, self.focal = num_classes, ious, focal
        self.score_threshold, self.pre_nms, self.nms_threshold = score_threshold, pre_nms, nms_threshold
        self.detections_per_image = detections_per_image
        maps = trunk_maps(backbone, state)
        # Detectron2 makes the extra levels of the trunk's last map; torchvision does not if that has the pyramid's channels.
        extra = LastLevelP6P7(maps.channels[-1], channels)
        extra.use_P5 = False
        self.backbone = Pyramid(maps, 3, channels, norm, extra)
        self.anchors = Anchors(STRIDES, sizes, aspect_ratios)
        self.head = RetinaNetHead(channels, num_conv, self.anchors.per_position, num_classes, prior)
        self.register_buffer("normalizer", torch.tensor(START))

    @property
    @override
    def bottlenecks(self) -> bool:
        return self.backbone.trunk.bottlenecks

    def predict(self, images: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of each map the anchors, class logits and deltas."""
        maps = self.backbone(self.batch(images))
        return self.anchors(maps), *self.head(maps)

    @override
    def losses(self, images: list[Tensor], targets: list[Targets], rng: list[torch.Generator]) -> dict[str, Tensor]:
        parts = self.predict(images)
        anchors, logits, deltas = torch.cat(parts[0]), torch.cat(parts[1], dim=1), torch.cat(parts[2], dim=1)
        classes, objects = self.assign(anchors, targets)
        positive = (classes >= 0) & (classes < self.num_classes)
        counted = classes >= 0
        with torch.no_grad():  # the same number on all ranks
            number = mean(positive.sum().float()).clamp(min=1)
            self.normalizer.mul_(MOMENTUM).add_(number * (1 - MOMENTUM))
        truth = F.one_hot(classes[counted], self.num_classes + 1)[:, :-1].to(logits.dtype)  # background is no class
        alpha, gamma = self.focal
        of_class = sigmoid_focal_loss(logits[counted], truth, alpha, gamma, reduction="sum")
        image, place = positive.nonzero(as_tuple=True)
        wanted = encode_boxes(anchors[place], objects[image, place], WEIGHTS)
        of_box = (deltas[image, place] - wanted).abs().sum()
        normalizer = self.normalizer.clone()
        return {"class": of_class / normalizer, "box": of_box / normalizer}

    @torch.no_grad()
    def assign(self, anchors: Tensor, targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
        """(N, R) class of each anchor (``num_classes``: background, -1: ignored) and the (N, R, 4) box it belongs to."""
        classes, objects = [], []
        for target in targets:
            index, labels = match(
                target.boxes, anchors, negative_below=self.ious[0], positive_from=self.ious[1], keep_best=True
            )
            own = torch.full_like(index, self.num_classes)
            boxes = torch.zeros_like(anchors)
            if len(target.boxes):
                own = torch.where(labels == POSITIVE, target.labels[index], own)
                boxes = target.boxes[index]
            classes.append(torch.where(labels == IGNORED, torch.full_like(own, -1), own))
            objects.append(boxes)
        return torch.stack(classes), torch.stack(objects)

    @override
    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        every_anchor, every_logit, every_delta = self.predict(images)
        found = []
        for number, image in enumerate(images):
            boxes, scores, labels = [], [], []
            for anchors, logits, deltas in zip(every_anchor, every_logit, every_delta, strict=True):
                probability = logits[number].sigmoid()
                row, label = (probability > self.score_threshold).nonzero(as_tuple=True)
                best, order = probability[row, label].topk(min(len(row), self.pre_nms))
                row, label = row[order], label[order]
                boxes.append(decode_boxes(deltas[number][row], anchors[row], WEIGHTS))
                scores.append(best)
                labels.append(label)
            candidates, confidence, classes = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
            keep = batched_nms(candidates, confidence, classes, self.nms_threshold)[: self.detections_per_image]
            kept = clip_boxes(candidates[keep], image.shape[1], image.shape[2])
            found.append(Detections(kept, confidence[keep], classes[keep]))
        return found
