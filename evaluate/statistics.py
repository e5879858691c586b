"""Means over seeds, differences between groups of runs, and their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from mixmask.engine.predictions import PixelCounts

CONFIDENCE = 0.95
FEW_SEEDS = 5
RESAMPLES = 9_999

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """A mean over runs. ``std`` is the sample standard deviation (n - 1), None for a single run."""

    mean: float
    std: float | None
    n: int

    @property
    def half_interval(self) -> float | None:
        """Half the width of the 95 % t interval of the mean; None with fewer than three runs."""
        if self.std is None or self.n < 3:
            return None
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1)) * self.std / math.sqrt(self.n)


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of one or more values; their order does not matter."""
    ordered = sorted(values)
    return Summary(statistics.fmean(ordered), statistics.stdev(ordered) if len(ordered) > 1 else None, len(ordered))


def within_noise(one: Summary, best: Summary) -> bool:
    """Whether two means do not differ significantly at 5 % (Welch's t-test); False with fewer than three runs each."""
    if one.std is None or best.std is None or min(one.n, best.n) < 3:
        return False
    # Without any variance, the t-test is undefined.
    if one.std == best.std == 0:
        return one.mean == best.mean
    # Welch's and not the pooled test: two groups need not have equal variances.
    test = stats.ttest_ind_from_stats(one.mean, one.std, one.n, best.mean, best.std, best.n, equal_var=False)
    return bool(test.pvalue > 1 - CONFIDENCE)


