"""The pretraining stage: a recipe in, a run directory with ``backbone.safetensors`` out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.augment import Photometric
from engine.backbones import BackboneInfo, save_backbone
from engine.config import fingerprint_of, identity
from engine.datasets import ImageSet, check_files, open_split, require_same_classes
from engine.errors import ConfigError
from engine.knn import extract_features, knn_accuracy
from engine.loader import Batch, BatchPlan, ImageSource, check_crop, open_source
from engine.precision import resolve_device
from engine.progress import say
from engine.randomness import derived_seed, generator
from engine.records import Record, environment, finished_record
from engine.schedule import cosine_factor
from engine.storage import RunDirectory, locate_run
from engine.training import Job, require_same_data, train
from pretrain.frameworks.moco import MoCo
from pretrain.mixing import MixMask, draw_mixture, mixture_loss
from pretrain.recipe import PretrainRecipe

BACKBONE_FILE = "backbone.safetensors"


@dataclass(frozen=True)
class PretrainPlan:
    """A checked pretraining run: the data has been listed, nothing has been trained or written."""

    recipe: PretrainRecipe
    fingerprint: str
    run: RunDirectory
    device: torch.device
    train_images: ImageSet
    test_images: ImageSet | None
    batches: BatchPlan

    @property
    def num_steps(self) -> int:
        """Length of the run in steps."""
        return self.recipe.num_steps(self.batches.steps_per_epoch)

    @property
    def lineage(self) -> str:
        """The fingerprint without the seed: runs that may be pooled into one mean share it."""
        return fingerprint_of({**identity(self.recipe), "stage": "pretrain", "seed": None})

    @property
    def product(self) -> Path:
        """The backbone file."""
        return self.run.path / BACKBONE_FILE

    def describe(self) -> str:
        """What would run, in words."""
        recipe, plan = self.recipe, self.batches
        rate = recipe.optimizer.rate(recipe.batch_size)
        lines = [
            f"{recipe.framework.kind}, {recipe.method}, {recipe.backbone.arch} ({recipe.backbone.stem} stem)",
            f"data      {recipe.data.name}: {len(self.train_images):,} images from {self.train_images.root}",
            f"length    {recipe.epochs} epochs × {plan.steps_per_epoch} steps of {recipe.batch_size} = "
            f"{self.num_steps:,} steps on {self.device}, {recipe.precision}",
            f"lr        {rate:g} (given {recipe.optimizer.lr:g} for a batch of "
            f"{recipe.optimizer.reference_batch_size or recipe.batch_size})",
            f"run       {self.run.path}{' (finished)' if self.run.is_finished else ''}",
            f"product   {self.product}",
        ]
        return "\n".join(lines)


def plan(recipe: PretrainRecipe, runs: Path, explicit: Path | None = None) -> PretrainPlan:
    """Check everything that can be checked before long work.

    Args:
        recipe: What to run.
        runs: Folder of all runs.
        explicit: The run directory, if the user wants another than the fingerprint's.

    Raises:
        UserError: If the data, the sizes or the run directory do not fit.
    """
    fingerprint = fingerprint_of({"stage": "pretrain", **identity(recipe)})
    run = locate_run(runs, "pretrain", recipe.name, fingerprint, explicit)
    run.check(recipe, fingerprint)
    device = resolve_device(recipe.device)
    train_images = open_split(recipe.data, "train")
    test_images = open_split(recipe.data, "test") if recipe.monitor is not None else None
    if test_images is not None:
        require_same_classes(train_images, test_images)
    batches = BatchPlan(len(train_images), recipe.batch_size, drop_last=True, seed=recipe.seed)
    steps, warmup = recipe.num_steps(batches.steps_per_epoch), recipe.warmup_steps(batches.steps_per_epoch)
    if recipe.epochs and warmup >= steps:
        raise ConfigError(f"warmup_epochs {recipe.warmup_epochs} are {warmup} steps, the run has only {steps}")
    if recipe.epochs:
        check_crop(train_images, recipe.data, recipe.augment)
    return PretrainPlan(recipe, fingerprint, run, device, train_images, test_images, batches)


def run(plan: PretrainPlan) -> Path:
    """Carry out a plan, from its checkpoint if there is one.

    Returns:
        The path of ``backbone.safetensors``. A finished run is returned as it is.
    """
    recipe, directory = plan.recipe, plan.run
    data: dict[str, Any] = {"train": plan.train_images.summary()["listing"]}
    if directory.is_finished:
        require_same_data(directory, finished_record(directory).data, data)
        say(f"{recipe.name}: finished before, see {directory.path}")
        return plan.product
    if not directory.checkpoint_file.exists():
        paths = [*plan.train_images.paths, *(plan.test_images.paths if plan.test_images is not None else ())]
        say(f"{recipe.name}: checking {len(paths):,} images")
        check_files(paths)
    directory.create(recipe, plan.fingerprint)

    torch.manual_seed(derived_seed(recipe.seed, "init"))
    model = MoCo(recipe.framework, recipe.backbone).to(plan.device).to(memory_format=torch.channels_last)
    metrics: dict[str, float] = {}
    seconds = 0.0
    if recipe.epochs:
        result = _train(plan, model, data)
        seconds = result.pop("seconds")
        metrics = result
    save_backbone(plan.product, model.trunk.state_dict(), _info(plan))
    Record(
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
        settings={"steps": plan.num_steps, "batch_size": recipe.batch_size, "precision": recipe.precision},
        metrics=metrics,
        data=data,
        environment=environment(),
        seconds=seconds,
    ).write(directory.record_file)
    directory.checkpoint_file.unlink(missing_ok=True)
    return plan.product


def _info(plan: PretrainPlan) -> BackboneInfo:
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
    )


def _train(plan: PretrainPlan, model: MoCo, data: dict[str, Any]) -> dict[str, float]:
    recipe = plan.recipe
    source = open_source(plan.train_images, recipe.data, plan.device)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=recipe.optimizer.rate(recipe.batch_size),
        momentum=recipe.optimizer.momentum,
        weight_decay=recipe.optimizer.weight_decay,
    )
    per_epoch = plan.batches.steps_per_epoch
    job = Job(
        title=recipe.name,
        run=plan.run,
        fingerprint=plan.fingerprint,
        data=data,
        model=model,
        optimizer=optimizer,
        schedule=lambda step: cosine_factor(step, plan.num_steps, recipe.warmup_steps(per_epoch)),
        num_steps=plan.num_steps,
        images_per_step=recipe.batch_size,
        device=plan.device,
        precision=recipe.precision,
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
    )
    if recipe.monitor is not None:
        job.evaluate_every = recipe.monitor.every_epochs * per_epoch
        job.evaluate = _Monitor(plan, model)
    photometric = Photometric(recipe.augment)

    def batches(first: int) -> Iterator[Batch]:
        return source.training(plan.batches, recipe.augment, 2, first, plan.num_steps)

    def losses(batch: Batch, step: int) -> dict[str, Tensor]:
        query_images, key_images = (
            photometric(view, generator(recipe.seed, "photometric", step, number)).contiguous(
                memory_format=torch.channels_last
            )
            for number, view in enumerate(batch.views)
        )
        return step_losses(model, recipe, query_images, key_images, step)

    started = time.monotonic()
    result = train(job, batches, losses)
    say(f"{recipe.name}: trained in {time.monotonic() - started:,.0f} s")
    return {
        "loss": _last_logged(plan.run, "loss"),
        "feature_std": _last_logged(plan.run, "feature_std"),
        **result,
    }


def step_losses(
    model: MoCo, recipe: PretrainRecipe, query_images: Tensor, key_images: Tensor, step: int
) -> dict[str, Tensor]:
    """One step's losses, L = L(q, k) + λ L(q_mix, k) + (1 - λ) L(q_mix[p⁻¹], k) (equations 4-6), and the queue update.

    Clean and mixed queries go through the encoder apart, so that their batch statistics do not mix; keys are never mixed.

    Args:
        model: The framework.
        recipe: The run's recipe.
        query_images: (N, 3, H, W) augmented, normalised.
        key_images: (N, 3, H, W) another view of the same images.
        step: The step, from which the mask and the shuffle are drawn.

    Returns:
        ``loss``, its terms, and ``feature_std``: the mean standard deviation of the query's components times √dim, which
        is 1 for directions spread evenly over the sphere and 0 for a collapsed encoder.
    """
    query = model.query(query_images)
    key = model.key(key_images, generator(recipe.seed, "shuffle", step))
    clean = model.loss(query, key).mean()
    terms = {"loss": clean, "clean": clean.detach()}
    if isinstance(recipe.mix, MixMask):
        mixture = draw_mixture(recipe.mix, query_images, generator(recipe.seed, "mask", step))
        mixed = model.query(mixture.images)
        switched = model.loss(mixed[mixture.switched], key) if recipe.mix.switch else None
        mix_loss = mixture_loss(model.loss(mixed, key), switched, mixture)
        terms = {"loss": clean + mix_loss, "clean": clean.detach(), "mix": mix_loss.detach()}
    terms["feature_std"] = query.detach().std(dim=0).mean() * query.shape[1] ** 0.5
    model.enqueue(key)
    return terms


def _last_logged(run: RunDirectory, name: str) -> float:
    lines = [json.loads(line) for line in run.log_file.read_text(encoding="utf-8").splitlines()]
    return float(next(line[name] for line in reversed(lines) if name in line))


class _Monitor:
    """kNN accuracy of the trunk as it stands."""

    def __init__(self, plan: PretrainPlan, model: MoCo) -> None:
        recipe = plan.recipe
        assert recipe.monitor is not None
        assert plan.test_images is not None
        self.recipe, self.settings, self.model = recipe, recipe.monitor, model
        self.num_classes = len(plan.train_images.classes)
        self.bank = self._open(plan.train_images, recipe.monitor.max_bank, plan.device)
        self.queries = self._open(plan.test_images, recipe.monitor.max_queries, plan.device)

    def _open(self, images: ImageSet, limit: int | None, device: torch.device) -> ImageSource:
        if limit is not None and limit < len(images):
            images = images.subset(torch.linspace(0, len(images) - 1, limit).long())
        return open_source(images, self.recipe.data, device)

    def __call__(self) -> dict[str, float]:
        (bank, bank_labels), (queries, query_labels) = (
            extract_features(
                f"{self.recipe.name}: kNN features",
                self.model.trunk,
                source,
                batch_size=self.settings.batch_size,
                resize=self.settings.resize,
                crop=self.recipe.augment.crop,
                precision=self.recipe.precision,
            )
            for source in (self.bank, self.queries)
        )
        accuracy = knn_accuracy(
            bank,
            bank_labels,
            queries,
            query_labels,
            num_classes=self.num_classes,
            k=self.settings.k,
            temperature=self.settings.temperature,
        )
        return {"knn/top1": accuracy}
