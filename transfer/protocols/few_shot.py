"""Few-shot classification with frozen features: episodes of a few classes with a few labelled images each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError
from mixmask.engine.images import ImageSet
from mixmask.engine.late import torch
from mixmask.engine.progress import say
from mixmask.engine.randomness import generator
from mixmask.transfer.classification import Images, trunk_of
from mixmask.transfer.features import FrozenRecipe, frozen_features

if TYPE_CHECKING:
    from torch import Tensor


class FewShotRecipe(FrozenRecipe):
    """Nearest class mean in ``episodes`` random episodes (few-shot protocol of arXiv:2011.13377, after arXiv:1703.05175).

    An episode has ``ways`` classes, ``shots`` labelled images of each, and ``queries`` others of each to classify by the
    Euclidean distance to the means. Images are drawn from ``images``: the test images, or all.
    """

    protocol: Literal["few_shot"]
    ways: int = Field(5, ge=2, le=10**6)
    shots: int = Field(5, ge=1, le=10**6)
    queries: int = Field(15, ge=1, le=10**6)
    episodes: int = Field(600, ge=2, le=10**7)
    images: Literal["all", "test"] = "all"

    @property
    @override
    def record_name(self) -> str:
        return f"few_shot_{self.ways}_way_{self.shots}_shot"

    @property
    @override
    def title(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {"few_shot/top1": f"{self.title} top-1"}

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        return {"episodes": self.episodes, "queries": self.queries, "images": self.images}

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = super().open(open_images)
        if self.ways > len(test.classes):
            raise ConfigError(f"ways {self.ways} is larger than the {len(test.classes)} classes of '{self.data.name}'")
        counts = np.bincount(test.targets, minlength=len(test.classes))
        if self.images == "all":
            counts += np.bincount(train.targets, minlength=len(test.classes))
        needed = self.shots + self.queries
        enough = int((counts >= needed).sum())
        if enough < self.ways:
            name, fewest = test.classes[int(counts.argmin())], int(counts.min())
            raise ConfigError(
                f"shots {self.shots} and queries {self.queries} need {needed} images of a class; {enough} classes of "
                f"'{self.data.name}' have so many, and ways is {self.ways} (class '{name}' has {fewest})"
            )
        return train, test

    def measure(self, setting: Images) -> dict[str, float]:
        """Mean top-1 of the episodes in percent, and half the width of its 95 % confidence interval."""
        parts = [setting.train, setting.test] if self.images == "all" else [setting.test]
        found = [frozen_features(self, setting, images, lambda: trunk_of(setting).eval()) for images in parts]
        features, labels = (torch.cat([one[part] for one in found]) for part in (0, 1))
        of_class = [(labels == label).nonzero().flatten() for label in range(len(setting.test.classes))]
        usable = [rows for rows in of_class if len(rows) >= self.shots + self.queries]
        scores = (
            torch.stack([self._episode(number, features, usable) for number in range(self.episodes)]).double().cpu()
        )
        mean, half = float(scores.mean()), 1.96 * float(scores.std()) / math.sqrt(self.episodes)
        say(f"{self.name}: {self.title} top-1 {mean:.2f} ± {half:.2f} % (95 % interval over {self.episodes} episodes)")
        return {"few_shot/top1": mean, "few_shot/interval": half}

    def _episode(self, number: int, features: Tensor, of_class: list[Tensor]) -> Tensor:
        """Top-1 of one episode, in percent."""
        draws = generator(self.seed, "episode", number)
        classes = torch.randperm(len(of_class), generator=draws)[: self.ways].tolist()
        each = self.shots + self.queries
        rows = torch.stack([of_class[c][torch.randperm(len(of_class[c]), generator=draws)[:each]] for c in classes])
        drawn = features[rows]  # (ways, shots + queries, D)
        means = drawn[:, : self.shots].mean(dim=1)
        nearest = torch.cdist(drawn[:, self.shots :].flatten(0, 1), means).argmin(dim=1).view(self.ways, -1)
        right = nearest == torch.arange(self.ways, device=features.device)[:, None]
        return 100 * right.float().mean()
