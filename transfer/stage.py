"""The transfer stage: a recipe and a backbone in, a run directory with a record out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import distributed
from engine.augment import Normalization
from engine.checkpoint import require_same_data
from engine.config import fingerprint_of, identity
from engine.datasets import ImageSet, OpenImages, open_split, other_classes, require_same_classes
from engine.errors import ConfigError, RunDirectoryError
from engine.loader import check_crop
from engine.ownership import owned
from engine.precision import check_precision, resolve_device
from engine.progress import say
from engine.records import Record, environment, finished_record
from engine.storage import RunDirectory, locate_run, require_output_file
from transfer import classify
from transfer.checkpoints.source import Source, read_source
from transfer.detection.annotations import DetectionSet, open_detection
from transfer.detection.run import check_annotations, check_engine, run_detection
from transfer.detection.setting import Setting
from transfer.recipe import (
    LABELS,
    DetectTransferRecipe,
    KnnRecipe,
    LinearRecipe,
    SemisupRecipe,
    TransferRecipe,
    load_transfer_recipe,
)
from transfer.subsets import balanced_subset, listed_subset


@dataclass(frozen=True)
class TransferPlan:
    """A checked transfer run: backbone and data have been read, nothing has been trained or written."""

    recipe: TransferRecipe
    fingerprint: str
    run: RunDirectory
    device: torch.device
    source: Source
    train: ImageSet | DetectionSet
    test: ImageSet | DetectionSet

    @property
    def protocol(self) -> str:
        """The protocol's name in records and tables: ``knn``, ``linear``, ``semisup_1``, ``detect_voc`` …"""
        if isinstance(self.recipe, SemisupRecipe):
            return f"semisup_{self.recipe.labels:g}"
        return self.recipe.protocol

    @property
    def normalization(self) -> Normalization:
        """Whose mean and deviation the images are normalised with."""
        return self.recipe.normalization or self.source.info.normalization

    @property
    def data(self) -> dict[str, Any]:
        """Identity of the data."""
        return {"train": self.train.summary()["listing"], "test": self.test.summary()["listing"]}

    def describe(self) -> str:
        """What would run, in words."""
        info, labels = self.source.info, _labels(self)
        return "\n".join(
            [
                f"{self.protocol} on {self.recipe.data.name}: {len(self.train):,} training and {len(self.test):,} test "
                f"images, {self.device}, {self.recipe.precision}",
                f"backbone  {self.source.path} ({info.arch}, {labels['framework']}, {labels['method']})",
                self.source.account.summary(),
                *(
                    f"expected  {expected.describe()}{other_classes(self.recipe.data.name, len(self.test.classes))}"
                    for expected in self.recipe.expected
                ),
                *(f"warning   {text}" for text in self.recipe.remarks()),
                f"run       {self.run.path}{' (finished)' if self.run.is_finished else ''}",
            ]
        )


def plan(recipe: TransferRecipe, runs: Path, explicit: Path | None = None) -> TransferPlan:
    """Check everything that can be checked before long work.

    Raises:
        UserError: If the backbone, the data, the sizes or the run directory do not fit.
    """
    source = read_source(Path(recipe.backbone).expanduser())
    info = source.info
    known_labels = (info.framework, info.method, info.epochs, info.dataset)
    for key, known in zip(LABELS, known_labels, strict=True):
        given = getattr(recipe, key)
        if given is not None and source.labelled and known not in ("unknown", None, given):
            raise ConfigError(f"{key}={given}: {source.path} says itself that it is {known}; leave the key out")
    _check_backbone(recipe, source)
    fingerprint, run = locate(recipe, info.fingerprint, runs, explicit)
    run.check(recipe, fingerprint)
    device = resolve_device(recipe.device)
    check_precision(device, recipe.precision)
    if isinstance(recipe, SemisupRecipe) and recipe.sync_bn and distributed.world().size > 1 and device.type != "cuda":
        raise ConfigError(
            "sync_bn (preset swav sets it): torch's SyncBatchNorm runs on GPUs only; set sync_bn=false on this machine"
        )
    if isinstance(recipe, DetectTransferRecipe):
        check_engine(recipe, info.recipe, device, recipe.precision)
    return TransferPlan(recipe, fingerprint, run, device, source, *open_data(recipe))


def _check_backbone(recipe: TransferRecipe, source: Source) -> None:
    """Refuse a backbone that lacks what the recipe measures, or that its detector cannot take."""
    if isinstance(recipe, KnnRecipe) and recipe.features == "head" and source.info.head is None:
        raise ConfigError(
            f"features=head: {source.path} holds no projection head. Files of this project's own pretraining hold one "
            f"(earlier versions did not write it); for others set features=trunk"
        )
    normalization = recipe.normalization or source.info.normalization
    if isinstance(recipe, DetectTransferRecipe) and normalization != "imagenet":
        raise ConfigError(
            f"normalization: this trunk was trained with the mean and deviation of {normalization}; detection takes "
            f"ImageNet's only (MoCo's protocol)"
        )


