"""kNN accuracy during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixmask.engine.datasets import DataRecipe
from mixmask.engine.distributed import world
from mixmask.engine.images import ImageSet
from mixmask.engine.knn import knn_of_sources, top1
from mixmask.engine.late import torch
from mixmask.engine.loader import ImageSource, open_source
from mixmask.pretrain.recipe import PretrainRecipe

if TYPE_CHECKING:
    from torch import nn

    from mixmask.engine.heads import Head


@dataclass(frozen=True)
class Monitored:
    """The labelled images of the monitor.

    Attributes:
        bank: Training images.
        queries: Test images.
        data: The data set they are of.
    """

    bank: ImageSet
    queries: ImageSet
    data: DataRecipe


class Monitor:
    """kNN accuracy of the current trunk or projector: test images are the queries, training images the bank."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        trunk: nn.Module,
        head: Head,
        training: ImageSource,
        monitored: Monitored,
        device: torch.device,
    ) -> None:
        assert recipe.monitor is not None
        self.recipe, self.settings = recipe, recipe.monitor
        self.network = torch.nn.Sequential(trunk, head) if recipe.monitor.features == "head" else trunk
        self.data = monitored.data
        # One process that uses all training images needs no second copy of them for the bank.
        whole = recipe.monitor.max_bank is None and world().size == 1 and monitored.bank is training.images
        self.bank = training if whole else self._open(monitored.bank, recipe.monitor.max_bank, device)
        self.queries = self._open(monitored.queries, recipe.monitor.max_queries, device)

    def _open(self, images: ImageSet, limit: int | None, device: torch.device) -> ImageSource:
        if limit is not None and limit < len(images):
            images = images.subset(torch.linspace(0, len(images) - 1, limit).long())
        return open_source(images.shard(), self.data, device)

    def __call__(self) -> dict[str, float]:
        """Returns ``knn/top1`` in percent. Every rank must call this."""
        k, temperature = self.settings.k, self.settings.temperature
        votes, labels = knn_of_sources(
            self.recipe.name,
            self.network,
            self.bank,
            self.queries,
            batch_size=self.settings.batch_size,
            resize=self.settings.resize,
            crop=self.recipe.augment.crop,
            precision=self.recipe.precision,
            ks=[k],
            temperatures=[temperature],
            normalization=self.recipe.augment.normalization,
        )
        return {"knn/top1": top1(votes[k, temperature], labels)}