@dataclass(frozen=True)
class Difference:
    """The difference between the means of two groups of runs, in percentage points.

    Attributes:
        value: Difference of the means.
        error: Its standard error; None where a group has one run.
        low, high: Confidence interval; None with fewer than three seeds in a group.
        n: Runs in each group; the number of pairs if ``paired``.
        paired: Whether the runs are paired by seed.
        p: p-value of the paired t-test; None if the runs are unpaired, too few, or all pairs differ equally.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None
    n: tuple[int, int]
    paired: bool
    p: float | None

    def words(self) -> str:
        """In words: ``+0.9 (SE 0.2), 5 seeds, 95 % CI [0.3, 1.5] (paired t interval), paired t-test p = 0.011``."""
        first, second = self.n
        num = f"{first} seeds" if first == second else f"{first} and {second} seeds"
        if max(self.n) == 1:
            num = "1 seed"
        digits = 1 if abs(self.value) >= 0.05 and (self.error is None or self.error >= 0.05) else 2
        error = f" (SE {self.error:.{digits}f})" if self.error is not None else ""
        parts = [f"{self.value:+.{digits}f}{error}", num]
        if self.low is not None and self.high is not None:
            method = "paired t interval" if self.paired else "Welch's t interval"
            interval = f"[{self.low:.{digits}f}, {self.high:.{digits}f}]"
            parts.append(f"{100 * CONFIDENCE:.0f} % CI {interval} ({method})")
        if self.paired and self.error is not None and self.p is None and max(self.n) > 1:
            parts.append("all pairs differ alike, so there is nothing to test")
        if self.p is not None:
            parts.append(f"paired t-test p {_p_words(self.p)}")
        if self.low is None:
            parts.append("too few seeds for an interval (at least 3)")
        return ", ".join(parts)


def _p_words(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def difference(first: Sequence[float], second: Sequence[float], paired: bool) -> Difference:
    """Compare two groups of runs.

    The interval is Student's t interval of the paired differences, or Welch's for two independent groups. It excludes 0
    exactly if the t-test has p < 0.05. A bootstrap over so few seeds is too narrow: with 3 to 5 pairs it covers 74
    to 91 %. Simulated coverage with 3 to 20 pairs: 95 % for normal differences, 93 to 94 % for skewed ones (skewness 1), 88
    to 92 % for exponential ones (skewness 2).

    Args:
        first: Values of the first group.
        second: Values of the second group, in the same order of seeds if ``paired``.
        paired: Compare run by run, each with that of the same seed.

    Raises:
        ValueError: If a group is empty, or ``paired`` groups have different sizes.
    """
    if not first or not second or (paired and len(first) != len(second)):
        raise ValueError(f"groups of {len(first)} and {len(second)} runs cannot be compared{' in pairs' * paired}")
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    value = statistics.fmean(first) - statistics.fmean(second)
    n, smallest = (len(a), len(b)), min(len(a), len(b))
    if smallest < 2:
        return Difference(value, None, None, None, n, paired, None)
    p = None
    if paired:
        gaps = a - b
        spread = float(gaps.std(ddof=1))
        error, freedom = spread / math.sqrt(len(gaps)), len(gaps) - 1.0
        # If all pairs differ equally, what is left is rounding noise, which must not be tested.
        varied = spread > 1e-9 * max(1.0, float(np.abs(gaps).max()))
        p = float(stats.ttest_rel(a, b).pvalue) if varied else None
    else:
        errors = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        error = math.sqrt(sum(errors))
        parts = errors[0] ** 2 / (len(a) - 1) + errors[1] ** 2 / (len(b) - 1)
        freedom = sum(errors) ** 2 / parts if parts > 0 else smallest - 1.0  # Welch and Satterthwaite
    if smallest < 3:
        return Difference(value, error, None, None, n, paired, p)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Difference(value, error, value - half, value + half, n, paired, p)


@dataclass(frozen=True)
class PairOfRuns:
    """Two runs on the same test images, in percent.

    Attributes:
        metric: What is compared.
        values: Of the first and the second run.
        low, high: 95 % confidence interval of the difference over images.
        images: Number of test images.
        p: p-value of McNemar's exact test; None for detectors.
    """

    metric: str
    values: tuple[float, float]
    low: float
    high: float
    images: int
    p: float | None = None

    @property
    def value(self) -> float:
        """The first minus the second, in points."""
        return self.values[0] - self.values[1]

    def words(self) -> str:
        """The comparison as one line of text."""
        text = (
            f"{self.metric} {self.values[0]:.1f} against {self.values[1]:.1f}: {self.value:+.1f}, "
            f"95 % CI [{self.low:.1f}, {self.high:.1f}] over {self.images:,} images (another training may differ more)"
        )
        return text + (f", McNemar p {_p_words(self.p)}" if self.p is not None else "")


def compare_classifiers(
    metric: str, first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_], seed: int = 0
) -> PairOfRuns:
    """Per-image bootstrap of the difference of two accuracies, and McNemar's exact test.

    The difference depends only on the numbers of images on which exactly one of the two is right, so a bootstrap sample
    draws these numbers instead of images.

    Args:
        metric: Its name.
        first: (N,) whether the first classifier is right.
        second: (N,) whether the second is, on the same images.
        seed: Of the resampling.
    """
    total = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([only_first, only_second, total - only_first - only_second]) / total
    resampled = np.random.default_rng(seed).multinomial(total, shares, size=RESAMPLES)
    gaps = 100.0 * (resampled[:, 0] - resampled[:, 1]) / total
    low, high = np.quantile(gaps, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    discordant = only_first + only_second
    # McNemar: if the two are equally good, either is right on half of the images on which they disagree.
    p = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    values = (100.0 * float(first.mean()), 100.0 * float(second.mean()))
    return PairOfRuns(metric, values, float(low), float(high), total, p)


def compare_segmentations(first: PixelCounts, second: PixelCounts, seed: int = 0) -> PairOfRuns:
    """Per-image bootstrap of the difference of two mIoUs; both see the same resampled images.

    Args:
        first: The counts of the first network.
        second: Of the second, on the same images.
        seed: Of the resampling.
    """
    num = len(first.agreed)
    generator = np.random.default_rng(seed)
    gaps = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = np.bincount(generator.integers(num, size=num), minlength=num).astype(np.float64)
        gaps[number] = first.mean_iou(drawn) - second.mean_iou(drawn)
    low, high = np.quantile(gaps, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PairOfRuns("mIoU", (first.mean_iou(), second.mean_iou()), float(low), float(high), num)