def locate(recipe: TransferRecipe, parent: str, runs: Path, explicit: Path | None = None) -> tuple[str, RunDirectory]:
    """The fingerprint and the run directory of a recipe on the backbone with the fingerprint ``parent``; reads nothing."""
    fingerprint = fingerprint_of({"stage": "transfer", **identity(recipe)}, parent=parent)
    return fingerprint, locate_run(runs, "transfer", recipe.name, fingerprint, explicit)


def open_data(
    recipe: TransferRecipe, open_images: OpenImages = open_split
) -> tuple[ImageSet, ImageSet] | tuple[DetectionSet, DetectionSet]:
    """The training and the test images of a recipe, and that its sizes fit them.

    Raises:
        UserError: If the data are missing or damaged, or a size does not fit them.
    """
    if isinstance(recipe, DetectTransferRecipe):
        train_set, test_set = open_detection(recipe)
        check_annotations(recipe, test_set.classes)
        return train_set, test_set
    train, test = open_images(recipe.data, "train"), open_images(recipe.data, "test")
    require_same_classes(train, test, recipe.data.allow_overlap)
    if isinstance(recipe, SemisupRecipe):
        train = _labelled(recipe, train)
    if not isinstance(recipe, KnnRecipe) and recipe.batch_size > len(train):
        raise ConfigError(
            f"batch_size {recipe.batch_size} is larger than the {len(train)} labelled images of "
            f"'{recipe.data.name}': choose at most {len(train)}"
        )
    if not isinstance(recipe, KnnRecipe) and recipe.augment is not None:
        check_crop(train, recipe.data, recipe.augment)
    if isinstance(recipe, KnnRecipe) and recipe.k > len(train):
        raise ConfigError(f"k {recipe.k} is larger than the {len(train)} training images of '{recipe.data.name}'")
    return train, test


def _labelled(recipe: SemisupRecipe, train: ImageSet) -> ImageSet:
    if recipe.label_list is not None:
        listed = listed_subset(train, Path(recipe.label_list).expanduser())
        share = 100 * len(listed) / len(train)
        if not 0.8 * recipe.labels <= share <= 1.25 * recipe.labels:
            raise ConfigError(
                f"{recipe.label_list}: names {share:.2g} % of the {len(train):,} images, but labels is {recipe.labels:g}"
            )
        return listed
    return balanced_subset(train, recipe.labels, recipe.subset_seed)


def run(plan: TransferPlan) -> Record:
    """Carry out a plan, from its checkpoint if there is one; a finished run is returned as it is."""
    record = _finished(plan)
    if record is not None:
        return record
    with owned(plan.run):
        return _finished(plan) or _run(plan)


def _finished(plan: TransferPlan) -> Record | None:
    directory = plan.run
    if not directory.is_finished:
        return None
    record = finished_record(directory)
    require_same_data(directory, record.data, plan.data)
    record = _relabelled(record, plan)
    say(f"{plan.recipe.name}: finished before, see {directory.path}")
    return record


def _run(plan: TransferPlan) -> Record:
    recipe, directory = plan.recipe, plan.run
    distributed.first_only(lambda: _prepare(plan))
    result = _measure(plan)
    seconds = result.pop("seconds", 0.0)
    result.pop("images_per_second", None)
    info = plan.source.info
    record = Record(
        stage="transfer",
        protocol=plan.protocol,
        name=recipe.name,
        dataset=recipe.data.name,
        **_labels(plan),
        arch=info.arch,
        seed=recipe.seed,
        fingerprint=plan.fingerprint,
        parent=info.fingerprint,
        pretrain_seed=info.seed,
        lineage=info.lineage,
        protocol_fingerprint=fingerprint_of({**identity(recipe), "seed": None}),
        settings=_settings(plan),
        recipe=identity(recipe),
        pretraining=info.pretraining,
        expected=recipe.expected,
        metrics=result,
        data=plan.data,
        environment=environment(),
        seconds=seconds,
    )

    def finish() -> None:
        directory.finish(record.text())
        directory.discard_checkpoints()

    distributed.first_only(finish)
    return record


def _prepare(plan: TransferPlan) -> None:
    """Look at every image before long work starts, and make the run directory."""
    if not plan.run.checkpoint_file.exists():
        for images in (plan.train, plan.test):
            if isinstance(images, ImageSet):
                images.check()
    plan.run.create(plan.recipe, plan.fingerprint)


def _labels(plan: TransferPlan) -> dict[str, Any]:
    """Framework, method, epochs and data: what is known, or what the user says, who must not contradict a file."""
    info, recipe = plan.source.info, plan.recipe
    return {
        "framework": recipe.framework or info.framework,
        "method": recipe.method or info.method,
        "pretrain_epochs": recipe.pretrain_epochs if info.epochs is None else info.epochs,
        "pretrain_dataset": recipe.pretrain_data if info.dataset is None else info.dataset,
    }


