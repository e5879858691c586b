"""The pretraining stage: a recipe in, a run directory with ``backbone.safetensors`` out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from mixmask.engine import distributed
from mixmask.engine.backbones import TIMM, BackboneInfo, save_backbone
from mixmask.engine.batch_statistics import synchronise_batchnorm
from mixmask.engine.config import fingerprint_of, fingerprinted, identity
from mixmask.engine.datasets import other_classes
from mixmask.engine.heads import Head
from mixmask.engine.images import ImageSet
from mixmask.engine.job import Backward, Job, Values
from mixmask.engine.loader import Batch, BatchPlan, open_source
from mixmask.engine.precision import check_precision, resolve_device
from mixmask.engine.progress import say
from mixmask.engine.randomness import derived_seed
from mixmask.engine.readable import readable
from mixmask.engine.records import Record, environment
from mixmask.engine.run import RecordedWork, carry_out
from mixmask.engine.storage import RunDirectory
from mixmask.engine.training import train_by
from mixmask.engine.watching import check_watch, open_sinks
from mixmask.pretrain.compiling import compile_encoders, recorded_steps, uncompiled
from mixmask.pretrain.diagnostics import collapse_warning
from mixmask.pretrain.inputs import check_inputs, check_network
from mixmask.pretrain.monitor import Monitor, Monitored
from mixmask.pretrain.network import Framework
from mixmask.pretrain.optimizers import build_optimizer
from mixmask.pretrain.recipe import BACKBONE_FILE, PretrainRecipe, locate
from mixmask.pretrain.step import batch_parts


@dataclass(frozen=True)
class PretrainPlan(RecordedWork[Path]):
    """A checked pretraining run: its data is listed, nothing is trained or written yet."""

    recipe: PretrainRecipe
    fingerprint: str
    run: RunDirectory
    device: torch.device
    train_images: ImageSet
    monitored: Monitored | None
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
        if self.monitored is None:
            return [self.train_images]
        bank, queries = self.monitored.bank, self.monitored.queries
        return [self.train_images, *([] if bank is self.train_images else [bank]), queries]

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
            f"data      {recipe.data.name}: {len(self.train_images):,} images from {self.train_images.origin}",
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
        if monitor is None or self.monitored is None or not self.recipe.epochs:
            return []
        sizes = len(self.monitored.bank), len(self.monitored.queries)
        bank, queries = min(monitor.max_bank or sizes[0], sizes[0]), min(monitor.max_queries or sizes[1], sizes[1])
        where = "" if monitor.data is None else f" of {monitor.data.name}"
        return [
            f"monitor   kNN of {queries:,} test against {bank:,} training images{where} every {monitor.every_epochs} epochs "
            f"and at the end (monitor.max_bank, monitor.max_queries bound it; monitor=null leaves it out)"
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
    check_network(recipe, device)
    return PretrainPlan(recipe, fingerprint, run, device, *check_inputs(recipe, distributed.world().size))


def run(plan: PretrainPlan) -> Path:
    """Carry out a plan, from its checkpoint if there is one. Every rank must call it.

    Returns:
        The path of ``backbone.safetensors``. A finished run is not trained again.
    """
    return carry_out(_of_readable_images(plan))


def _of_readable_images(plan: PretrainPlan) -> PretrainPlan:
    """The plan without images that cannot be read, if the recipe wants them left out (``data.skip_unreadable``)."""
    recipe, train, monitored = plan.recipe, plan.train_images, plan.monitored
    if recipe.data.skip_unreadable:
        train = readable(train)
    if monitored is not None and monitored.data.skip_unreadable:
        own = monitored.bank is plan.train_images
        monitored = replace(
            monitored, bank=train if own else readable(monitored.bank), queries=readable(monitored.queries)
        )
    if train is plan.train_images and monitored is plan.monitored:
        return plan
    batches = distributed.agreed(lambda: replace(plan.batches, num_images=len(train)))
    return replace(plan, train_images=train, monitored=monitored, batches=batches)


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
        in_channels=recipe.backbone.in_channels,
    )


def _train(plan: PretrainPlan, model: Framework, data: dict[str, Any]) -> dict[str, float]:
    recipe, per_epoch = plan.recipe, plan.batches.steps_per_epoch
    if recipe.sync_bn:
        synchronise_batchnorm(model, plan.device)
    recorded = None
    if recipe.compile:
        compile_encoders(model.encoders(), plan.device)
        recorded = recorded_steps(model, recipe, plan.device)
    source = open_source(plan.train_images, recipe.data, plan.device)
    monitor = None
    if plan.monitored is not None:
        monitor = Monitor(recipe, *recipe.exported(model), source, plan.monitored, plan.device)
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
        evaluate=None if monitor is None else lambda: _uncompiled(model, monitor),
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

    def passes(backward: Backward, batch: Batch, step: int) -> Values:
        model.progress = step / plan.num_steps
        # The diagnostics need singular values, so they are computed for logged steps only.
        logged = (step + 1) % recipe.log_every == 0 or step + 1 == plan.num_steps
        if recorded is not None:
            return recorded(backward, batch, step, logged)
        return backward(batch_parts(model, recipe, batch, step, diagnosed=logged))

    started = time.monotonic()
    result = train_by(job, batches, passes)
    say(f"{recipe.name}: trained in {time.monotonic() - started:,.0f} s")
    # Only rank 0 writes the log.
    last = _last_logged(plan.run, ("loss", "feature_std", "rank_me")) if distributed.world().is_writer else {}
    return {**last, **result}


def _uncompiled(model: Framework, monitor: Monitor) -> dict[str, float]:
    with uncompiled(model):
        return monitor()


def _weight_decay(plan: PretrainPlan) -> Callable[[int], float] | None:
    optimizer = plan.recipe.optimizer
    return None if optimizer.weight_decay_end is None else lambda step: optimizer.decay(step, plan.num_steps)


def _last_logged(run: RunDirectory, names: Sequence[str]) -> dict[str, float]:
    lines = [json.loads(line) for line in run.log_file.read_text(encoding="utf-8").splitlines()]
    return {name: float(next(line[name] for line in reversed(lines) if name in line)) for name in names}
