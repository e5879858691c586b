"""Anchors, box coding, matching and sampling, in Detectron2's conventions.

Boxes are (N, 4) left, top, right, bottom in continuous pixel coordinates: a box of one pixel is 1 wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

SCALE_CLAMP = math.log(1000.0 / 16)  # Detectron2's limit on a side's growth, so that exp cannot overflow

IGNORED, NEGATIVE, POSITIVE = -1, 0, 1


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors around the origin: (sizes × ratios, 4), sizes vary slowest. As in Detectron2, sides are not rounded.

    Args:
        sizes: Square roots of the anchors' areas, in pixels.
        aspect_ratios: Height over width.
    """
    rows = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            rows.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(rows)


def grid_anchors(cells: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Anchors of a feature map: (height · width · A, 4), rows first, then columns, then the A cell anchors."""
    y, x = torch.meshgrid(
        torch.arange(height, device=cells.device) * stride,
        torch.arange(width, device=cells.device) * stride,
        indexing="ij",
    )
    shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (shifts + cells).reshape(-1, 4)


def encode_boxes(reference: Tensor, target: Tensor, weights: Sequence[float]) -> Tensor:
    """Regression targets that move ``reference`` onto ``target`` (R-CNN, arXiv:1311.2524, appendix C)."""
    width, height = reference[:, 2] - reference[:, 0], reference[:, 3] - reference[:, 1]
    x, y = reference[:, 0] + 0.5 * width, reference[:, 1] + 0.5 * height
    target_width, target_height = target[:, 2] - target[:, 0], target[:, 3] - target[:, 1]
    target_x, target_y = target[:, 0] + 0.5 * target_width, target[:, 1] + 0.5 * target_height
    wx, wy, ww, wh = weights
    return torch.stack(
        [
            wx * (target_x - x) / width,
            wy * (target_y - y) / height,
            ww * torch.log(target_width / width),
            wh * torch.log(target_height / height),
        ],
        dim=1,
    )


def decode_boxes(deltas: Tensor, reference: Tensor, weights: Sequence[float]) -> Tensor:
    """Apply (N, 4k) deltas to (N, 4) boxes, giving (N, 4k); a side grows at most 1000/16 times."""
    deltas = deltas.float()
    reference = reference.to(deltas.dtype)
    width, height = reference[:, 2] - reference[:, 0], reference[:, 3] - reference[:, 1]
    x, y = reference[:, 0] + 0.5 * width, reference[:, 1] + 0.5 * height
    wx, wy, ww, wh = weights
    centre_x = deltas[:, 0::4] / wx * width[:, None] + x[:, None]
    centre_y = deltas[:, 1::4] / wy * height[:, None] + y[:, None]
    new_width = torch.exp((deltas[:, 2::4] / ww).clamp(max=SCALE_CLAMP)) * width[:, None]
    new_height = torch.exp((deltas[:, 3::4] / wh).clamp(max=SCALE_CLAMP)) * height[:, None]
    corners = [
        centre_x - 0.5 * new_width,
        centre_y - 0.5 * new_height,
        centre_x + 0.5 * new_width,
        centre_y + 0.5 * new_height,
    ]
    return torch.stack(corners, dim=-1).reshape(deltas.shape)


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Cut (…, 4) boxes to the image."""
    limits = torch.tensor([width, height, width, height], device=boxes.device, dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)


def nonempty(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    """(N,) bool: wider and higher than ``threshold`` pixels."""
    return (boxes[:, 2] - boxes[:, 0] > threshold) & (boxes[:, 3] - boxes[:, 1] > threshold)


def match(
    truth: Tensor, boxes: Tensor, *, negative_below: float, positive_from: float, keep_best: bool
) -> tuple[Tensor, Tensor]:
    """Give each box the object that it overlaps most.

    Args:
        truth: (G, 4) objects; may be empty.
        boxes: (N, 4).
        negative_below: Overlap (IoU) under which a box is background.
        positive_from: Overlap from which it is foreground; in between it is ignored.
        keep_best: For every object, also label the boxes with its highest overlap as foreground, however low it is.

    Returns:
        (N,) index of the matched object, and (N,) int8 label: 1, 0 or -1 (ignored).
    """
    num = len(boxes)
    if len(truth) == 0:
        return (
            torch.zeros(num, dtype=torch.int64, device=boxes.device),
            torch.full((num,), NEGATIVE, dtype=torch.int8, device=boxes.device),
        )
    overlap = box_iou(truth, boxes)  # (G, N)
    best, index = overlap.max(dim=0)
    labels = torch.full((num,), IGNORED, dtype=torch.int8, device=boxes.device)
    labels[best < negative_below] = NEGATIVE
    labels[best >= positive_from] = POSITIVE
    if keep_best:
        highest = overlap.max(dim=1).values
        labels[(overlap == highest[:, None]).any(dim=0)] = POSITIVE
    return index, labels


def sample(
    positive: Tensor, negative: Tensor, num: int, positive_fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw up to ``num`` indices, of which at most ``positive_fraction`` from ``positive``, the rest from ``negative``.

    Args:
        positive: (P,) indices.
        negative: (Q,) indices.
        num: How many in all.
        positive_fraction: Largest share of positives.
        generator: Where the draws come from.
    """
    num_positive = min(len(positive), int(num * positive_fraction))
    num_negative = min(len(negative), num - num_positive)
    # On the CPU, where the generator is: every device gets the same draws.
    first = torch.randperm(len(positive), generator=generator)[:num_positive]
    second = torch.randperm(len(negative), generator=generator)[:num_negative]
    return positive[first.to(positive.device)], negative[second.to(negative.device)]
