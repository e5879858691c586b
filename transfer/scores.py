"""Scores of classifiers, as their benchmarks define them; all in percent."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor

Score = Literal["top1", "mean_per_class", "mAP"]
TITLES: dict[str, str] = {"top1": "top-1", "mean_per_class": "mean per class", "mAP": "mAP"}
POINTS = np.linspace(0, 1, 11)  # recalls; compared with a margin, since 3/5 and 0.6 differ by rounding


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


def average_precision(scores: npt.NDArray[np.floating], present: npt.NDArray[np.bool_], points: bool = True) -> float:
    """Average precision of one class, in [0, 1].

    Args:
        scores: (N,) the larger, the more likely is the class in the image.
        present: (N,) whether it is.
        points: VOC 2007's: the mean of the interpolated precision at 11 recalls. Else the area below the interpolated
            precision (VOC 2010 and VISSL).
    """
    precision, recall, _ = precision_recall_curve(present, scores)  # from the highest recall down to 0
    interpolated = np.maximum.accumulate(precision[:-1])  # the highest precision at this recall or a higher one
    recall = recall[:-1]
    if points:
        return float(np.mean([interpolated[recall >= at].max(initial=0.0) for at in POINTS - 1e-9]))
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
