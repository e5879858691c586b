"""kNN classification on frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from typing_extensions import override

from mixmask.engine.config import added
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError
from mixmask.engine.heads import Head
from mixmask.engine.images import ImageSet
from mixmask.engine.knn import knn_of_sources, top1
from mixmask.engine.loader import open_source
from mixmask.engine.progress import say
from mixmask.transfer.checkpoints.source import Source
from mixmask.transfer.classification import ClassifyRecipe, Images, save_answers, trunk_of


class KnnRecipe(ClassifyRecipe):
    """kNN on L2-normalised features, votes weighted with exp(similarity / temperature).

    ``features: trunk`` takes the trunk's output, ``head`` that of the projection head, which files of this project's own
    pretraining hold: the MoCo CIFAR demo and Un-Mix's code take the 128-d head.
    """

    depends_on_seed: ClassVar[bool] = False

    protocol: Literal["knn"]
    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0, le=1e6)
    features: Literal["trunk", "head"] = added("trunk")

    @property
    @override
    def title(self) -> str:
        return "kNN"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {"knn/top1": "kNN top-1"}

    @property
    def what(self) -> str:
        """What the neighbours are found by, in words."""
        return f"{'projection head' if self.features == 'head' else 'trunk'} output, L2-normalised"

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        return {"k": self.k, "temperature": self.temperature, "features": self.what}

    @override
    def check(self, source: Source, device: torch.device) -> None:
        if self.features == "head" and source.info.head is None:
            raise ConfigError(
                f"features=head: {source.path} holds no projection head. Files of this project's own pretraining hold one "
                f"(earlier versions did not write it); for others set features=trunk"
            )

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = super().open(open_images)
        if self.k > len(train):
            raise ConfigError(f"k {self.k} is larger than the {len(train)} training images of '{self.data.name}'")
        return train, test

    def measure(self, setting: Images) -> dict[str, float]:
        """Top-1 of the test split against the training split, in percent."""
        network = _with_head(setting) if self.features == "head" else trunk_of(setting)
        predicted, labels = knn_of_sources(
            self.name,
            network.eval(),
            open_source(setting.train.shard(), self.data, setting.device),
            open_source(setting.test.shard(), self.data, setting.device),
            batch_size=self.evaluation.batch_size,
            resize=self.evaluation.resize,
            crop=self.evaluation.crop,
            precision=self.precision,
            k=self.k,
            temperature=self.temperature,
            normalization=setting.normalization,
        )
        save_answers(self, setting, predicted, labels)
        accuracy = top1(predicted, labels)
        say(f"{self.name}: kNN top-1 {accuracy:.2f} % (k {self.k}, temperature {self.temperature}, {self.what})")
        return {"knn/top1": accuracy}


def _with_head(setting: Images) -> nn.Module:
    """The trunk and the projection head behind it."""
    info = setting.source.info.head
    assert info is not None  # `KnnRecipe.check` has made sure
    head = Head(info)
    head.load_state_dict(setting.source.head, strict=True)
    return nn.Sequential(trunk_of(setting), head.to(setting.device))
