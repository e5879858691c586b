"""The pretraining stage: a recipe in, a run directory with ``backbone.safetensors`` out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from mixmask.engine import distributed
from mixmask.engine.backbones import TIMM, BackboneInfo, save_backbone
from mixmask.engine.config import fingerprint_of, fingerprinted, identity
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages, other_classes, require_same_classes
from mixmask.engine.errors import ConfigError
from mixmask.engine.heads import Head
from mixmask.engine.images import ImageSet
from mixmask.engine.job import Job, Part
from mixmask.engine.loader import Batch, BatchPlan, check_crop, open_source
from mixmask.engine.precision import check_precision, require_memory, resolve_device
from mixmask.engine.progress import say
from mixmask.engine.randomness import derived_seed
from mixmask.engine.records import Record, environment
from mixmask.engine.run import RecordedWork, carry_out
from mixmask.engine.storage import RunDirectory, locate_run
from mixmask.engine.training import train
from mixmask.engine.watching import check_watch, open_sinks
from mixmask.engine.wording import nearest_multiples
from mixmask.pretrain.diagnostics import collapse_warning
from mixmask.pretrain.framework import Framework
from mixmask.pretrain.monitor import Monitor
from mixmask.pretrain.optimizers import build_optimizer
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.step import batch_parts

BACKBONE_FILE = "backbone.safetensors"


@dataclass(frozen=True)
class PretrainPlan(RecordedWork[Path]):
    """A checked pretraining run: its data is listed, nothing is trained or written yet."""

    recipe: PretrainRecipe
    fingerprint: str
    run: RunDirectory
    device: torch.device
    train_images: ImageSet
    test_images: ImageSet | None
    batches: BatchPlan

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.num_steps(self.batches.steps_per_epoch)

    @property
    def lineage(self) -> str:
        """The fingerprint without the seed: runs of one lineage differ in their seed only and may be averaged."""
        return fingerprint_of({**fingerprinted(self.recipe), "stage": "pretrain", "seed": None})

    @property
    def backbone_file(self) -> Path:
        """Path of ``backbone.safetensors`` in the run directory."""
        return self.run.path / BACKBONE_FILE

    @property
    @override
    def data(self) -> dict[str, Any]:
        return {"train": self.train_images.summary()["listing"]}

    @property
    @override
    def images(self) -> list[ImageSet]:
        return [self.train_images, *([] if self.test_images is None else [self.test_images])]

    @override
    def product(self, record: Record) -> Path:
        return self.backbone_file

    @override
    def work(self) -> Path:
        recipe, data = self.recipe, self.data
        # Weights come from torch's global generator: with the same seed, all ranks start from the same weights.
        torch.manual_seed(derived_seed(recipe.seed, "init"))
        model = recipe.framework.build(recipe.backbone).to(self.device).to(memory_format=torch.channels_last)
        metrics: dict[str, float] = {}
        seconds = 0.0
        if recipe.epochs:
            metrics = _train(self, model, data)
            seconds = metrics.pop("seconds")
        distributed.on_rank0(lambda: _finish(self, model, data, metrics, seconds))
        return self.backbone_file

    def describe(self) -> str:
        """A summary of the run, one fact per line."""
        recipe = self.recipe
        rate = recipe.optimizer.rate(recipe.batch_size)
        size = distributed.world().size
        shares = f" over {size} processes" * (size > 1) + f" in {recipe.accumulate} parts" * (recipe.accumulate > 1)
        lines = [
            f"{recipe.framework.kind}, {recipe.method}, {recipe.backbone.arch}"
            + f" ({recipe.backbone.stem} stem)" * (not recipe.backbone.arch.startswith(TIMM)),
            f"data      {recipe.data.name}: {len(self.train_images):,} images from {self.train_images.root}",
            f"length    {self._length(shares)} on {self.device}, {recipe.precision}",
            f"lr        {rate:g} (given {recipe.optimizer.lr:g} for a batch of "
            f"{recipe.optimizer.reference_batch_size or recipe.batch_size})",
            *(f"warning   {text}" for text in (*recipe.remarks(len(self.train_images)),) if recipe.epochs),
            *self._elasticity(),
            *self._monitoring(),
            *(
                f"expected  {expected.describe()}{other_classes(recipe.data.name, len(self.train_images.classes))}"
                for expected in recipe.expected
            ),
            f"run       {self.run.path}{' (finished)' if self.run.is_finished else ''}",
            f"product   {self.backbone_file}",
        ]
        return "\n".join(lines)

    def _elasticity(self) -> list[str]:
        size = distributed.world().size
        if self.recipe.elastic(size):
            return []
        return [
            f"note      each of {size} processes takes batch statistics of its own images, so another number of processes "
            f"gives other numbers; "
            + (
                f"framework.bn_splits={size} makes them independent of it"
                if self.recipe.framework.shuffles_batches
                else "sync_bn=true makes them independent of it"
            )
        ]

    def _length(self, shares: str) -> str:
        whole = self.recipe.epochs * self.batches.steps_per_epoch
        epochs = f"{self.recipe.epochs} epochs × {self.batches.steps_per_epoch} steps"
        if self.num_steps < whole:
            return (
                f"{self.num_steps:,} steps of {self.recipe.batch_size}{shares} (max_steps; {epochs} would be {whole:,})"
            )
        return f"{epochs} of {self.recipe.batch_size}{shares} = {whole:,} steps"

    def _monitoring(self) -> list[str]:
        monitor = self.recipe.monitor
        if monitor is None or self.test_images is None or not self.recipe.epochs:
            return []
        bank = min(monitor.max_bank or len(self.train_images), len(self.train_images))
        queries = min(monitor.max_queries or len(self.test_images), len(self.test_images))
        return [
            f"monitor   kNN of {queries:,} test against {bank:,} training images every {monitor.every_epochs} epochs and at "
            f"the end (monitor.max_bank, monitor.max_queries bound it; monitor=null leaves it out)"
        ]


def plan(recipe: PretrainRecipe, runs: Path, explicit: Path | None = None) -> PretrainPlan:
    """Check everything that can be checked before training.

    Args:
        recipe: What to run.
        runs: Folder of all runs.
        explicit: Run directory to use instead of the one that the fingerprint gives.

    Raises:
        UserError: If the data, the sizes or the run directory do not fit.
    """
    fingerprint, run = locate(recipe, runs, explicit)
    run.check(recipe, fingerprint)
    device = resolve_device(recipe.device)
    check_precision(device, recipe.precision)
    check_watch(recipe.watch)
    _check_network(recipe, device)
    return PretrainPlan(recipe, fingerprint, run, device, *check_inputs(recipe, distributed.world().size))


def locate(recipe: PretrainRecipe, runs: Path, explicit: Path | None = None) -> tuple[str, RunDirectory]:
    """The fingerprint and the run directory of a recipe; reads no data."""
    fingerprint = fingerprint_of({"stage": "pretrain", **fingerprinted(recipe)})
    return fingerprint, locate_run(runs, "pretrain", recipe.name, fingerprint, explicit)


def check_inputs(
    recipe: PretrainRecipe, processes: int, open_images: OpenImages = open_split
) -> tuple[ImageSet, ImageSet | None, BatchPlan]:
    """List the data, and check that the recipe's sizes fit the data and the number of processes.

    Args:
        recipe: What to run.
        processes: World size of the run.
        open_images: Lists a split; the default reads the folders.

    Returns:
        The training images, the monitor's test images, and the batches.

    Raises:
        UserError: If the data are missing or the sizes do not fit.
    """
    _check_batch(recipe, processes)
    train_images = open_images(recipe.data, "train")
    test_images = open_images(recipe.data, "test") if recipe.monitor is not None else None
    if test_images is not None and train_images.labels.ndim == 2:
        raise ConfigError(
            f"monitor: the images of '{recipe.data.name}' have several labels each, which kNN cannot be tested on; set "
            f"monitor=null"
        )
    if test_images is not None:
        require_same_classes(train_images, test_images, recipe.data.allow_overlap)
    batches = BatchPlan(len(train_images), recipe.batch_size, drop_last=True, seed=recipe.seed, parts=recipe.accumulate)
    steps, warmup = recipe.num_steps(batches.steps_per_epoch), recipe.warmup_steps(batches.steps_per_epoch)
    if recipe.epochs and warmup >= steps:
        key = "warmup_epochs" if recipe.warmup_epochs else "schedule.warmup_steps"
        raise ConfigError(
            f"the warm-up of {warmup} steps ({key}) does not leave any of the run's {steps} steps: shorten the warm-up, too "
            f"({key}=0 leaves it out)"
        )
    if recipe.epochs:
        for view in recipe.views:
            check_crop(train_images, recipe.data, view)
    return train_images, test_images, batches


def _check_batch(recipe: PretrainRecipe, processes: int) -> None:
    """Check that the batch divides into processes and accumulation parts and fits the framework."""
    parts = processes * recipe.accumulate
    if recipe.batch_size % parts:
        raise ConfigError(
            f"batch_size {recipe.batch_size} cannot be shared equally by {processes} processes and {recipe.accumulate} "
            f"accumulated parts; {nearest_multiples(recipe.batch_size, parts)}"
        )
    if recipe.epochs and recipe.batch_size // parts < 2:
        raise ConfigError(
            f"batch_size {recipe.batch_size} leaves {recipe.batch_size // parts} image per part; batch normalisation needs 2"
        )
    try:
        if recipe.epochs:
            recipe.framework.check_batch(recipe.batch_size, recipe.accumulate, processes)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_network(recipe: PretrainRecipe, device: torch.device) -> None:
    """Build the network without its weights, so that errors in it are reported before training."""
    with torch.device("meta"), torch.no_grad():
        # In eval mode, because two images are too few for the groups of `SplitBatchNorm2d`.
        model = recipe.framework.build(recipe.backbone).eval()
        for view in recipe.views:
            try:
                model.trunk(torch.empty(2, 3, view.crop, view.crop))
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(
                    f"backbone.arch {recipe.backbone.arch} cannot take images of {view.crop} pixels: {reason}"
                ) from None
    recipe.exported(model)
    _check_memory(recipe, model, device)
    if recipe.sync_bn:
        plain = (nn.BatchNorm1d, nn.BatchNorm2d)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in plain:
                raise ConfigError(
                    f"sync_bn: {recipe.backbone.arch} fuses {type(module).__name__} with its activation, which "
                    f"SyncBatchNorm would drop; leave sync_bn out"
                )


def _check_memory(recipe: PretrainRecipe, model: Framework, device: torch.device) -> None:
    """Check that weights, gradients, momenta, queue and the images of a step fit into memory."""
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    rows = recipe.batch_size // (recipe.accumulate * distributed.world().size)
    images = sum(3 * view.crop**2 for view in recipe.views) * max(rows, 1)
    # Bytes in fp32. Activations are not counted, so this finds only what can never fit.
    parts = {
        "weights, buffers and queue (backbone.arch; framework.dim, queue_size, projector_width)": 4 * kept,
        "gradients and momenta (the same keys)": 8 * weights,
        "the images of a step (augment.crop, batch_size, accumulate)": 4 * images,
    }
    require_memory(parts, device, recipe.name)


def run(plan: PretrainPlan) -> Path:
    """Carry out a plan, from its checkpoint if there is one.

    Returns:
        The path of ``backbone.safetensors``. A finished run is not trained again.
    """
    return carry_out(plan)


def _finish(
    plan: PretrainPlan, model: Framework, data: dict[str, Any], metrics: dict[str, float], seconds: float
) -> None:
    """Write the backbone, then the record: a run with a record counts as finished."""
    recipe = plan.recipe
    trunk, head = recipe.exported(model)
    save_backbone(plan.backbone_file, trunk.state_dict(), _info(plan, head), head.state_dict())
    record = Record(
        stage="pretrain",
        protocol="pretrain",
        name=recipe.name,
        dataset=recipe.data.name,
        framework=recipe.framework.kind,
        method=recipe.method,
        arch=recipe.backbone.arch,
        seed=recipe.seed,
        fingerprint=plan.fingerprint,
        pretrain_dataset=recipe.data.name,
        pretrain_epochs=recipe.trained_epochs(plan.batches.steps_per_epoch),
        pretrain_seed=recipe.seed,
        lineage=plan.lineage,
        title="pretraining",
        headlines={"knn/top1": "kNN top-1", "loss": "loss"},
        settings={"steps": plan.num_steps, "batch_size": recipe.batch_size, "precision": recipe.precision},
        recipe=identity(recipe),
        expected=recipe.expected,
        metrics=metrics,
        data=data,
        environment=environment(),
        seconds=seconds,
    )
    plan.finish(record)


def _info(plan: PretrainPlan, head: Head) -> BackboneInfo:
    recipe = plan.recipe
    return BackboneInfo(
        arch=recipe.backbone.arch,
        stem=recipe.backbone.stem,
        framework=recipe.framework.kind,
        method=recipe.method,
        fingerprint=plan.fingerprint,
        dataset=recipe.data.name,
        epochs=recipe.trained_epochs(plan.batches.steps_per_epoch),
        lineage=plan.lineage,
        seed=recipe.seed,
        pretraining=identity(recipe),
        normalization=recipe.augment.normalization,
        head=head.info,
    )


def _train(plan: PretrainPlan, model: Framework, data: dict[str, Any]) -> dict[str, float]:
    recipe, per_epoch = plan.recipe, plan.batches.steps_per_epoch
    if recipe.sync_bn:
        distributed.synchronise_batchnorm(model, plan.device)
    if recipe.compile:
        for encoder in model.encoders():
            encoder.compile()
    source = open_source(plan.train_images, recipe.data, plan.device)
    monitor = None
    if plan.test_images is not None:
        monitor = Monitor(recipe, *recipe.exported(model), source, plan.test_images, plan.device)
    job = Job(
        title=recipe.name,
        run=plan.run,
        fingerprint=plan.fingerprint,
        data=data,
        model=model,
        optimizer=build_optimizer(recipe.optimizer, model, recipe.batch_size),
        schedule=lambda step: recipe.schedule.factor(step, plan.num_steps, per_epoch, recipe.warmup_steps(per_epoch)),
        num_steps=plan.num_steps,
        weight_decay=_weight_decay(plan),
        images_per_step=recipe.batch_size,
        device=plan.device,
        seed=recipe.seed,
        precision=recipe.precision,
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        evaluate=monitor,
        evaluate_every=recipe.monitor.every_epochs * per_epoch if recipe.monitor is not None else 0,
        clip_norm=recipe.clip_norm,
        before_step=model.before_step,
        after_step=lambda step: model.after_step((step + 1) / plan.num_steps),
        elastic=recipe.elastic,
        watch=collapse_warning,
        open_sinks=lambda first: open_sinks(
            recipe.watch, plan.run, recipe.name, plan.fingerprint, recipe.model_dump(mode="json"), first
        ),
    )

    def batches(first: int) -> Iterator[Batch]:
        return source.training(plan.batches, recipe.views, first, plan.num_steps)

    def losses(batch: Batch, step: int) -> list[Part]:
        # The diagnostics need singular values, so they are computed for logged steps only.
        model.progress = step / plan.num_steps
        logged = (step + 1) % recipe.log_every == 0 or step + 1 == plan.num_steps
        return batch_parts(model, recipe, batch, step, diagnosed=logged)

    started = time.monotonic()
    result = train(job, batches, losses)
    say(f"{recipe.name}: trained in {time.monotonic() - started:,.0f} s")
    # Only rank 0 writes the log.
    last = _last_logged(plan.run, ("loss", "feature_std", "rank_me")) if distributed.world().is_writer else {}
    return {**last, **result}


def _weight_decay(plan: PretrainPlan) -> Callable[[int], float] | None:
    optimizer = plan.recipe.optimizer
    return None if optimizer.weight_decay_end is None else lambda step: optimizer.decay(step, plan.num_steps)


def _last_logged(run: RunDirectory, names: Sequence[str]) -> dict[str, float]:
    lines = [json.loads(line) for line in run.log_file.read_text(encoding="utf-8").splitlines()]
    return {name: float(next(line[name] for line in reversed(lines) if name in line)) for name in names}
