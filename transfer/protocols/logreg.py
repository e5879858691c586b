"""Logistic regression on frozen features, its regularisation chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import override

from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError
from mixmask.engine.gradients import without_gradients
from mixmask.engine.images import ImageSet
from mixmask.engine.knn import top1
from mixmask.engine.late import torch
from mixmask.engine.progress import say, track
from mixmask.transfer.classification import Images, save_answers, trunk_of
from mixmask.transfer.features import FrozenRecipe, frozen_features
from mixmask.transfer.logistic import fit_logistic
from mixmask.transfer.scores import TITLES, Score, mean_average_precision, mean_per_class
from mixmask.transfer.selection import require_held_out, split_for_choice

if TYPE_CHECKING:
    from torch import Tensor, nn


class LogregRecipe(FrozenRecipe):
    """Multinomial logistic regression by L-BFGS (many-shot protocol of arXiv:2011.13377, after arXiv:1805.08974).

    ``num_c`` values of C, spaced evenly in the logarithm from ``min_c`` to ``max_c``, are tried on the official validation
    split, or on the share ``held_out`` of every class, from the smallest to the largest, each from the solution of the one
    before. The best one is fitted in the same way on all training images, and tested. The objective is scikit-learn's: C · Σ
    cross-entropy + |W|² / 2. Features are not standardised.

    ``metric`` is what the benchmark of the data set reports: ``top1``, ``mean_per_class``, or ``mAP`` (VOC 2007, 11-point)
    of multi-label images, for which there is a binary problem for each class.
    """

    multi_label: ClassVar[bool] = True

    protocol: Literal["logreg"]
    metric: Score = "top1"
    num_c: int = Field(45, ge=1, le=1000)
    min_c: float = Field(1e-5, gt=0, le=1e30)
    max_c: float = Field(1e6, gt=0, le=1e30)
    iterations: int = Field(100, ge=1, le=10**6)
    held_out: float = Field(0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _range(self) -> LogregRecipe:
        if self.min_c > self.max_c or (self.num_c > 1 and self.min_c == self.max_c):
            raise ValueError(f"min_c {self.min_c:g} must be below max_c {self.max_c:g}")
        return self

    @property
    @override
    def title(self) -> str:
        return "logistic regression"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {f"logreg/{self.metric}": f"logreg {TITLES[self.metric]}"}

    @property
    def costs(self) -> list[float]:
        """The values of C, ascending."""
        return [float(c) for c in np.geomspace(self.min_c, self.max_c, self.num_c)]

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        choice = "official validation split" if train.validation is not None else f"{self.held_out:g} of every class"
        return {"C": f"best of {self.num_c} on {choice}", "iterations": self.iterations}

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = super().open(open_images)
        multi_label = train.targets.ndim == 2
        if multi_label != (self.metric == "mAP"):
            have, valid = ("several labels", "mAP") if multi_label else ("one label", "top1, mean_per_class")
            raise ConfigError(
                f"metric {self.metric}: the images of '{self.data.name}' have {have} each; valid: {valid}"
            )
        if self.num_c > 1:
            require_held_out(train, self.held_out, self.seed)
        return train, test

    def measure(self, setting: Images) -> dict[str, float]:
        """The score on the test images, in percent; the score of every C on the held-out ones; and the C that was chosen."""
        (features, labels), (asked, answers) = (
            frozen_features(self, setting, images, lambda: trunk_of(setting).eval())
            for images in (setting.train, setting.test)
        )
        scores: dict[float, float] = {}
        best = self.costs[0]
        if self.num_c > 1:
            rows = split_for_choice(setting.train, self.held_out, self.seed, rows=True)
            learnt, kept = (torch.from_numpy(part).to(features.device) for part in rows)
            head = self._head(features, setting)
            # From strong to weak regularisation: each solution is a good start for the next one.
            for cost in track(f"{self.name}: values of C", iter(self.costs), self.num_c, len(learnt)):
                self._fit(head, features[learnt], labels[learnt], cost)
                scores[cost] = self._score(_logits(head, features[kept]), labels[kept])[self.metric]
            best = max(scores, key=lambda cost: scores[cost])
        head = self._head(features, setting)
        # The same road as on the held-out images: a fit that starts at zero could be far from where that one ended.
        for cost in [cost for cost in self.costs if cost <= best]:
            self._fit(head, features, labels, cost)
        logits = _logits(head, asked)
        found = self._score(logits, answers)
        if answers.ndim == 1:
            save_answers(self, setting, logits.argmax(dim=1), answers)
        say(f"{self.name}: {TITLES[self.metric]} {found[self.metric]:.2f} % with C = {best:.3g}")
        return {
            **{f"logreg/{name}": value for name, value in found.items()},
            "logreg/chosen_C": best,
            **{f"logreg/held_out/C={cost:.4g}": score for cost, score in scores.items()},
        }

    def _head(self, features: Tensor, setting: Images) -> nn.Linear:
        head = torch.nn.Linear(features.shape[1], len(setting.train.classes), device=features.device)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        return head

    def _fit(self, head: nn.Linear, features: Tensor, labels: Tensor, cost: float) -> None:
        weights = (labels >= 0).to(features.dtype) if labels.ndim == 2 else None
        wanted = labels.clamp(min=0) if labels.ndim == 2 else labels
        decay = 1 / (cost * len(features))
        fit_logistic(features, wanted, head, weight_decay=decay, iterations=self.iterations, weights=weights)

    def _score(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        if labels.ndim == 2:
            return {"mAP": mean_average_precision(logits, labels)}
        predicted = logits.argmax(dim=1)
        return {"top1": top1(predicted, labels), "mean_per_class": mean_per_class(predicted, labels)}


@without_gradients
def _logits(head: nn.Linear, features: Tensor) -> Tensor:
    logits: Tensor = head(features)
    return logits
