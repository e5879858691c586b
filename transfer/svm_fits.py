"""Fits of linear SVMs, one class at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from mixmask.engine.randomness import derived_seed
from mixmask.transfer.scores import average_precision

if TYPE_CHECKING:
    from mixmask.transfer.protocols.svm_voc07 import SvmVoc07Recipe

Array = npt.NDArray[Any]


def _svm(recipe: SvmVoc07Recipe, cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost, class_weight={True: 2, False: 1}, dual=True, max_iter=recipe.max_iter,
        random_state=derived_seed(recipe.seed, "svm") % 2**31,
    )  # fmt: skip


def one_class(
    recipe: SvmVoc07Recipe, label: int, features: Array, labels: Array, asked: Array, answers: Array
) -> tuple[float, float, float]:
    """The chosen C of one class, and the AP of its SVM at 11 recalls and by area."""
    known = labels[:, label] >= 0
    inputs, wanted, truth = features[known], labels[known, label] == 1, answers[:, label]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published protocol stops at max_iter, too
        cost = recipe.costs[0] if len(recipe.costs) == 1 else _chosen(recipe, inputs, wanted)
        scores = _svm(recipe, cost).fit(inputs, wanted).decision_function(asked)
    return cost, _precision(scores, truth, points=True), _precision(scores, truth, points=False)


def _chosen(recipe: SvmVoc07Recipe, features: Array, wanted: Array) -> float:
    """The C with the highest mean average precision over the folds; the first of equals."""
    folds = StratifiedKFold(recipe.folds)
    means = [
        cross_val_score(_svm(recipe, cost), features, wanted, cv=folds, scoring="average_precision").mean()
        for cost in recipe.costs
    ]
    return recipe.costs[int(np.argmax(means))]


def low_shot(
    recipe: SvmVoc07Recipe, k: int, sample: int, features: Array, labels: Array, asked: Array, answers: Array
) -> float:
    """Mean AP of SVMs from one draw of k images per class, in percent."""
    rng = np.random.default_rng(derived_seed(recipe.seed, "low shot", sample, k))
    found = []
    for label in range(labels.shape[1]):
        positives = rng.permutation(np.flatnonzero(labels[:, label] == 1))[:k]
        absent = labels[:, label] == 0
        others = [absent & (labels[:, c] == 1) for c in range(labels.shape[1]) if c != label]
        drawn = [rng.permutation(np.flatnonzero(one))[:k] for one in others]
        # Where no other class has an image without this one, any image without it is a negative.
        negatives = np.unique(np.concatenate(drawn)) if any(map(len, drawn)) else np.flatnonzero(absent)
        rows = np.concatenate([positives, negatives])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            svm = _svm(recipe, recipe.low_shot_c).fit(features[rows], np.arange(len(rows)) < len(positives))
        found.append(_precision(svm.decision_function(asked), answers[:, label], True))
    return 100 * float(np.mean(found))


def _precision(scores: Sequence[float] | Array, truth: Array, points: bool) -> float:
    known = truth >= 0
    return average_precision(np.asarray(scores)[known], truth[known] == 1, points)
