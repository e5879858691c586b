"""Scores of classifiers, as their benchmarks define them; all in percent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor

Score = Literal["top1", "mean_per_class", "mAP"]
TITLES: dict[str, str] = {"top1": "top-1", "mean_per_class": "mean per class", "mAP": "mAP"}


def mean_per_class(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the share of a class's images that are predicted right.

    Args:
        predicted: (N,) int64.
        labels: (N,) int64; classes without images do not count.
    """
    counts = torch.bincount(labels)
    right = torch.bincount(labels[predicted == labels], minlength=len(counts))
    present = counts > 0
    return 100.0 * float((right[present].double() / counts[present]).mean())


def eleven_point_ap(recall: npt.NDArray[np.floating], precision: npt.NDArray[np.floating]) -> float:
    """Mean over the recalls 0, 0.1, …, 1 of the best precision at that recall or beyond (VOC 2007, section 3.4.1).

    The recalls are those of Detectron2's loop, rounding included: 0.6 is 0.6000000000000001 there, and 3/5 is below it.

    Args:
        recall: (D,) after each detection, in order of confidence.
        precision: (D,) likewise.
    """
    total = 0.0
    for level in np.arange(0.0, 1.1, 0.1):
        reached = precision[recall >= level]
        total += float(reached.max()) / 11 if len(reached) else 0.0
    return total


def average_precision(scores: npt.NDArray[np.floating], present: npt.NDArray[np.bool_], points: bool = True) -> float:
    """Average precision of one class, in [0, 1].

    Args:
        scores: (N,) the larger, the more likely is the class in the image.
        present: (N,) whether it is.
        points: VOC 2007's: the mean of the interpolated precision at 11 recalls. Else the area below the interpolated
            precision (VOC 2010 and VISSL).
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(present, scores)  # from the highest recall down to 0
    if points:
        return eleven_point_ap(recall[:-1], precision[:-1])
    interpolated = np.maximum.accumulate(precision[:-1])  # the highest precision at this recall or a higher one
    recall = recall[:-1]
    return float(np.sum((recall - np.append(recall[1:], 0.0)) * interpolated))


def mean_average_precision(scores: Tensor, labels: Tensor, points: bool = True) -> float:
    """Mean of `average_precision` over the classes that some image has.

    Args:
        scores: (N, C).
        labels: (N, C) of 1, 0, and -1 for images that do not count for the class.
        points: As `average_precision` takes it.
    """
    found = []
    for one, truth in zip(scores.T.double().cpu().numpy(), labels.T.cpu().numpy(), strict=True):
        counts = truth >= 0
        if (truth == 1).any():
            found.append(average_precision(one[counts], truth[counts] == 1, points))
    return 100.0 * float(np.mean(found))
