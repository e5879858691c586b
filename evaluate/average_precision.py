"""Average precision of a detector on any resampling of the test images, from the matches it left."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixmask.engine.predictions import DetectionMatches
from mixmask.engine.progress import track
from mixmask.evaluate.statistics import CONFIDENCE, PairOfRuns

Floats = npt.NDArray[np.float64]

# The recalls at which precision is read: 11 points for VOC, 101 for COCO.
LEVELS = {"voc": np.arange(0.0, 1.1, 0.1), "coco": np.linspace(0.0, 1.0, 101)}
RESAMPLES = 1_000


class AveragePrecision:
    """AP in percent as a function of how often each image was drawn.

    With every image drawn once it is the metric of the record: VOC 2007's 11-point AP (section 3.4.1 of its paper) or
    COCOeval's 101-point AP. An image that was drawn twice is two images.
    """

    def __init__(self, matches: DetectionMatches, threshold: float | None = None) -> None:
        """Prepare the matches.

        Args:
            matches: The matches of a run.
            threshold: One of its IoU thresholds; None averages over all.
        """
        self.levels = LEVELS[matches.metric]
        # A class without objects counts 0 in VOC (as in Detectron2), and is left out in COCO.
        self.absent_is_zero = matches.metric == "voc"
        self.objects = matches.objects.astype(np.float64)  # (N, C)
        rows = np.arange(len(matches.thresholds))
        if threshold is not None:
            rows = np.flatnonzero(np.isclose(matches.thresholds, threshold))
            assert len(rows) == 1
        wrong = ~matches.found & ~matches.ignored
        self.classes: list[tuple[npt.NDArray[np.int64], Floats, Floats]] = []  # image (D,), found and wrong (T, D)
        for label in range(self.objects.shape[1]):
            own = np.flatnonzero(matches.label == label)
            self.classes.append(
                (
                    matches.image[own],
                    matches.found[np.ix_(rows, own)].astype(np.float64),
                    wrong[np.ix_(rows, own)].astype(np.float64),
                )
            )
        self.num_thresholds = len(rows)

    def __call__(self, drawn: Floats) -> float:
        """AP of a bootstrap sample, in percent.

        Args:
            drawn: (N,) how often each image was drawn.
        """
        totals = drawn @ self.objects  # (C,)
        per_class = []
        for total, (image, found, wrong) in zip(totals, self.classes, strict=True):
            if total > 0:
                per_class.append(float(self._class_ap(drawn[image], found, wrong, float(total)).mean()))
            elif self.absent_is_zero:
                per_class.append(0.0)
        return 100.0 * float(np.mean(per_class)) if per_class else 0.0

    def _class_ap(self, weight: Floats, found: Floats, wrong: Floats, total: float) -> Floats:
        """(T,) interpolated AP of one class in [0, 1], at each IoU threshold."""
        if not len(weight):
            return np.zeros(self.num_thresholds)
        hits = (found * weight).cumsum(axis=1)
        misses = (wrong * weight).cumsum(axis=1)
        recall = hits / total
        precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
        # The best precision at this recall or beyond.
        best_beyond = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        result = np.empty(self.num_thresholds)
        for row in range(self.num_thresholds):
            place = np.searchsorted(recall[row], self.levels, side="left")
            reached = place < recall.shape[1]
            result[row] = best_beyond[row, place[reached]].sum() / len(self.levels)
        return result


THRESHOLDS: dict[str, float | None] = {"AP": None, "AP50": 0.5, "AP75": 0.75}


def compare_detectors(
    metric: str,
    first: DetectionMatches,
    second: DetectionMatches,
    seed: int = 0,
) -> PairOfRuns:
    """Per-image bootstrap of the difference of two average precisions; both see the same resampled images.

    Args:
        metric: Ends in ``AP``, ``AP50`` or ``AP75``.
        first: Matches of the first detector.
        second: Of the second, on the same images.
        seed: Of the resampling.
    """
    both = [AveragePrecision(matches, THRESHOLDS[metric.split("/")[-1]]) for matches in (first, second)]
    num = len(first.objects)
    generator = np.random.default_rng(seed)
    gaps = np.empty(RESAMPLES)
    for number in track(f"{metric}: resampling {num:,} images", range(RESAMPLES), RESAMPLES, num):
        # Counts instead of images: matches within an image do not change, only their weight does.
        drawn = np.bincount(generator.integers(num, size=num), minlength=num).astype(np.float64)
        gaps[number] = both[0](drawn) - both[1](drawn)
    low, high = np.quantile(gaps, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    once = np.ones(num)
    return PairOfRuns(metric, (both[0](once), both[1](once)), float(low), float(high), num)
