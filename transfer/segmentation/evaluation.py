"""Intersection over union of a segmentation network's answers, image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mixmask.engine.distributed import gather_to_rank0, world
from mixmask.engine.normalization import normalize
from mixmask.engine.precision import Precision, autocast
from mixmask.engine.predictions import PixelCounts
from mixmask.engine.progress import track
from mixmask.transfer.segmentation.batches import test_images
from mixmask.transfer.segmentation.dataset import IGNORED, SegmentationSet
from mixmask.transfer.segmentation.network import FCN
from mixmask.transfer.segmentation.recipe import SegmentationTraining


def windows(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every ``stride`` pixels, the last one at the end."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


@torch.no_grad()
def logits_of(network: FCN, image: Tensor, size: tuple[int, int], window: int | None, stride: int | None) -> Tensor:
    """(1, classes, H, W) logits of one image.

    Args:
        network: In eval mode.
        image: (1, 3, h, w), normalised.
        size: (H, W) of the answer.
        window: Side of the squares that are seen one by one; None sees the whole image.
        stride: Pixels from one square to the next.
    """
    if window is None or stride is None:
        return network.resized(network(image)[0], size)
    height, width = image.shape[2:]
    total = image.new_zeros(1, network.num_classes, height, width, dtype=torch.float32)
    count = image.new_zeros(1, 1, height, width)
    for top in windows(height, window, stride):
        for left in windows(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            total[place] += network(image[place])[0]
            count[place] += 1
    return network.resized(total / count, size)


def count_pixels(answer: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per class: pixels where answer and label agree, pixels of the answer, pixels of the label; ignored ones left out.

    Args:
        answer: (H, W) int64 classes.
        labels: (H, W) classes or `IGNORED`.
        num_classes: C.

    Returns:
        Three (C,) int64.
    """
    counted = labels != IGNORED
    answer, labels = answer[counted], labels[counted].long()
    agreed = torch.bincount(labels[answer == labels], minlength=num_classes)
    return agreed, torch.bincount(answer, minlength=num_classes), torch.bincount(labels, minlength=num_classes)


def evaluate(
    network: FCN,
    images: SegmentationSet,
    recipe: SegmentationTraining,
    device: torch.device,
    precision: Precision,
    title: str,
) -> PixelCounts:
    """Answer all test images; on rank 0 the counts of all processes, on the others of none."""
    network.eval()
    view, num_classes = recipe.evaluation, len(images.classes)
    rows: list[tuple[int, Tensor]] = []
    total = len(range(world().rank, len(images), world().size))
    for image, labels, index in track(f"{title}: test images", test_images(images, recipe), total, 1):
        pixels = normalize(image[None].to(device)).contiguous(memory_format=torch.channels_last)
        size = (labels.shape[0], labels.shape[1])
        with autocast(device, precision):
            logits = logits_of(network, pixels, size, view.window, view.stride)
        counts = count_pixels(logits[0].argmax(dim=0), labels.to(device), num_classes)
        rows.append((index, torch.stack(counts).cpu()))
    every = sorted((row for share in gather_to_rank0(rows) for row in share), key=lambda row: row[0])
    table = torch.stack([counts for _, counts in every]).numpy() if every else np.zeros((0, 3, num_classes), np.int64)
    return PixelCounts(str(images.summary()["listing"]), table[:, 0], table[:, 1], table[:, 2])


def metrics_of(counts: PixelCounts, classes: Sequence[str]) -> dict[str, float]:
    """mIoU, pixel and mean class accuracy, and the IoU of every class, in percent.

    Classes that neither an answer nor a label has are left out of the means.
    """
    agreed, labelled = counts.agreed.sum(axis=0), counts.labelled.sum(axis=0)
    seen = labelled > 0
    found = {
        "mIoU": counts.mean_iou(),
        "pixel_accuracy": 100 * float(agreed.sum() / labelled.sum()),
        "mean_accuracy": 100 * float((agreed[seen] / labelled[seen]).mean()),
    }
    of_class = zip(classes, counts.iou().tolist(), strict=True)
    return {**found, **{f"IoU/{name}": 100 * value for name, value in of_class if not math.isnan(value)}}
