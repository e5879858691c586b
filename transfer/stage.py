"""The transfer stage: a recipe and a backbone in, a run directory with a record out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from mixmask.engine import distributed
from mixmask.engine.config import fingerprint_of, fingerprinted, identity
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe, Part, other_classes
from mixmask.engine.errors import ConfigError, RunFailure
from mixmask.engine.images import Images, ImageSet
from mixmask.engine.late import torch
from mixmask.engine.normalization import Normalization, statistics_of
from mixmask.engine.precision import check_precision, resolve_device
from mixmask.engine.progress import say
from mixmask.engine.readable import readable
from mixmask.engine.records import Record, environment, finished_record
from mixmask.engine.run import RecordedWork, carry_out
from mixmask.engine.storage import RunDirectory, locate_run
from mixmask.transfer.checkpoints.source import Source, read_source
from mixmask.transfer.protocol import LABELS, Setting, Split, TransferRecipe
from mixmask.transfer.zoo.references import locate_checkpoint


@dataclass(frozen=True)
class TransferPlan(RecordedWork[Record]):
    """A checked transfer run: backbone and data have been read, nothing has been trained or written."""

    recipe: TransferRecipe
    fingerprint: str
    run: RunDirectory
    device: torch.device
    source: Source
    train: Split
    test: Split

    @property
    def normalization(self) -> Normalization:
        """The data set whose mean and standard deviation normalise the images: the recipe's, else the backbone's."""
        return self.recipe.normalization or self.source.info.normalization

    @property
    @override
    def data(self) -> dict[str, Any]:
        """Digests that identify the training and the test split."""
        return {"train": self.train.summary()["listing"], "test": self.test.summary()["listing"]}

    @property
    @override
    def images(self) -> tuple[Split, Split]:
        return self.train, self.test

    @override
    def product(self, record: Record) -> Record:
        return _relabelled(record, self.recipe, self.run)

    @override
    def work(self) -> Record:
        recipe, info, data = self.recipe, self.source.info, self.data
        begun = time.monotonic()
        metrics = recipe.measure(
            Setting(
                self.run,
                self.fingerprint,
                data,
                self.device,
                self.source,
                self.train,
                self.test,
                self.normalization,
            )
        )
        if not recipe.headlines.keys() & metrics.keys():  # a mistake in the protocol: tables would not find its number
            raise RunFailure(
                f"protocol {recipe.protocol}: measured {', '.join(metrics) or 'nothing'}, and its headlines are "
                f"{', '.join(recipe.headlines)}; one of them must be measured"
            )
        seconds = metrics.pop("seconds", time.monotonic() - begun)  # of training, if the protocol trains
        metrics.pop("images_per_second", None)
        record = Record(
            stage="transfer",
            protocol=recipe.record_name,
            name=recipe.name,
            dataset=recipe.data.name,
            **_labels(self),
            arch=info.arch,
            seed=recipe.seed,
            fingerprint=self.fingerprint,
            parent=info.fingerprint,
            pretrain_seed=info.seed,
            lineage=info.lineage,
            # Without the seed: runs that differ in nothing but seeds are averaged.
            protocol_fingerprint=fingerprint_of({**fingerprinted(recipe), "seed": None}),
            title=recipe.title,
            task=recipe.task,
            headlines=dict(recipe.headlines),
            num_seeds=recipe.num_seeds,
            variation=recipe.variation,
            settings={"precision": recipe.precision, **recipe.settings(self.train)},
            recipe=identity(recipe),
            pretraining=info.pretraining,
            expected=recipe.expected,
            metrics=metrics,
            data=data,
            environment=environment(),
            seconds=seconds,
        )
        distributed.on_rank0(lambda: self.finish(record))
        return record

    def describe(self) -> str:
        """What would run, in words."""
        info, labels = self.source.info, _labels(self)
        return "\n".join(
            [
                f"{self.recipe.record_name} on {self.recipe.data.name}: {len(self.train):,} training and "
                f"{len(self.test):,} test images, {self.device}, {self.recipe.precision}",
                f"backbone  {self.source.path} ({info.arch}, {labels['framework']}, {labels['method']})",
                self.source.tensor_report.summary(),
                *(
                    ["          its results will have no name: label them with framework=… method=…"]
                    if "unknown" in (labels["framework"], labels["method"])
                    else []
                ),
                *(
                    f"expected  {expected.describe()}{other_classes(self.recipe.data.name, len(self.test.classes))}"
                    for expected in self.recipe.expected
                ),
                *(f"warning   {text}" for text in self.recipe.remarks()),
                f"run       {self.run.path}{' (finished)' if self.run.is_finished else ''}",
            ]
        )


def plan(recipe: TransferRecipe, runs: Path, explicit: Path | None = None, download: bool = True) -> TransferPlan:
    """Read the backbone, open the data, and check everything that can be checked before training.

    Args:
        recipe: What to do.
        runs: The folder of runs.
        explicit: A run directory of the user's choice.
        download: Whether a backbone that is named as ``zoo:…`` or ``hf:…`` may be downloaded.

    Raises:
        UserError: If the backbone, the data, the sizes or the run directory do not fit.
        RunFailure: If the backbone cannot be downloaded.
    """
    located = locate_checkpoint(recipe.backbone, download)
    recipe = located.known(recipe)
    source = read_source(located.path, located.reading)
    info = source.info
    check_labels({key: getattr(recipe, key) for key in LABELS}, source)
    fingerprint, run = locate(recipe, info.fingerprint, runs, explicit)
    run.check(recipe, fingerprint)
    device = resolve_device(recipe.device)
    check_precision(device, recipe.precision)
    recipe.check(source, device)
    if info.in_channels != 3 and not recipe.takes_any_channels:
        raise ConfigError(
            f"protocol {recipe.protocol}: this backbone takes images of {info.in_channels} channels, and the protocol reads "
            f"RGB images only"
        )
    train, test = recipe.open(partial(_opened, info.in_channels)) if recipe.takes_any_channels else recipe.open()
    plan = TransferPlan(recipe, fingerprint, run, device, source, train, test)
    if recipe.takes_any_channels:
        _check_statistics(plan)
    return plan


def _opened(channels: int, data: DataRecipe, part: Part) -> ImageSet:
    """Images as the backbone takes them."""
    return open_split(data, part).with_decoding(channels)


def _check_statistics(plan: TransferPlan) -> None:
    try:
        statistics_of(plan.normalization, plan.source.info.in_channels)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_labels(labels: Mapping[str, Any], source: Source) -> None:
    """Refuse labels that contradict the metadata of the backbone file.

    Raises:
        ConfigError: The message names the key and what the file says.
    """
    info = source.info
    known = {
        "framework": info.framework,
        "method": info.method,
        "pretrain_epochs": info.epochs,
        "pretrain_data": info.dataset,
    }
    for key, given in labels.items():
        if given is not None and source.labelled and known[key] not in ("unknown", None, given):
            raise ConfigError(f"{key}={given}: {source.path} says itself that it is {known[key]}; leave the key out")


def locate(recipe: TransferRecipe, parent: str, runs: Path, explicit: Path | None = None) -> tuple[str, RunDirectory]:
    """The fingerprint and the run directory of a recipe on the backbone with the fingerprint ``parent``; reads nothing."""
    fingerprint = fingerprint_of({"stage": "transfer", **fingerprinted(recipe)}, parent=parent)
    return fingerprint, locate_run(runs, "transfer", recipe.name, fingerprint, explicit)


def run(plan: TransferPlan) -> Record:
    """Carry out a plan, resuming from its checkpoint if there is one. A finished run is not run again."""
    return carry_out(_of_readable_images(plan))


def _of_readable_images(plan: TransferPlan) -> TransferPlan:
    """The plan without images that cannot be read, if the recipe wants them left out (``data.skip_unreadable``)."""
    if not getattr(plan.recipe.data, "skip_unreadable", False):
        return plan
    if not isinstance(plan.train, Images) or not isinstance(plan.test, Images):
        raise ConfigError(
            f"data.skip_unreadable: protocol {plan.recipe.protocol} cannot leave images out; leave it out"
        )
    test = readable(plan.test)
    return replace(plan, train=test if plan.train is plan.test else readable(plan.train), test=test)


def _labels(plan: TransferPlan) -> dict[str, Any]:
    """The labels of the result, from the recipe and the backbone file.

    Framework and method of the recipe override the file's, which are a guess for foreign checkpoints. Epochs and data
    set of the recipe fill in what the file does not say. `check_labels` has refused contradictions.
    """
    info, recipe = plan.source.info, plan.recipe
    return {
        "framework": recipe.framework or info.framework,
        "method": recipe.method or info.method,
        "pretrain_epochs": recipe.pretrain_epochs if info.epochs is None else info.epochs,
        "pretrain_dataset": recipe.pretrain_data if info.dataset is None else info.dataset,
    }


def relabel(recipe: TransferRecipe, run: RunDirectory) -> None:
    """Give a finished run the labels of the recipe; what is not given stays as it is."""
    _relabelled(finished_record(run), recipe, run)


def _relabelled(record: Record, recipe: TransferRecipe, run: RunDirectory) -> Record:
    """Update the labels of a finished run; what is not given stays as it is.

    Labels are not part of the fingerprint, so they can change without a new measurement.
    """
    given = {
        "framework": recipe.framework,
        "method": recipe.method,
        "pretrain_epochs": recipe.pretrain_epochs,
        "pretrain_dataset": recipe.pretrain_data,
    }
    labels = {key: value for key, value in given.items() if value is not None}
    if labels == {key: getattr(record, key) for key in labels}:
        return record
    changed = record.model_copy(update=labels)
    say(f"{recipe.name}: labels updated in {run.record_file}: {', '.join(map(str, labels.values()))}")
    changed.write(run.record_file)
    return changed
