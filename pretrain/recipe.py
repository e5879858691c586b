"""The typed recipe of a pretraining run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.backbones import TIMM, BackboneRecipe
from mixmask.engine.config import Recipe, added, fingerprint_of, fingerprinted, operational
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.errors import ConfigError
from mixmask.engine.expected import Expectations
from mixmask.engine.flops import forward_flops, num_parameters
from mixmask.engine.normalization import statistics_of
from mixmask.engine.precision import DeviceName, Precision
from mixmask.engine.records import Method
from mixmask.engine.storage import RunDirectory, locate_run
from mixmask.engine.watching import WatchRecipe
from mixmask.engine.workload import Workload
from mixmask.pretrain.frameworks import AnyFramework
from mixmask.pretrain.frameworks.moco import MoCoRecipe
from mixmask.pretrain.mixtures import AnyMixture
from mixmask.pretrain.mixtures.none import NoMix
from mixmask.pretrain.optimizers import AnyOptimizer
from mixmask.pretrain.schedules import AnySchedule, CosineRecipe

if TYPE_CHECKING:
    from torch import nn

    from mixmask.engine.heads import Head
    from mixmask.pretrain.network import Framework

# Largest crop in pixels that counts as small: a ResNet with the standard stem divides its sides by 32.
SMALL = 48
BACKBONE_FILE = "backbone.safetensors"  # in the run directory


class MonitorRecipe(Recipe):
    """kNN accuracy on the test split during training, with the features of the trunk or of the projection head.

    ``max_bank`` and ``max_queries`` limit the bank and query images (spread evenly over their split); null uses all.
    ``data`` is another data set with labels, whose training split is the bank and whose test split the queries; by default
    it is the run's own.
    """

    every_epochs: int = Field(10, ge=1)
    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0)
    resize: int | None = Field(None, ge=8)
    max_bank: int | None = Field(None, ge=1)
    max_queries: int | None = Field(None, ge=1)
    features: Literal["trunk", "head"] = added("trunk")
    data: DataRecipe | None = added(None)
    batch_size: int = operational(256, ge=1)


class SecondViewRecipe(Recipe):
    """What is different in the second view of an image; null is as in the first.

    The code of Barlow Twins, VICReg, MoCo v3 and DINO blurs one view always and the other rarely, and solarises the other.
    """

    blur_probability: float | None = Field(None, ge=0, le=1)
    solarize_probability: float | None = Field(None, ge=0, le=1)


class PretrainRecipe(Recipe):
    """A pretraining run.

    ``batch_size`` is global: the sum over all processes and all gradient accumulation parts. ``epochs: 0`` trains
    nothing and saves the trunk as the seed initialises it: the random baseline of the recipe. ``export`` is what is kept
    and monitored: the encoder that is trained, or its moving average, where the framework has one.
    """

    name: str = operational(..., pattern=r"^[A-Za-z0-9_.+-]+$")
    seed: int = Field(0, ge=0)
    data: DataRecipe
    backbone: BackboneRecipe = BackboneRecipe()
    framework: AnyFramework = MoCoRecipe()
    mix: AnyMixture = NoMix()
    augment: AugmentRecipe = AugmentRecipe()
    second_view: SecondViewRecipe = added(SecondViewRecipe())
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
    export: Literal["online", "momentum"] = added("online")
    sync_bn: bool = Field(False, description="batch statistics over all processes")
    precision: Precision = "fp32"
    compile: bool = Field(
        False,
        description="torch.compile the encoders, and record the step as a CUDA graph; this changes the rounding, so it is "
        "part of the identity",
    )
    monitor: MonitorRecipe | None = None
    device: DeviceName = operational("auto")
    deterministic: bool = operational(False, description="on a GPU, the same numbers to the bit; slower")
    watch: WatchRecipe = operational(WatchRecipe())
    expected: Expectations = operational(())
    log_every: int = operational(10, ge=1)
    checkpoint_every: int = operational(500, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> PretrainRecipe:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        self.mix.check(self.augment, self.batch_size // self.accumulate)
        if self.epochs:
            # The recipe does not know the world size; `inputs.check_inputs` repeats the check with the real one.
            self.framework.check_batch(self.batch_size, self.accumulate, processes=1)
        if self.sync_bn and self.framework.shuffles_batches:
            raise ValueError(
                "sync_bn gives a query and its key the same batch statistics, which MoCo shuffles batches to avoid "
                "(arXiv:1911.05722, section 3.3); leave it out"
            )
        if self.compile and not self.framework.compiles:
            raise ValueError(
                f"compile: {self.framework.kind} reads the trunk's last map, which a compiled trunk does not give; leave "
                f"it out"
            )
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} does not leave any of the {self.epochs} epochs")
        if self.monitor is not None and self.monitor.resize is not None and self.monitor.resize < self.augment.crop:
            raise ValueError(f"monitor.resize {self.monitor.resize} is smaller than augment.crop {self.augment.crop}")
        own = self.monitor is not None and self.monitor.data is None
        if own and self.data.test is None:
            raise ValueError("monitor needs data.test; set monitor: null for data without a test split")
        if own and not self.data.labels:
            raise ValueError("monitor needs labels; set monitor: null, or monitor.data to a labelled data set")
        for view in self.views:
            self._check_channels(view)
        return self

    def _check_channels(self, view: AugmentRecipe) -> None:
        channels = self.backbone.in_channels
        statistics_of(view.normalization, channels)
        colours = {"hue": view.hue, "saturation": view.saturation, "grayscale_probability": view.grayscale_probability}
        wrong = [key for key, value in colours.items() if value and channels != 3]
        if wrong:
            raise ValueError(
                f"backbone.in_channels {channels}: {', '.join(f'augment.{key}' for key in wrong)} need"
                f"{'s' * (len(wrong) == 1)} RGB images; set {' '.join(f'augment.{key}=0' for key in wrong)}"
            )

    def elastic(self, processes: int) -> bool:
        """Whether the run computes with this many processes what it does with one, up to rounding."""
        return self.sync_bn or self.framework.elastic(processes)

    def remarks(self, num_images: int) -> list[str]:
        """Warnings about unusual but valid settings, for ``num_images`` training images; shown before the run."""
        remarks = self.framework.remarks(num_images)
        if self.backbone.stem == "standard" and self.augment.crop <= SMALL and not self.backbone.arch.startswith(TIMM):
            side = math.ceil(self.augment.crop / 32)
            remarks.append(
                f"backbone.stem=standard reduces pictures of {self.augment.crop} pixels to {side} × {side}; "
                f"backbone.stem=cifar is made for them"
            )
        return remarks

    @property
    def method(self) -> Method:
        """Name of the method in records and tables; ``random`` for a run of 0 epochs."""
        return "random" if self.epochs == 0 else self.mix.method

    @property
    def num_small(self) -> int:
        """How many of the `views` are the framework's small ones."""
        return len(self.framework.small_views(self.augment))

    @property
    def views(self) -> list[AugmentRecipe]:
        """The augmentation of each view of an image: two full views, the framework's small ones, those of the mixture."""
        changed = {key: value for key, value in self.second_view if value is not None}
        second = self.augment.model_copy(update=changed) if changed else self.augment
        small = self.framework.small_views(self.augment)
        return [self.augment, second, *small, *self.mix.extra_views(self.augment)]

    def exported(self, framework: Framework) -> tuple[nn.Module, Head]:
        """The trunk and the head that are kept.

        Raises:
            ConfigError: If the framework has no momentum encoder.
        """
        if self.export == "online":
            return framework.trunk, framework.head
        if framework.slow is None:
            raise ConfigError(
                f"export: momentum: {self.framework.kind} has no momentum encoder; export: online is valid"
            )
        return framework.slow.trunk, framework.slow.projector

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run, after the cut by ``max_steps``."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def trained_epochs(self, steps_per_epoch: int) -> float:
        """Number of epochs trained, to 4 decimals; less than ``epochs`` if ``max_steps`` cuts the run."""
        return round(self.num_steps(steps_per_epoch) / steps_per_epoch, 4)

    def passes(self) -> tuple[float, float]:
        """How many views pass the trunks in a step, with a gradient and without; a small view counts by its area."""
        with_gradient, without = self.framework.full_passes(self.mix.hides)
        small = self.framework.small_views(self.augment)
        mixed = self.mix.extra_views(self.augment) or [self.augment] * self.mix.num_mixtures
        area = sum(view.crop**2 for view in (*small, *mixed)) / self.augment.crop**2
        return with_gradient + area, without

    def workload(self, num_images: int, monitored: int = 0) -> Workload:
        """What the run computes on so many training images; the monitor's are ``monitored``."""
        per_epoch = max(num_images // self.batch_size, 1)
        steps = self.num_steps(per_epoch)
        images, flops = steps * self.batch_size, forward_flops(self.backbone, self.augment.crop)
        with_gradient, without = self.passes()
        looks = 0
        if self.monitor is not None and steps:
            looks = math.ceil(steps / (self.monitor.every_epochs * per_epoch))
        return Workload(
            trained=images * with_gradient * flops,
            forward=(images * without + looks * monitored) * flops,
            side=self.augment.crop,
            loaded=0 if self.data.storage == "resident" else images + looks * monitored,
            views=len(self.views),
            steps=steps,
            parameters=num_parameters(self.backbone),
            kind=self.framework.kind,
            mixture=self.mix.kind,
            half=self.precision != "fp32",
        )

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Length of the warm-up in steps; ``warmup_epochs`` is rounded down to whole steps."""
        return self.schedule.warmup(math.floor(self.warmup_epochs * steps_per_epoch))


def locate(recipe: PretrainRecipe, runs: Path, explicit: Path | None = None) -> tuple[str, RunDirectory]:
    """The fingerprint and the run directory of a recipe; reads no data."""
    fingerprint = fingerprint_of({"stage": "pretrain", **fingerprinted(recipe)})
    return fingerprint, locate_run(runs, "pretrain", recipe.name, fingerprint, explicit)
