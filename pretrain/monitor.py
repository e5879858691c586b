"""kNN accuracy during training."""

from __future__ import annotations

import torch
from torch import nn

from mixmask.engine.distributed import world
from mixmask.engine.heads import Head
from mixmask.engine.images import ImageSet
from mixmask.engine.knn import knn_of_sources, top1
from mixmask.engine.loader import ImageSource, open_source
from mixmask.pretrain.recipe import PretrainRecipe


class Monitor:
    """kNN accuracy of the current trunk or projector: test images are the queries, training images the bank."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        trunk: nn.Module,
        head: Head,
        training: ImageSource,
        test: ImageSet,
        device: torch.device,
    ) -> None:
        assert recipe.monitor is not None
        self.recipe, self.settings = recipe, recipe.monitor
        self.network = nn.Sequential(trunk, head) if recipe.monitor.features == "head" else trunk
        # One process that uses all training images needs no second copy of them for the bank.
        whole = recipe.monitor.max_bank is None and world().size == 1
        self.bank = training if whole else self._open(training.images, recipe.monitor.max_bank, device)
        self.queries = self._open(test, recipe.monitor.max_queries, device)

    def _open(self, images: ImageSet, limit: int | None, device: torch.device) -> ImageSource:
        if limit is not None and limit < len(images):
            images = images.subset(torch.linspace(0, len(images) - 1, limit).long())
        return open_source(images.shard(), self.recipe.data, device)

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
