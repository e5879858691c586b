"""Warnings about classifiers whose training does not work."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mixmask.engine.progress import say


class DivergenceWatch:
    """Says when a classifier's loss is well over that of one that knows nothing and does not fall.

    A rate that is too high does that. A loss that begins high and falls is no sign of it.

    Args:
        num_classes: Number of classes.
        settled: From which step on; a probe's first steps may jump with the published rates, too.
        slower: The override that takes a tenth of the rate.
    """

    def __init__(self, num_classes: int, settled: int, slower: str) -> None:
        self.start = math.log(max(num_classes, 2))  # of a classifier that knows nothing
        self.settled = settled
        self.slower = slower
        self.before: float | None = None
        self.said = False

    def __call__(self, line: Mapping[str, float], step: int) -> str | None:
        """A warning if this log line, at this step, shows a rate that is too high; only once."""
        before, self.before = self.before, line["loss"]
        falls = before is None or line["loss"] < 0.9 * before
        if self.said or step < self.settled or falls or not line["loss"] > 1.5 * self.start:
            return None
        self.said = True
        return (
            f"the loss is {line['loss']:.3g}, and chance level is {self.start:.3g}: the learning rate "
            f"is probably too high for these features. Try a tenth of it: {self.slower}"
        )


def say_if_at_chance(name: str, top1: float, num_classes: int) -> None:
    """Say so if a classifier with this top-1 in percent has learnt nothing."""
    chance = 100 / num_classes
    if num_classes > 2 and top1 <= 1.2 * chance:
        say(
            f"{name}: warning: top-1 is {top1:.2f} %, and guessing gives {chance:.2f} %: nothing was learnt. The "
            f"learning rate or the backbone does not fit"
        )
