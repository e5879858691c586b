"""What the RoI heads of two-stage detectors share: sampling, losses, detections, masks and keypoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.ops import batched_nms

from mixmask.transfer.detection.detector import Detections, Targets
from mixmask.transfer.detection.layers.boxes import POSITIVE, clip_boxes, decode_boxes, encode_boxes, match, sample
from mixmask.transfer.detection.layers.heads import MaskHead
from mixmask.transfer.detection.layers.keypoints import KeypointHead, inside, keypoint_loss, most_likely_places
from mixmask.transfer.detection.layers.recipes import RoIRecipe

# Of the x, y, width and height deltas (Detectron2's ROI_BOX_HEAD.BBOX_REG_WEIGHTS).
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class SampledBoxes:
    """The proposals of one image that enter the loss.

    Attributes:
        boxes: (S, 4).
        classes: (S,) int64; ``num_classes`` means background.
        matched: (S,) index of the matched ground-truth object, which means something for foreground boxes only.
    """

    boxes: Tensor
    classes: Tensor
    matched: Tensor


class RoIHeads(nn.Module, ABC):
    """What the heads on pooled regions share: sampling, losses and the selection of detections.

    A subclass pools the regions from its feature maps. After its own layers it calls `add_predictors`, then it sets the
    heads that it has, so that layers, and with them an optimizer's parameters, have the order of the computation.

    Args:
        num_classes: Foreground classes.
        recipe: The options for sampling and selection.
    """

    mask_head: MaskHead | None
    keypoint_head: KeypointHead | None

    def __init__(self, num_classes: int, recipe: RoIRecipe) -> None:
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        self.mask_head = self.keypoint_head = None

    def add_predictors(self, width: int) -> None:
        """Add ``classifier`` and ``regressor`` for vectors of a ``width``."""
        num_classes = self.num_classes
        self.classifier = nn.Linear(width, num_classes + 1)
        self.regressor = nn.Linear(width, 4 * num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.normal_(self.regressor.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        nn.init.zeros_(self.regressor.bias)

    @abstractmethod
    def vectors(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(R, width) vectors of the (·, 4) boxes of each image; also their pooled regions, if masks can use them."""

    @abstractmethod
    def for_masks(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """The pooled regions of boxes, as the mask head wants them."""

    def for_keypoints(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """The pooled regions of boxes, as the keypoint head wants them."""
        raise NotImplementedError

    def predict(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, classes + 1), background last, and box deltas (R, 4 · classes)."""
        return self.classifier(vectors).float(), self.regressor(vectors).float()

    @torch.no_grad()
    def sample(
        self, proposals: Sequence[Tensor], targets: Sequence[Targets], rng: Sequence[torch.Generator]
    ) -> list[SampledBoxes]:
        """Sample the boxes that enter the loss; each image has its own generator.

        Ground-truth boxes are added to the proposals, so that there are positives from the first step.
        """
        sampled = []
        for candidates, target, generator in zip(proposals, targets, rng, strict=True):
            candidates = torch.cat([candidates, target.boxes])
            threshold = self.recipe.iou_positive
            index, labels = match(
                target.boxes, candidates, negative_below=threshold, positive_from=threshold, keep_best=False
            )
            positive, negative = sample(
                (labels == POSITIVE).nonzero().flatten(),
                (labels != POSITIVE).nonzero().flatten(),
                self.recipe.batch_per_image,
                self.recipe.positive_fraction,
                generator,
            )
            chosen = torch.cat([positive, negative])
            truth = torch.full((len(chosen),), self.num_classes, device=chosen.device)
            truth[: len(positive)] = target.labels[index[positive]]
            sampled.append(SampledBoxes(candidates[chosen], truth, index[chosen]))
        return sampled

    def losses(
        self, maps: Sequence[Tensor], targets: Sequence[Targets], sampled: Sequence[SampledBoxes]
    ) -> dict[str, Tensor]:
        """Cross-entropy over the sampled boxes, L1 of the foreground ones over the number of all, masks and keypoints."""
        vectors, pooled = self.vectors(maps, [chosen.boxes for chosen in sampled])
        logits, deltas = self.predict(vectors)
        truth = torch.cat([chosen.classes for chosen in sampled])
        foreground = (truth < self.num_classes).nonzero().flatten()
        boxes, objects = [], []
        for target, chosen in zip(targets, sampled, strict=True):
            own = chosen.classes < self.num_classes
            boxes.append(chosen.boxes[own])
            objects.append(target.boxes[chosen.matched[own]])
        wanted = encode_boxes(torch.cat(boxes), torch.cat(objects), WEIGHTS)
        given = deltas.view(len(truth), self.num_classes, 4)[foreground, truth[foreground]]
        losses = {
            "roi_class": F.cross_entropy(logits, truth),
            # Over all boxes, as in Detectron2: a foreground box weighs the same, however many there are.
            "roi_box": F.smooth_l1_loss(given, wanted, reduction="sum", beta=self.recipe.smooth_l1_beta)
            / max(len(truth), 1),
        }
        if self.mask_head is not None:
            regions = self.for_masks(maps, boxes) if pooled is None else pooled[foreground]
            masks = self.mask_head(regions).float()
            losses["roi_mask"] = self._mask_loss(masks, truth[foreground], targets, sampled)
        if self.keypoint_head is not None:
            losses["roi_keypoint"] = self._keypoint_loss(self.keypoint_head, maps, boxes, targets, sampled)
        return losses

    def _mask_loss(
        self, logits: Tensor, labels: Tensor, targets: Sequence[Targets], sampled: Sequence[SampledBoxes]
    ) -> Tensor:
        if len(labels) == 0:
            # Without foreground, 0 that still gives every parameter of the mask head a gradient.
            return logits.sum() * 0
        wanted = []
        for target, chosen in zip(targets, sampled, strict=True):
            own = chosen.classes < self.num_classes
            for box, which in zip(chosen.boxes[own].tolist(), chosen.matched[own].tolist(), strict=True):
                wanted.append(rasterise(target.polygons[which], box, logits.shape[-1]))
        truth = torch.from_numpy(np.stack(wanted)).to(logits.device, logits.dtype)
        # Only the mask of the true class enters: classes do not compete (Mask R-CNN, section 3).
        own_class = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(own_class, truth)

    def _keypoint_loss(
        self,
        head: KeypointHead,
        maps: Sequence[Tensor],
        boxes: Sequence[Tensor],
        targets: Sequence[Targets],
        sampled: Sequence[SampledBoxes],
    ) -> Tensor:
        """Of the foreground boxes that hold a visible keypoint of their object."""
        usable, wanted = [], []
        for own, target, chosen in zip(boxes, targets, sampled, strict=True):
            assert target.keypoints is not None
            points = target.keypoints[chosen.matched[chosen.classes < self.num_classes]]
            held = inside(points, own).any(dim=1)
            usable.append(own[held])
            wanted.append(points[held])
        logits = head(self.for_keypoints(maps, usable)).float()
        return keypoint_loss(logits, torch.cat(usable), torch.cat(wanted))

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        """Detections of each image: score threshold, per-class non-maximum suppression, then masks or keypoints."""
        logits, deltas = self.predict(self.vectors(maps, proposals)[0])
        probabilities = logits.softmax(dim=1)[:, :-1]
        boxes = decode_boxes(deltas, torch.cat(proposals), WEIGHTS)
        counts = [len(p) for p in proposals]
        found = []
        for image_boxes, scores, (height, width) in zip(
            torch.split(boxes, counts), torch.split(probabilities, counts), sizes, strict=True
        ):
            finite = torch.isfinite(image_boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
            image_boxes, scores = image_boxes[finite], scores[finite]
            per_class = clip_boxes(image_boxes.view(len(scores), self.num_classes, 4), height, width)
            row, label = (scores > self.recipe.score_threshold).nonzero(as_tuple=True)
            candidates, confidence = per_class[row, label], scores[row, label]
            keep = batched_nms(candidates, confidence, label, self.recipe.nms_threshold)
            keep = keep[: self.recipe.detections_per_image]
            found.append(Detections(candidates[keep], confidence[keep], label[keep]))
        # Masks and keypoints belong to the final boxes, which need a RoIAlign of their own.
        final, counts = [one.boxes for one in found], [len(one.boxes) for one in found]
        if self.mask_head is not None:
            masks = self.mask_head(self.for_masks(maps, final)).float().sigmoid()
            labels = torch.cat([one.labels for one in found])
            parts = torch.split(masks[torch.arange(len(labels), device=labels.device), labels], counts)
            found = [replace(one, masks=own) for one, own in zip(found, parts, strict=True)]
        if self.keypoint_head is not None:
            logits = self.keypoint_head(self.for_keypoints(maps, final)).float()
            parts = torch.split(most_likely_places(logits, torch.cat(final)), counts)
            found = [replace(one, keypoints=own) for one, own in zip(found, parts, strict=True)]
        return found


def rasterise(polygons: list[list[float]], box: list[float], side: int) -> np.typing.NDArray[np.uint8]:
    """The part of an object's polygons (at least one) inside ``box``, drawn on a (side, side) grid of 0 and 1."""
    left, top, right, bottom = box
    scale_x, scale_y = side / max(right - left, 0.1), side / max(bottom - top, 0.1)
    moved = []
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        moved.append(((points - [left, top]) * [scale_x, scale_y]).ravel().tolist())
    mask: np.typing.NDArray[np.uint8] = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, side, side)))
    return mask
