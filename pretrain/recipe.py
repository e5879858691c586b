"""The typed recipe of a pretraining run."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from engine.augment import AugmentRecipe
from engine.backbones import BackboneRecipe
from engine.config import Recipe, operational
from engine.datasets import DataRecipe
from engine.precision import DeviceName, Precision
from engine.records import Method
from pretrain.frameworks.moco import MoCoRecipe
from pretrain.mixing import MixRecipe, NoMix


class SGDRecipe(Recipe):
    """SGD with momentum.

    ``lr`` holds at ``reference_batch_size``; another batch scales it linearly (arXiv:1706.02677). Without a reference it is
    taken as it stands.
    """

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(gt=0)
    reference_batch_size: int | None = Field(None, ge=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)

    def rate(self, batch_size: int) -> float:
        """The learning rate for a global batch."""
        return self.lr * batch_size / (self.reference_batch_size or batch_size)


class MonitorRecipe(Recipe):
    """kNN accuracy of the trunk on the test split while it trains.

    ``max_bank`` and ``max_queries`` bound the images used (spread evenly over the split); null uses all.
    """

    every_epochs: int = Field(10, ge=1)
    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0)
    resize: int | None = Field(None, ge=8)
    max_bank: int | None = Field(None, ge=1)
    max_queries: int | None = Field(None, ge=1)
    batch_size: int = operational(256, ge=1)


class PretrainRecipe(Recipe):
    """A pretraining run.

    ``epochs: 0`` trains nothing and gives the trunk as the seed initialises it: the random baseline of a recipe.
    """

    name: str = operational(..., pattern=r"^[A-Za-z0-9_.+-]+$")
    seed: int = Field(0, ge=0)
    data: DataRecipe
    backbone: BackboneRecipe = BackboneRecipe()
    framework: MoCoRecipe = MoCoRecipe()
    mix: MixRecipe = NoMix()
    augment: AugmentRecipe = AugmentRecipe()
    optimizer: SGDRecipe
    epochs: int = Field(ge=0)
    max_steps: int | None = Field(None, ge=1, description="stop early, for trials; the schedule still ends at the stop")
    warmup_epochs: float = Field(0, ge=0)
    batch_size: int = Field(ge=2)
    precision: Precision = "fp32"
    monitor: MonitorRecipe | None = None
    device: DeviceName = operational("auto")
    log_every: int = operational(10, ge=1)
    checkpoint_every: int = operational(500, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> PretrainRecipe:
        framework = self.framework
        if framework.queue_size % self.batch_size:
            near = max(framework.queue_size // self.batch_size, 1) * self.batch_size
            raise ValueError(
                f"framework.queue_size {framework.queue_size} is not a multiple of batch_size {self.batch_size}; "
                f"valid for this batch: {near}, {near + self.batch_size}, …"
            )
        if self.batch_size % framework.bn_splits:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split in framework.bn_splits {framework.bn_splits} equal groups"
            )
        if self.batch_size // framework.bn_splits < 2 and self.epochs:
            raise ValueError(
                f"framework.bn_splits {framework.bn_splits} leaves {self.batch_size // framework.bn_splits} image per group "
                f"of batch_size {self.batch_size}; batch normalisation needs at least 2"
            )
        if self.mix.kind == "mixmask" and self.mix.grid > self.augment.crop:
            raise ValueError(
                f"mix.grid {self.mix.grid} does not fit an image of augment.crop {self.augment.crop} pixels"
            )
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} does not leave any of the {self.epochs} epochs")
        if self.monitor is not None and self.monitor.resize is not None and self.monitor.resize < self.augment.crop:
            raise ValueError(f"monitor.resize {self.monitor.resize} is smaller than augment.crop {self.augment.crop}")
        if self.monitor is not None and self.data.test is None:
            raise ValueError("monitor needs data.test; set monitor: null for data without a test split")
        return self

    @property
    def method(self) -> Method:
        """The method's name in records and tables."""
        if self.epochs == 0:
            return "random"
        return "mixmask" if self.mix.kind == "mixmask" else "vanilla"

    def num_steps(self, steps_per_epoch: int) -> int:
        """Length of the run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def trained_epochs(self, steps_per_epoch: int) -> float:
        """Epochs that are really trained, which `max_steps` may cut."""
        return round(self.num_steps(steps_per_epoch) / steps_per_epoch, 4)

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Length of the warm-up."""
        return math.floor(self.warmup_epochs * steps_per_epoch)
