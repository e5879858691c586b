"""kNN classification on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field
from typing_extensions import override

from mixmask.engine.config import added
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError
from mixmask.engine.images import ImageSet
from mixmask.engine.knn import knn_votes, normalize_, top1
from mixmask.engine.late import torch
from mixmask.engine.progress import say
from mixmask.transfer.checkpoints.source import Source
from mixmask.transfer.classification import Images, save_answers, trunk_of
from mixmask.transfer.features import FrozenRecipe, frozen_features

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
Neighbours = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(gt=0, le=1e6)]


class KnnRecipe(FrozenRecipe):
    """kNN on L2-normalised features, votes weighted with exp(similarity / temperature).

    ``k`` and ``temperature`` give the headline. ``other_k`` and ``other_temperatures`` are measured in the same pass and
    recorded beside it (``knn/top1/k=20,T=0.07``); a k larger than the training set is left out.

    ``features: trunk`` takes the trunk's output, ``head`` that of the projection head, which files of this project's own
    pretraining hold: the MoCo CIFAR demo and Un-Mix's code take the 128-d head.
    """

    depends_on_seed: ClassVar[bool] = False

    protocol: Literal["knn"]
    k: int = Field(200, ge=1, description="one number; further ones go into other_k")
    temperature: float = Field(0.1, gt=0, le=1e6)
    other_k: tuple[Neighbours, ...] = added((10, 20, 100, 200))
    other_temperatures: tuple[Temperature, ...] = added((0.07, 0.1))
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
        """Top-1 of the test split against the training split, in percent, for every k and temperature."""
        (bank, bank_labels), (asked, answers) = (
            frozen_features(
                self,
                setting,
                images,
                lambda: (_with_head(setting) if self.features == "head" else trunk_of(setting)).eval(),
                what=self.features,
                gather=images is setting.test,  # each process looks for neighbours in its own share of the bank
            )
            for images in (setting.train, setting.test)
        )
        ks = _with(self.k, [k for k in self.other_k if k <= len(setting.train)])
        temperatures = _with(self.temperature, self.other_temperatures)
        votes = knn_votes(
            normalize_(bank),
            bank_labels,
            normalize_(asked),
            num_classes=len(setting.train.classes),
            ks=ks,
            temperatures=temperatures,
        )
        predicted = votes[self.k, self.temperature]
        save_answers(self, setting, predicted, answers)
        accuracy = top1(predicted, answers)
        say(f"{self.name}: kNN top-1 {accuracy:.2f} % (k {self.k}, temperature {self.temperature}, {self.what})")
        others = {f"knn/top1/k={k},T={t:g}": top1(voted, answers) for (k, t), voted in votes.items()}
        return {"knn/top1": accuracy, **others}


def _with(first: T, others: Sequence[T]) -> list[T]:
    return [*dict.fromkeys((first, *others))]


def _with_head(setting: Images) -> nn.Module:
    """The trunk and the projection head behind it."""
    info = setting.source.info.head
    assert info is not None  # `KnnRecipe.check` has made sure
    from mixmask.engine.heads import Head

    head = Head(info)
    head.load_state_dict(setting.source.head, strict=True)
    return torch.nn.Sequential(trunk_of(setting), head.to(setting.device))
