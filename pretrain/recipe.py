"""The typed recipe of a pretraining run."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from engine.augment import AugmentRecipe
from engine.backbones import BackboneRecipe
from engine.config import Recipe, added, operational
from engine.datasets import DataRecipe
from engine.expected import Expectations
from engine.precision import DeviceName, Precision
from engine.records import Method
from engine.watching import WatchRecipe
from pretrain.frameworks import AnyFramework
from pretrain.frameworks.moco import MoCoRecipe
from pretrain.mixing import Erase, Groups, MaskOptions, MixRecipe, NoMix
from pretrain.optimizers import AnyOptimizer
from pretrain.schedules import AnySchedule, CosineRecipe


class MonitorRecipe(Recipe):
    """kNN accuracy on the test split while it trains, on the trunk's output or on the projection head's.

    ``max_bank`` and ``max_queries`` bound the images used (spread evenly over the split); null uses all.
    """

    every_epochs: int = Field(10, ge=1)
    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0)
    resize: int | None = Field(None, ge=8)
    max_bank: int | None = Field(None, ge=1)
    max_queries: int | None = Field(None, ge=1)
    features: Literal["trunk", "head"] = added("trunk")
    batch_size: int = operational(256, ge=1)


class PretrainRecipe(Recipe):
    """A pretraining run.

    ``batch_size`` is global: over all processes and all parts of an accumulated gradient. ``epochs: 0`` trains nothing and
    gives the trunk as the seed initialises it: the random baseline of a recipe.
    """

    name: str = operational(..., pattern=r"^[A-Za-z0-9_.+-]+$")
    seed: int = Field(0, ge=0)
    data: DataRecipe
    backbone: BackboneRecipe = BackboneRecipe()
    framework: AnyFramework = MoCoRecipe()
    mix: MixRecipe = NoMix()
    augment: AugmentRecipe = AugmentRecipe()
    optimizer: AnyOptimizer
    schedule: AnySchedule = added(CosineRecipe())
    epochs: int = Field(ge=0, le=10**6)
    max_steps: int | None = Field(None, ge=1, description="stop early, for trials; the schedule still ends at the stop")
    warmup_epochs: float = Field(0, ge=0, le=10**6)
    batch_size: int = Field(ge=2, le=2**22)
    accumulate: int = Field(
        1, ge=1, le=2**22, description="parts of a batch, one after another, whose gradients are summed"
    )
    clip_norm: float | None = Field(None, gt=0)
    sync_bn: bool = Field(False, description="batch statistics over all processes (GPUs only)")
    precision: Precision = "fp32"
    compile: bool = Field(
        False, description="torch.compile the encoders; their rounding changes, so it is part of the identity"
    )
    monitor: MonitorRecipe | None = None
    device: DeviceName = operational("auto")
    watch: WatchRecipe = operational(WatchRecipe())
    expected: Expectations = operational(())
    log_every: int = operational(10, ge=1)
    checkpoint_every: int = operational(500, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> PretrainRecipe:
        if isinstance(self.mix, MaskOptions) and self.mix.grid > self.augment.crop:
            raise ValueError(
                f"mix.grid {self.mix.grid} does not fit an image of augment.crop {self.augment.crop} pixels; "
                f"valid: 2 … {self.augment.crop}"
            )
        if isinstance(self.mix, Erase) and self.mix.extra_crops and self.mix.grid > self.mix.extra_crop:
            raise ValueError(
                f"mix.grid {self.mix.grid} does not fit a view of mix.extra_crop {self.mix.extra_crop} pixels"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if isinstance(self.mix, Groups):
            rows, groups = self.batch_size // self.accumulate, self.mix.mask_groups
            if groups > 1 and (rows % groups or rows // groups < 2):
                part = f"a part of {rows} images" if self.accumulate > 1 else f"batch_size {rows}"
                raise ValueError(
                    f"mix.mask_groups {groups}: {part} cannot be split in {groups} equal groups of at least 2"
                )
        if self.epochs:
            self.framework.check_batch(self.batch_size, self.accumulate, processes=1)
        if self.sync_bn and isinstance(self.framework, MoCoRecipe):
            raise ValueError(
                "sync_bn gives a query and its key the same batch statistics, which MoCo shuffles batches to avoid "
                "(arXiv:1911.05722, section 3.3); leave it out"
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
        return "random" if self.epochs == 0 else self.mix.method

    @property
    def views(self) -> list[AugmentRecipe]:
        """How each view of an image is drawn: two full ones, then the small ones of erasing."""
        views = [self.augment, self.augment]
        if isinstance(self.mix, Erase):
            small = self.augment.model_copy(update={"crop": self.mix.extra_crop, "scale": self.mix.extra_scale})
            views += [small] * self.mix.extra_crops
        return views

    def num_steps(self, steps_per_epoch: int) -> int:
        """Length of the run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def trained_epochs(self, steps_per_epoch: int) -> float:
        """Epochs that are really trained, which `max_steps` may cut."""
        return round(self.num_steps(steps_per_epoch) / steps_per_epoch, 4)

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Length of the warm-up."""
        return self.schedule.warmup(math.floor(self.warmup_epochs * steps_per_epoch))
