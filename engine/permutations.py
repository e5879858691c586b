"""Random permutations by which data sets are split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class Permutations:
    """The permutations that `torch.randperm` draws from a CPU generator of the same seed, one after another.

    Splits are drawn with it: they need no torch then, and stay what they are if a later torch draws in another way.
    (Fisher-Yates on the numbers of a Mersenne Twister, each modulo the number of places that are left.)
    """

    def __init__(self, seed: int) -> None:
        self._numbers = np.random.RandomState(seed & 0xFFFFFFFF)

    def next(self, num: int) -> npt.NDArray[np.int64]:
        """A permutation of 0, …, ``num`` - 1."""
        order = [*range(num)]
        if num > 1:
            drawn = self._numbers.randint(0, 1 << 32, num - 1, np.uint32).astype(np.int64)
            for place, step in enumerate((drawn % np.arange(num, 1, -1)).tolist()):
                order[place], order[place + step] = order[place + step], order[place]
        return np.array(order, np.int64)


def draw_per_class(
    targets: npt.NDArray[Any], num_classes: int, count: Callable[[int, int], int], permutations: Permutations
) -> npt.NDArray[np.bool_]:
    """Draw some images of every class.

    Args:
        targets: (N,) classes in [0, ``num_classes``).
        num_classes: Number of classes.
        count: How many to draw, given the class and the number of its images.
        permutations: Gives one permutation per class, in the order of the classes.

    Returns:
        (N,) bool: which images are drawn.
    """
    drawn = np.zeros(len(targets), np.bool_)
    for label in range(num_classes):
        own = np.flatnonzero(targets == label)
        num = count(label, len(own))
        drawn[own[permutations.next(len(own))[:num]]] = True
    return drawn
