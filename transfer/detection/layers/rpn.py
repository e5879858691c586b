"""A region proposal network (Faster R-CNN, arXiv:1506.01497, as Detectron2 builds it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from mixmask.transfer.detection.detector import Targets
from mixmask.transfer.detection.layers.anchors import Anchors, by_anchor
from mixmask.transfer.detection.layers.boxes import (
    NEGATIVE,
    POSITIVE,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    match,
    nonempty,
    sample,
)
from mixmask.transfer.detection.layers.recipes import RPNRecipe

# Of the x, y, width and height deltas (Detectron2's RPN.BBOX_REG_WEIGHTS).
WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Sampled:
    """The anchors of one image that enter the loss.

    Attributes:
        positive: (P,) indices of anchors.
        negative: (Q,) indices of anchors.
        matched: (P,) index of the ground-truth object of each positive anchor.
    """

    positive: Tensor
    negative: Tensor
    matched: Tensor


@dataclass(frozen=True)
class Regions:
    """What the RPN says of every anchor, per map: ``anchors`` (R, 4), ``logits`` (N, R) and ``deltas`` (N, R, 4)."""

    anchors: list[Tensor]
    logits: list[Tensor]
    deltas: list[Tensor]

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors, logits and deltas of all maps as one, the finest map first."""
        return torch.cat(self.anchors), torch.cat(self.logits, dim=1), torch.cat(self.deltas, dim=1)


class RPN(nn.Module):
    """Objectness and box deltas of every anchor on one map or on a pyramid's, and the proposals that follow from them.

    Args:
        channels: Channels of every map.
        strides: The stride of each map.
        sizes: The anchor sizes of each map.
        recipe: The options for sampling and selection; its ``anchor_sizes`` are not looked at.
    """

    def __init__(
        self, channels: int, strides: Sequence[int], sizes: Sequence[Sequence[float]], recipe: RPNRecipe
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.anchors = Anchors(strides, sizes, recipe.aspect_ratios)
        num = self.anchors.per_position
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.objectness = nn.Conv2d(channels, num, kernel_size=1)
        self.deltas = nn.Conv2d(channels, 4 * num, kernel_size=1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> Regions:
        """The layers, shared by all (N, C, H, W) maps, on each of them."""
        hidden = [F.relu(self.conv(one)) for one in maps]
        return Regions(
            self.anchors(maps),
            [by_anchor(self.objectness(one), 1).squeeze(2) for one in hidden],
            [by_anchor(self.deltas(one), 4) for one in hidden],
        )

    @torch.no_grad()
    def proposals(self, regions: Regions, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """The proposals of each image, (P, 4): decoded, clipped, after non-maximum suppression, best first.

        Each map gives its best ``pre_nms``; suppression is within a map, and ``post_nms`` are kept of all maps.
        """
        before = self.recipe.pre_nms_train if self.training else self.recipe.pre_nms_test
        after = self.recipe.post_nms_train if self.training else self.recipe.post_nms_test
        result = []
        for number, (height, width) in enumerate(sizes):
            parts = []
            for level, (anchors, logits, deltas) in enumerate(
                zip(regions.anchors, regions.logits, regions.deltas, strict=True)
            ):
                scores, order = logits[number].topk(min(before, logits.shape[1]))
                boxes = decode_boxes(deltas[number][order], anchors[order], WEIGHTS)
                parts.append((boxes, scores, torch.full_like(order, level)))
            boxes, scores, levels = (torch.cat(part) for part in zip(*parts, strict=True))
            finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
            boxes, scores, levels = clip_boxes(boxes[finite], height, width), scores[finite], levels[finite]
            large = nonempty(boxes)
            boxes, scores, levels = boxes[large], scores[large], levels[large]
            if len(parts) == 1:
                keep = nms(boxes, scores, self.recipe.nms_threshold)
            else:
                keep = batched_nms(boxes, scores, levels, self.recipe.nms_threshold)
            result.append(boxes[keep[:after]])
        return result

    @torch.no_grad()
    def sample(self, anchors: Tensor, targets: Sequence[Targets], rng: Sequence[torch.Generator]) -> list[Sampled]:
        """Sample the anchors that enter the loss; each image has its own generator."""
        recipe = self.recipe
        sampled = []
        for target, generator in zip(targets, rng, strict=True):
            index, labels = match(
                target.boxes,
                anchors,
                negative_below=recipe.iou_negative,
                positive_from=recipe.iou_positive,
                keep_best=True,  # every object gets an anchor, even if none reaches iou_positive
            )
            positive, negative = sample(
                (labels == POSITIVE).nonzero().flatten(),
                (labels == NEGATIVE).nonzero().flatten(),
                recipe.batch_per_image,
                recipe.positive_fraction,
                generator,
            )
            sampled.append(Sampled(positive, negative, index[positive]))
        return sampled

    def losses(self, regions: Regions, targets: Sequence[Targets], rng: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Binary cross-entropy of sampled anchors and L1 of the positive ones, both over ``batch_per_image`` · N.

        Args:
            regions: What `forward` gave.
            targets: The objects of each image.
            rng: One generator per image, from which anchors are sampled.
        """
        anchors, logits, deltas = regions.joined()
        sampled = self.sample(anchors, targets, rng)
        objectness = logits.new_zeros(())
        location = logits.new_zeros(())
        for image_logits, image_deltas, target, chosen in zip(logits, deltas, targets, sampled, strict=True):
            both = torch.cat([chosen.positive, chosen.negative])
            truth = torch.zeros(len(both), device=both.device)
            truth[: len(chosen.positive)] = 1
            objectness = objectness + F.binary_cross_entropy_with_logits(image_logits[both], truth, reduction="sum")
            wanted = encode_boxes(anchors[chosen.positive], target.boxes[chosen.matched], WEIGHTS)
            location = location + (image_deltas[chosen.positive] - wanted).abs().sum()  # of none, 0 with a gradient
        # Fixed, as in Detectron2, even where fewer anchors were sampled.
        normaliser = self.recipe.batch_per_image * len(targets)
        return {"rpn_objectness": objectness / normaliser, "rpn_box": location / normaliser}
