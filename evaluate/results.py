"""Results: one number of one run, with what it may be compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mixmask.engine.records import Record
from mixmask.evaluate.collect import ABLATED, Run, ablation, ablation_of, flat
from mixmask.evaluate.names import epochs_name, name

SEEDS = ("seed", "pretrain.seed")
TWICE = ("recipe_iterations", "recipe_batch_size", "num_labelled", "pretrain.backbone.arch", "pretrain.data.name")


@dataclass(frozen=True, eq=False)
class Result:
    """A metric of a transfer run."""

    run: Run
    metric: str

    @property
    def value(self) -> float:
        """In percent."""
        return self.run.record.metrics[self.metric]

    @cached_property
    def dims(self) -> Mapping[str, Any]:
        """By what results are put into rows and columns."""
        record = self.run.record
        return {
            "protocol": record.protocol,
            "dataset": record.dataset,
            "framework": record.framework,
            "method": record.method,
            "arch": record.arch,
            "pretrain_dataset": record.pretrain_dataset,
            "pretrain_epochs": record.pretrain_epochs,
            "metric": self.metric,
            "title": record.title,
            "column": record.headlines.get(self.metric, f"{record.title} {record.metric_name(self.metric)}"),
            **ablation(record),
        }

    @cached_property
    def known(self) -> Mapping[str, Any]:
        """All that is known of how it was made, as flat keys."""
        record = self.run.record
        images = {f"images.{split}": listing for split, listing in record.data.items()}
        settings = {key: value for key, value in flat(record.settings).items() if key not in (*SEEDS, *TWICE)}
        return {**settings, **self.facts, **images}

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Its own recipe and its backbone's, as flat keys."""
        record = self.run.record
        return facts(
            record.recipe,
            record.pretraining,
            record.arch,
            record.pretrain_dataset,
            record.pretrain_epochs,
            record.method,
        )

    @cached_property
    def protocol_key(self) -> str:
        """Fingerprint of how it was measured, and what."""
        return f"{self.measurement}:{self.metric}"

    @cached_property
    def measurement(self) -> str:
        """Fingerprint of how it was measured: the transfer recipe, its settings, and the images."""
        record = self.run.record
        identity = {
            "protocol": record.protocol,
            "dataset": record.dataset,
            "recipe": record.protocol_fingerprint,
            "settings": {key: value for key, value in record.settings.items() if key != "seed"},
            "data": record.data,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @cached_property
    def pool(self) -> tuple[str, ...]:
        """Results that share it differ in seeds only, and have one mean."""
        record = self.run.record
        backbone = record.lineage or record.parent or record.fingerprint
        return (
            record.pretrain_dataset or "",
            record.framework,
            record.method,
            record.arch,
            backbone,
            self.protocol_key,
        )

    @cached_property
    def peers(self) -> tuple[Any, ...]:
        """Results that share it were measured alike, on backbones trained alike in all but the mixture and the seed."""
        record = self.run.record
        trained = {key: value for key, value in record.pretraining.items() if key not in ("mix", "seed")}
        return (
            self.protocol_key,
            record.arch,
            record.pretrain_dataset,
            record.pretrain_epochs,
            json.dumps(trained, sort_keys=True, default=str),
        )

    @property
    def seeds(self) -> tuple[int | None, int]:
        """Of the pretraining and of the transfer run."""
        return self.run.record.pretrain_seed, self.run.record.seed


def facts(
    recipe: Mapping[str, Any],
    pretraining: Mapping[str, Any],
    arch: str | None,
    dataset: str | None,
    epochs: float | None,
    method: str,
) -> dict[str, Any]:
    """A transfer recipe and its backbone's as flat keys; what tables 1 to 3 vary has their names, seeds are left out."""
    varied = {name: value for name, value in ablation_of(pretraining, method).items() if value is not None}
    everything = {
        **flat(recipe),
        **flat(pretraining, "pretrain."),
        "pretrain.arch": arch,
        "pretrain.dataset": dataset,
        "pretrain.epochs": epochs,
        **varied,
    }
    said = (*SEEDS, *TWICE, *(f"pretrain.{name}" for name in varied))
    return {key: value for key, value in everything.items() if key not in said}


def results_of(runs: Iterable[Run], metrics: Sequence[str] | None = None) -> list[Result]:
    """The headline numbers of transfer runs, or the given metrics where a run has them."""
    found = []
    for run in runs:
        if run.record.stage == "transfer":
            wanted = [*run.record.headlines] if metrics is None else metrics
            found += [Result(run, metric) for metric in wanted if metric in run.record.metrics]
    return found


def first_headline(result: Result) -> bool:
    """Whether it is the number for which its protocol is run in the first place."""
    return result.metric == next(iter(result.run.record.headlines), None)


def telling_keys(results: Sequence[Result]) -> list[str]:
    """The keys of `Result.known` in which some of the results differ."""
    keys = dict.fromkeys(key for result in results for key in result.known)
    return sorted(key for key in keys if len({repr(result.known.get(key)) for result in results}) > 1)


def of_backbone(key: str) -> bool:
    """Whether a key of `Result.known` is about the backbone, not about how it was measured."""
    return key.startswith("pretrain.") or key in ABLATED


def backbone_words(record: Record) -> str:
    """What was pretrained: ``MixMask (MoCo v2, 200 epochs)``."""
    epochs = f", {epochs_name(record.pretrain_epochs)} epochs" if record.pretrain_epochs else ""
    return f"{name(record.method)} ({name(record.framework)}{epochs})"
