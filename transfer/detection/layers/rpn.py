"""A region proposal network (Faster R-CNN, arXiv:1506.01497, as Detectron2 builds it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from mixmask.transfer.detection.detector import Targets
from mixmask.transfer.detection.layers.boxes import (
    NEGATIVE,
    POSITIVE,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    grid_anchors,
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


class RPN(nn.Module):
    """Objectness and box deltas of every anchor on one feature map, and the proposals that follow from them."""

    cells: Tensor

    def __init__(self, channels: int, stride: int, recipe: RPNRecipe) -> None:
        super().__init__()
        self.recipe, self.stride = recipe, stride
        cells = cell_anchors(recipe.anchor_sizes, recipe.aspect_ratios)
        self.register_buffer("cells", cells, persistent=False)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.objectness = nn.Conv2d(channels, len(cells), kernel_size=1)
        self.deltas = nn.Conv2d(channels, 4 * len(cells), kernel_size=1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W) to anchors (R, 4), objectness logits (N, R) and deltas (N, R, 4), with R = H · W · A."""
        hidden = F.relu(self.conv(features))
        num, _, height, width = features.shape
        # float32 also under autocast: losses and box arithmetic need it.
        logits = self.objectness(hidden).float().permute(0, 2, 3, 1).reshape(num, -1)
        deltas = self.deltas(hidden).float().view(num, -1, 4, height, width).permute(0, 3, 4, 1, 2).reshape(num, -1, 4)
        return grid_anchors(self.cells, height, width, self.stride), logits, deltas

    @torch.no_grad()
    def proposals(self, anchors: Tensor, logits: Tensor, deltas: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """The proposals of each image, (P, 4): decoded, clipped, after non-maximum suppression, best first."""
        before = self.recipe.pre_nms_train if self.training else self.recipe.pre_nms_test
        after = self.recipe.post_nms_train if self.training else self.recipe.post_nms_test
        result = []
        for image_logits, image_deltas, (height, width) in zip(logits, deltas, sizes, strict=True):
            scores, order = image_logits.topk(min(before, len(image_logits)))
            boxes = decode_boxes(image_deltas[order], anchors[order], WEIGHTS)
            finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
            boxes, scores = clip_boxes(boxes[finite], height, width), scores[finite]
            large = nonempty(boxes)
            boxes, scores = boxes[large], scores[large]
            result.append(boxes[nms(boxes, scores, self.recipe.nms_threshold)[:after]])
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

    def losses(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, targets: Sequence[Targets], sampled: Sequence[Sampled]
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of sampled anchors and L1 of the positive ones, both over ``batch_per_image`` · N."""
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
