"""Keypoints of regions: Mask R-CNN's branch for human poses (arXiv:1703.06870, section 5), its loss and its answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override


class KeypointHead(nn.Sequential):
    """3×3 convolutions, a transposed convolution, and a bilinear doubling: (R, C, S, S) to (R, K, 4S, 4S) logits.

    Layers, names and initial weights are those of Detectron2's ``KRCNNConvDeconvUpsampleHead``.

    Args:
        channels: C.
        conv_dims: The channels of each convolution.
        num_keypoints: K.
    """

    def __init__(self, channels: int, conv_dims: Sequence[int], num_keypoints: int) -> None:
        super().__init__()
        for number, dim in enumerate(conv_dims, start=1):
            self.add_module(f"conv_fcn{number}", nn.Conv2d(channels, dim, kernel_size=3, padding=1))
            self.add_module(f"conv_fcn_relu{number}", nn.ReLU())
            channels = dim
        self.score_lowres = nn.ConvTranspose2d(channels, num_keypoints, kernel_size=4, stride=2, padding=1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    @override
    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input)
        return F.interpolate(input, scale_factor=2, mode="bilinear", align_corners=False)


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(R, K) whether the (R, K, 3) keypoints of each of the (R, 4) boxes are labelled and in it, its border included."""
    x, y, labelled = points.unbind(dim=2)
    left, top, right, bottom = (side[:, None] for side in boxes.unbind(dim=1))
    return (labelled > 0) & (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def to_cells(points: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cell of each keypoint on a grid over its box.

    A box's right and bottom border belong to its last cells.

    Args:
        points: (R, K, 3): x, y, and 0 for a keypoint that is not labelled.
        boxes: (R, 4).
        size: Cells along each side.

    Returns:
        (R, K) int64 numbers of the cells, row by row, and (R, K) whether the keypoint is labelled and in its box.
    """
    counted = inside(points, boxes)
    corner, extent = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    places = ((points[..., :2] - corner) * (size / extent)).floor()
    places = torch.where(counted[..., None], places, torch.zeros_like(places)).long().clamp(0, size - 1)
    return places[..., 1] * size + places[..., 0], counted


def keypoint_loss(logits: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """Cross-entropy over the cells of the grid, averaged over the labelled keypoints in their boxes.

    Args:
        logits: (R, K, S, S).
        boxes: (R, 4).
        points: (R, K, 3), of the object of each box.
    """
    cells, counted = to_cells(points, boxes, logits.shape[-1])
    if not counted.any():
        # 0 that still gives every parameter of the head a gradient.
        return logits.sum() * 0
    return F.cross_entropy(logits.flatten(2)[counted], cells[counted])


def most_likely_places(logits: Tensor, boxes: Tensor) -> Tensor:
    """(R, K, 3): the x and y of each keypoint, and its probability.

    The logits are resized to the pixels of the box (bicubic); a keypoint is in the middle of the pixel with the largest one.
    The probability is that of a softmax over the cells of the head's own grid, so that small and large objects compare.

    Args:
        logits: (R, K, S, S).
        boxes: (R, 4).
    """
    found = logits.new_zeros(*logits.shape[:2], 3)
    extents = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    for number, (width, height) in enumerate(extents.ceil().int().tolist()):
        own = F.interpolate(logits[number : number + 1], size=(height, width), mode="bicubic", align_corners=False)[0]
        best, place = own.flatten(1).max(dim=1)
        pixels = torch.stack([place % width, place // width], dim=1) + 0.5
        scale = extents[number] / extents[number].ceil()  # the pixels of a box are not whole
        found[number, :, :2] = pixels * scale + boxes[number, :2]
        found[number, :, 2] = 1 / (logits[number].flatten(1) - best[:, None]).exp().sum(dim=1)
    return found
