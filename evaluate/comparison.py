"""Compare two ways of pretraining: over seeds, or image by image for a single pair of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixmask.engine.errors import UserError
from mixmask.engine.predictions import CLASSES, MATCHES, PIXELS, ClassPredictions, DetectionMatches, PixelCounts
from mixmask.engine.wording import printable
from mixmask.evaluate.average_precision import THRESHOLDS, compare_detectors
from mixmask.evaluate.collect import Collection, Run, frame, one_run, select
from mixmask.evaluate.names import method_place, name, text_of
from mixmask.evaluate.results import Result, backbone_words, of_backbone, results_of, telling_keys
from mixmask.evaluate.statistics import Difference, PairOfRuns, compare_classifiers, compare_segmentations, difference


@dataclass(frozen=True)
class Comparison:
    """Two groups of runs that were measured alike.

    Attributes:
        what: Data set, protocol and metric.
        first, second: What is compared, in words.
        result: The first minus the second.
        one_backbone: Whether each group has one backbone only, so that the noise of pretraining is not in the result.
    """

    what: str
    first: str
    second: str
    result: Difference
    one_backbone: bool = False

    def words(self) -> str:
        """The comparison as one line of text."""
        text = f"{self.what}: {self.first} against {self.second}: {self.result.words()}"
        return text + (", all on one backbone each: pretraining does not vary" if self.one_backbone else "")

    def __str__(self) -> str:
        """The words, for ``print``."""
        return self.words()


def chosen(collection: Collection, which: str) -> list[Run]:
    """The transfer runs of a method, or those that satisfy a condition.

    Raises:
        UserError: If there are none, or the condition cannot be read.
    """
    runs = [run for run in collection.distinct if run.record.stage == "transfer"]
    if "/" in which and " " not in which and not Path(which).is_dir():
        raise UserError(f"{which}: no such run folder")
    methods = {run.record.method for run in runs}
    if which.isidentifier() and which not in methods:
        present = ", ".join(sorted(methods, key=method_place)) or "none"
        raise UserError(
            f"{which}: no transfer run below {collection.folder} has this method; methods there: {present}. A condition is "
            f'valid, too, such as "mix.grid == 4"'
        )
    if which not in methods and not any(sign in which for sign in "=<>"):
        raise UserError(
            f"{which}: is neither a method ({', '.join(sorted(methods, key=method_place)) or 'none'}), nor a run folder, "
            f'nor a condition such as "mix.grid == 4"'
        )
    if which in methods:
        found = [run for run in runs if run.record.method == which]
    else:
        kept = {*select(frame(runs), which)["run"]}
        found = [run for run in runs if printable(str(run.path)) in kept]
    if not found:
        present = ", ".join(sorted({run.record.method for run in runs})) or "none"
        raise UserError(f"{which!r}: no transfer run below {collection.folder}; methods there: {present}")
    return found


def compare(first: Sequence[Run], second: Sequence[Run], metrics: Sequence[str] | None = None) -> list[Comparison]:
    """Compare the backbones of two groups, pair by pair, where both were measured with the same protocol.

    Pairs of the same framework and training budget come first; only if there are none, other pairs are compared.

    Args:
        first: Transfer runs of the first group.
        second: Transfer runs of the second group.
        metrics: The metrics to compare; None takes the headline metrics of each protocol.

    Raises:
        UserError: If a backbone recipe is in both groups.
    """
    sides = [_pools(results_of(runs, metrics)) for runs in (first, second)]
    comparisons = []
    for measured, own in sides[0].items():
        others = sides[1].get(measured, {})
        both = own.keys() & others.keys()
        if both:
            shared = own[min(both)][0].run.record
            raise UserError(
                f"both groups have runs of one backbone recipe ({shared.name}): the two groups must differ in more "
                f"than seeds"
            )
        groups = {**own, **others}
        pairs = [(pool, other) for pool in sorted(own) for other in sorted(others)]
        for pool, other in _closest(pairs, groups):
            comparisons.append(_compared(own[pool], others[other], list(groups.values())))
    return sorted(comparisons, key=lambda one: (one.what, one.first, one.second))


Pool = tuple[str, ...]


def _closest(pairs: Sequence[tuple[Pool, Pool]], groups: Mapping[Pool, Sequence[Result]]) -> list[tuple[Pool, Pool]]:
    """The pairs of the same framework and pretraining epochs; if there are none, of the same framework; else all."""

    def alike(pair: tuple[Pool, Pool], *names: str) -> bool:
        records = [groups[pool][0].run.record for pool in pair]
        return all(getattr(records[0], one) == getattr(records[1], one) for one in names)

    for names in (("framework", "pretrain_epochs"), ("framework",), ()):
        found = [pair for pair in pairs if alike(pair, *names)]
        if found:
            return found
    return []


def _pools(results: Sequence[Result]) -> dict[Any, dict[tuple[str, ...], list[Result]]]:
    pools: dict[Any, dict[tuple[str, ...], list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        pools[result.protocol_key][result.pool].append(result)
    return pools


def _compared(first: Sequence[Result], second: Sequence[Result], groups: Sequence[Sequence[Result]]) -> Comparison:
    seeds = [[result.seeds for result in group] for group in (first, second)]
    # Pairs need the same seeds in both groups, each once.
    paired = sorted(map(repr, seeds[0])) == sorted(map(repr, seeds[1])) and len({*seeds[0]}) == len(seeds[0])
    parents = [{result.run.record.parent for result in group} for group in (first, second)]
    fixed = all(len(own) == 1 for own in parents) and max(len(first), len(second)) > 1
    ordered = [sorted(group, key=lambda result: repr(result.seeds)) for group in (first, second)]
    values = [[result.value for result in group] for group in ordered]
    record = first[0].run.record
    what = f"{name(record.dataset)}, {record.title}, {record.metric_name(first[0].metric)}"
    words = [_backbone(group[0], [other[0] for other in groups]) for group in (first, second)]
    return Comparison(what, words[0], words[1], difference(values[0], values[1], paired), fixed)


def _backbone(result: Result, all_results: Sequence[Result]) -> str:
    """A backbone in words, with the keys that distinguish it from others that have the same words."""
    words = backbone_words(result.run.record)
    alike = [other for other in all_results if backbone_words(other.run.record) == words]
    telling = [
        f"{key} {text_of(result.known[key])}" for key in telling_keys(alike) if result.known.get(key) is not None
    ]
    if len(alike) > 1 and not telling:
        telling = [f"backbone {result.pool[4][:8]}"]
    return f"{words[:-1]}, {', '.join(telling)})" if telling else words


def compare_runs(first: Path, second: Path, metrics: Sequence[str] | None = None) -> list[PairOfRuns]:
    """Compare two runs on the same test images, image by image, from the predictions they saved.

    Args:
        first: A finished transfer run's folder.
        second: Another, of the same kind.
        metrics: For detectors ``bbox/AP50`` and the like; all AP, AP50 and AP75 if None.

    Raises:
        UserError: If a run has no predictions, or they are not of the same kind and images.
    """
    runs = [_one(folder) for folder in (first, second)]
    if runs[0].record.protocol != runs[1].record.protocol:
        raise UserError(
            f"{first} is a run of {runs[0].record.protocol} and {second} of {runs[1].record.protocol}: not comparable"
        )
    if any((run.path / PIXELS).is_file() for run in runs):
        if metrics is not None and metrics != ["mIoU"]:
            raise UserError(
                f"--metric {', '.join(metrics)}: of two runs of {runs[0].record.protocol}, mIoU is compared"
            )
        counts = [PixelCounts.read(run.path / PIXELS) for run in runs]
        _require_same(
            counts[0].images == counts[1].images and np.array_equal(counts[0].labelled, counts[1].labelled), runs
        )
        return [compare_segmentations(counts[0], counts[1])]
    if not any((run.path / file).is_file() for run in runs for file in MATCHES.values()):
        metric = next((one for one in runs[0].record.headlines if one.endswith("/top1")), "")
        if metrics is not None and metrics != [metric]:
            raise UserError(
                f"--metric {', '.join(metrics)}: of two runs of {runs[0].record.protocol}, {metric} is compared"
            )
        answers = [ClassPredictions.read(run.path / CLASSES) for run in runs]
        same = answers[0].images == answers[1].images and np.array_equal(answers[0].labels, answers[1].labels)
        _require_same(same, runs)
        right = [one.predicted == one.labels for one in answers]
        return [compare_classifiers(metric, right[0], right[1])]
    found = []
    for kind, file in MATCHES.items():
        if not all((run.path / file).is_file() for run in runs) and kind != "bbox":
            continue
        wanted = [short for short in THRESHOLDS if metrics is None or f"{kind}/{short}" in metrics]
        matches = [DetectionMatches.read(run.path / file) for run in runs] if wanted else []
        if matches:
            _require_same(matches[0].is_like(matches[1]), runs)
        for short in wanted:
            found.append(compare_detectors(f"{kind}/{short}", matches[0], matches[1]))
    if not found:
        valid = [
            f"{kind}/{short}"
            for kind, file in MATCHES.items()
            for short in THRESHOLDS
            if all((run.path / file).is_file() for run in runs)
        ]
        raise UserError(f"--metric {', '.join(metrics or ())}: valid for these runs: {', '.join(valid)}")
    return found


def differences(first: Path, second: Path) -> str:
    """The keys in which the measurement of two runs differs, besides backbone and seeds; empty if none does."""
    results = [results_of([_one(folder)])[:1] for folder in (first, second)]
    keys = [key for key in telling_keys([one for found in results for one in found]) if not of_backbone(key)]
    pairs = [(key, *(found[0].known.get(key) for found in results)) for key in keys] if all(results) else []
    return "; ".join(f"{key} {one} and {other}" for key, one, other in pairs)


def _one(folder: Path) -> Run:
    run = one_run(folder)
    if run.record.stage != "transfer":
        raise UserError(f"{folder}: a pretraining run; compare transfer runs")
    return run


def _require_same(same: bool, runs: Sequence[Run]) -> None:
    if not same:
        raise UserError(
            f"{runs[0].path} and {runs[1].path} were tested on different images; only the same can be compared"
        )