def _relabelled(record: Record, plan: TransferPlan) -> Record:
    """The record of a finished run under the labels that the user gives now; it is rewritten if they changed."""
    labels = _labels(plan)
    if labels == {key: getattr(record, key) for key in labels}:
        return record
    changed = record.model_copy(update=labels)
    changed.write(plan.run.record_file)
    return changed


def _settings(plan: TransferPlan) -> dict[str, Any]:
    """What must be printed with the number for it to mean something."""
    recipe = plan.recipe
    common: dict[str, Any] = {"precision": recipe.precision}
    if isinstance(recipe, KnnRecipe):
        return {
            **common,
            "k": recipe.k,
            "temperature": recipe.temperature,
            "features": classify.knn_features(recipe),
        }
    if isinstance(recipe, LinearRecipe):
        return {
            **common,
            "lr": recipe.lr,
            "epochs": recipe.epochs,
            "batch_size": recipe.batch_size,
            "epoch": "last",
        }
    if isinstance(recipe, SemisupRecipe):
        lr_trunk, lr_head = recipe.rates
        return {
            **common,
            "labels": recipe.labels,
            "num_labelled": len(plan.train),
            "lr_trunk": lr_trunk,
            "lr_head": lr_head,
            "epochs": recipe.epochs,
            "epoch": "last",
        }
    return {
        **common,
        "engine": recipe.engine,
        "iterations": recipe.scaled_length(recipe.iterations),
        "batch_size": recipe.batch_size,
        "lr": recipe.scaled_lr,
        "recipe_iterations": recipe.iterations,
        "recipe_batch_size": recipe.reference_batch_size or recipe.batch_size,
    }


def _measure(plan: TransferPlan) -> dict[str, float]:
    recipe = plan.recipe
    if isinstance(recipe, DetectTransferRecipe):
        assert isinstance(plan.train, DetectionSet)
        assert isinstance(plan.test, DetectionSet)
        setting = Setting(
            run=plan.run,
            fingerprint=plan.fingerprint,
            data=plan.data,
            device=plan.device,
            precision=recipe.precision,
            seed=recipe.seed,
            title=recipe.name,
            log_every=recipe.log_every,
            checkpoint_every=recipe.checkpoint_every,
            backbone=plan.source.info.recipe,
            state=plan.source.state,
            train_set=plan.train,
            test_set=plan.test,
        )
        return run_detection(recipe, setting)
    assert isinstance(plan.train, ImageSet)
    assert isinstance(plan.test, ImageSet)
    given = classify.Setting(
        plan.run, plan.fingerprint, plan.data, plan.device, plan.source, plan.train, plan.test, plan.normalization
    )
    if isinstance(recipe, KnnRecipe):
        return classify.run_knn(recipe, given)
    if isinstance(recipe, LinearRecipe):
        return classify.run_linear(recipe, given)
    return classify.run_semisup(recipe, given)


def dump_detectron2_config(plan: TransferPlan, file: Path, force: bool = False) -> str:
    """Write a detection plan for Detectron2's own tools: a YAML file, and the trunk as ``.pkl`` beside it.

    Raises:
        UserError: If a file stands there and ``force`` is not given.
        ConfigError: If the recipe is not one of detection, or Detectron2 cannot do it or does not import.
    """
    if not isinstance(plan.recipe, DetectTransferRecipe):
        raise ConfigError(f"protocol {plan.recipe.protocol}: only detection has a Detectron2 config")
    from transfer.checkpoints.export import write_detectron2
    from transfer.detection.detectron2_config import dump_config

    assert isinstance(plan.test, DetectionSet)
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: Detectron2's configs end in .yaml")
    weights = file.with_suffix(".pkl")
    for path in (file, weights):
        require_output_file(path, force)
    recipe = plan.recipe
    trunk = plan.source.info.recipe
    dump_config(recipe, trunk, plan.test, recipe.precision, recipe.seed, weights.resolve(), file)
    num = write_detectron2(weights, plan.source.state)
    return f"{file}: Detectron2 config\n{weights}: {num} tensors of the trunk, its MODEL.WEIGHTS"


def show_detections(folder: Path, out: Path, num: int, least_score: float) -> str:
    """Draw what a finished detection run found; see `transfer.detection.show`.

    Raises:
        UserError: If the folder is not that of a finished detection run.
    """
    from transfer.detection.show import show_detections as draw

    directory = RunDirectory(folder)
    if not directory.recipe_file.is_file():
        raise RunDirectoryError(f"{folder}: no run directory (no recipe.yaml in it)")
    recipe = load_transfer_recipe(directory.recipe_file)
    if not isinstance(recipe, DetectTransferRecipe):
        raise RunDirectoryError(f"{folder}: a run of {recipe.protocol}, not of detection")
    if not directory.is_finished:
        raise RunDirectoryError(f"{folder}: not finished; the command that started it goes on")
    return draw(recipe, recipe.name, folder, out, num, least_score)
