"""A transfer protocol: few-shot classification by the nearest class mean, over several draws of the labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError
from mixmask.engine.features import extract_features
from mixmask.engine.images import ImageSet
from mixmask.engine.knn import top1
from mixmask.engine.loader import open_source
from mixmask.engine.randomness import generator
from mixmask.transfer.classification import ClassifyRecipe, Images, save_answers, trunk_of


class FewShot(ClassifyRecipe):
    """Classify by the nearest class mean of ``shots`` labelled images per class; the mean of ``episodes`` draws."""

    protocol: Literal["fewshot"]
    shots: int = Field(5, ge=1)
    episodes: int = Field(20, ge=1)

    @property
    @override
    def record_name(self) -> str:
        return f"fewshot_{self.shots}"

    @property
    @override
    def title(self) -> str:
        return f"{self.shots}-shot"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {"fewshot/top1": f"{self.title} top-1"}

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        return {"shots": self.shots, "episodes": self.episodes}

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = super().open(open_images)
        fewest = int(np.bincount(train.targets).min())
        if self.shots > fewest:
            raise ConfigError(f"shots {self.shots}: a class of '{self.data.name}' has {fewest} training images only")
        return train, test

    @override
    def measure(self, setting: Images) -> dict[str, float]:
        trunk = trunk_of(setting)
        (bank, labels), (asked, answers) = (
            extract_features(
                f"{self.name}: features",
                trunk,
                open_source(images.shard(), self.data, setting.device),
                batch_size=self.evaluation.batch_size,
                resize=self.evaluation.resize,
                crop=self.evaluation.crop,
                precision=self.precision,
                normalization=setting.normalization,
            )
            for images in (setting.train, setting.test)
        )
        bank, asked = F.normalize(bank, dim=1), F.normalize(asked, dim=1)
        predicted = [self._nearest(bank, labels, asked, episode) for episode in range(self.episodes)]
        save_answers(self, setting, predicted[0], answers)  # of the first episode, for `mixmask compare`
        found = [top1(one, answers) for one in predicted]
        return {"fewshot/top1": sum(found) / len(found)}

    def _nearest(self, bank: Tensor, labels: Tensor, asked: Tensor, episode: int) -> Tensor:
        """(M,) predicted classes: the nearest class mean of the ``shots`` images drawn for this episode."""
        means = []
        for label in range(int(labels.max()) + 1):
            own = (labels == label).nonzero().flatten()
            drawn = torch.randperm(len(own), generator=generator(self.seed, "fewshot", episode, label))
            means.append(bank[own[drawn[: self.shots].to(own.device)]].mean(dim=0))
        return (asked @ F.normalize(torch.stack(means), dim=1).T).argmax(dim=1)
