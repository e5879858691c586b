"""Read the records in a folder of runs, and make one DataFrame with a row per run."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tabulate import tabulate

from mixmask.engine.errors import DataError, UserError, listed
from mixmask.engine.records import Record, finished_record
from mixmask.engine.storage import RunDirectory, write_atomic
from mixmask.engine.wording import did_you_mean, printable
from mixmask.evaluate.query import UnknownColumn, holds
from mixmask.evaluate.spreadsheet import safe_cell

FIXED = {
    "run": "the run's folder",
    "stage": "pretrain or transfer",
    "protocol": "pretrain, or the transfer protocol: knn, linear, detect_voc …",
    "name": "the recipe's name",
    "dataset": "what it was measured on (pretraining: trained on)",
    "framework": "mocov2, simclr …, or what a foreign checkpoint was labelled with",
    "method": "what the framework was pretrained with: vanilla, mixmask …; random is untrained",
    "arch": "the backbone's architecture",
    "seed": "of this run",
    "fingerprint": "of everything that can change the numbers",
    "parent": "fingerprint of the backbone",
    "pretrain_dataset": "what the backbone was trained on",
    "pretrain_epochs": "for how long",
    "pretrain_seed": "with which seed",
    "lineage": "fingerprint of the pretraining recipe without its seed",
    "protocol_fingerprint": "fingerprint of the transfer recipe without its seed",
    "mix.grid": "MixMask: cells per side",
    "mix.mask": "MixMask: block or discrete",
    "mix.ratio": "MixMask, a text: '0.5', or 'uniform(0,1)'",
    "mix.switch": "MixMask: whether the switch image has a loss",
    "mix.permutation": "MixMask upon Un-Mix: same or different",
    "mix.unmix_prob": "Un-Mix: share of Mixup",
    "engine": "detection: torchvision or detectron2",
    "seconds": "of training",
    "device": "GPU or cpu",
    "world_size": "processes",
    "torch": "version",
    "git_commit": "of this project's code",
}
COLUMNS_HINT = "`mixmask results RUNS --columns` lists the columns"
ABLATED = ("mix.grid", "mix.mask", "mix.ratio", "mix.switch", "mix.permutation", "mix.unmix_prob")
PATTERNS = {
    "knn/…, linear/…, semisup/…, bbox/…, segm/…, …": "metrics, in percent where they are accuracies or average precisions",
    "setting.…": "what must be printed with the number, such as setting.k",
    "recipe.…": "the run's own recipe, such as recipe.lr",
    "pretrain.…": "the backbone's recipe, such as pretrain.batch_size; its mixture's keys are mix.…",
}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder and its record. Compared by identity."""

    path: Path
    record: Record


@dataclass(frozen=True)
class Collection:
    """What lies in a folder of runs.

    Attributes:
        folder: Where it was looked for.
        runs: Finished ones, ordered by path.
        damaged: Files that should be records and are not, with the reason.
        unfinished: Run directories without a record.
    """

    folder: Path
    runs: tuple[Run, ...]
    damaged: tuple[tuple[Path, str], ...]
    unfinished: tuple[Path, ...]

    @cached_property
    def _of_each(self) -> dict[tuple[str, str], list[Run]]:
        """The runs of each stage and fingerprint, in an order that does not depend on their folders."""
        found: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in sorted(self.runs, key=lambda run: (json.dumps(run.record.metrics, sort_keys=True), run.record.name)):
            found[run.record.stage, run.record.fingerprint].append(run)
        return found

    @cached_property
    def distinct(self) -> tuple[Run, ...]:
        """One run per stage and fingerprint: a copied folder, or the same run under two names, counts once."""
        kept = {same[0] for same in self._of_each.values()}
        return tuple(run for run in self.runs if run in kept)

    def remarks(self, most: int = 10) -> str:
        """What was left out, one file to a line; empty if nothing was."""
        lines = [f"left out {path}: {reason}" for path, reason in self.damaged]
        lines += [
            f"left out {run.path}: other numbers than {same[0].path}, which says it is the same run"
            for same in self._of_each.values()
            for run in same
            if run.record.metrics != same[0].record.metrics
        ]
        lines += [f"unfinished: {path} (resume it, or delete the folder)" for path in self.unfinished]
        return "\n".join(map(printable, listed(lines, most)))


def collection_of(folder: Path, places: Iterable[tuple[Path, bool]]) -> Collection:
    """The runs in some run directories.

    Args:
        folder: The folder that messages name.
        places: Each directory, and whether it should hold a record.
    """
    runs, damaged, unfinished = [], [], []
    for place, has_record in places:
        file = RunDirectory(place).record_file
        if not has_record:
            unfinished.append(place)
            continue
        try:
            runs.append(Run(place, Record.read(file)))
        except (ValueError, OSError, RecursionError) as error:
            damaged.append((file, (str(error) or type(error).__name__).splitlines()[0]))
    return Collection(folder, tuple(runs), tuple(damaged), tuple(unfinished))


def one_run(folder: Path) -> Run:
    """The finished run in a folder.

    Raises:
        UserError: If there is none, or its record is damaged.
    """
    directory = RunDirectory(folder)
    if not directory.is_finished:
        raise DataError(f"{folder}: not the folder of a finished run (no record.json in it)")
    return Run(folder, finished_record(directory))


def collect(folder: Path, may_be_empty: bool = False) -> Collection:
    """Read every ``record.json`` below a folder.

    Args:
        folder: The folder.
        may_be_empty: Whether a folder without a finished run is no error.

    Raises:
        DataError: If the folder is missing, or holds no finished run (the unfinished and damaged ones are named).
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is a file, not a' if folder.exists() else 'no such'} folder of runs")
    unreadable: list[tuple[Path, str]] = []

    def listed_as_unreadable(error: OSError) -> None:
        unreadable.append((Path(str(error.filename)), f"cannot be read ({error.strerror})"))

    found = collection_of(folder, _run_directories(folder, listed_as_unreadable))
    collection = replace(found, damaged=(*found.damaged, *unreadable))
    if not collection.runs and not may_be_empty:
        remarks = collection.remarks()
        raise DataError(f"{folder}: no finished run" + " (no record.json in it)" * (not remarks), *remarks.splitlines())
    return collection


def _run_directories(folder: Path, unreadable: Callable[[OSError], None]) -> Iterator[tuple[Path, bool]]:
    """Folders with a record or a recipe, in order, and whether there is a record."""
    for place, folders, files in os.walk(folder, onerror=unreadable):
        # In place: os.walk then visits the folders in this order.
        folders.sort()
        here = {*files, *folders}
        run = RunDirectory(Path(place))
        if run.record_file.name in here or run.recipe_file.name in here:
            yield run.path, run.record_file.name in here


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; lists and tuples become JSON text, which can be compared and shown."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return result


def ablation(record: Record) -> dict[str, Any]:
    """The keys that the paper's tables 1 to 3 vary; None if the method has no such key or its value is unknown."""
    return ablation_of(record.recipe if record.stage == "pretrain" else record.pretraining, record.method)


def ablation_of(pretraining: Mapping[str, Any], method: str) -> dict[str, Any]:
    """As `ablation`, of a pretraining recipe."""
    mix = pretraining.get("mix")
    if not isinstance(mix, Mapping) or method == "random":  # an untrained network has seen no mixture
        mix = {}
    ratio = mix.get("ratio")
    if isinstance(ratio, list | tuple):
        ratio = f"uniform({','.join(f'{bound:g}' for bound in ratio)})"
    elif isinstance(ratio, int | float):
        ratio = f"{ratio:g}"
    return {
        "mix.grid": mix.get("grid"),
        "mix.mask": mix.get("mask"),
        "mix.ratio": ratio,
        "mix.switch": mix.get("switch"),
        "mix.permutation": mix.get("permutation"),
        "mix.unmix_prob": mix.get("unmix_prob"),
    }


def _mixture(pretraining: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the mixture under their names in configs: no other recipe has such keys."""
    mix = pretraining.get("mix")
    return flat(mix, "mix.") if isinstance(mix, Mapping) else {}


def row(run: Run, per_class: bool = False) -> dict[str, Any]:
    """A run as a row of the frame."""
    record, environment = run.record, run.record.environment
    own = {name: getattr(record, name) for name in FIXED if name in Record.model_fields}
    pretraining = record.recipe if record.stage == "pretrain" else record.pretraining
    recipe = record.recipe if record.stage == "transfer" else {}
    return {
        **{name: value for name, value in record.metrics.items() if per_class or name.count("/") < 2},
        "run": printable(str(run.path)),
        **own,
        **_mixture(pretraining),
        **ablation(record),
        **flat({"engine": record.settings.get("engine")}),
        **flat({name: environment.get(name) for name in ("device", "world_size", "torch", "git_commit")}),
        **flat(record.settings, "setting."),
        **flat(recipe, "recipe."),
        **{
            name: value
            for name, value in flat(pretraining, "pretrain.").items()
            if not name.startswith("pretrain.mix.")
        },
    }


def frame(runs: Sequence[Run], per_class: bool = False) -> pd.DataFrame:
    """One row per run; the columns are those of `FIXED`, then metrics, then what `PATTERNS` describes.

    Args:
        runs: Finished runs.
        per_class: With the average precision of every class (``bbox/AP/cat``).
    """
    rows = [row(run, per_class) for run in runs]
    names = dict.fromkeys(name for one in rows for name in one)
    order = {"setting": 1, "recipe": 2, "pretrain": 3}
    rest = sorted(
        (name for name in names if name not in FIXED), key=lambda name: (order.get(name.split(".")[0], 0), name)
    )
    return pd.DataFrame(rows, columns=[*FIXED, *rest])


def select(table: pd.DataFrame, query: str) -> pd.DataFrame:
    """The rows that satisfy a condition; see `evaluate.query`.

    Names with slashes are written in backticks: ```knn/top1` > 60``.

    Raises:
        UserError: If the condition cannot be read, or names a column that is not there.
    """
    try:
        return table[holds(table, query)]
    except UnknownColumn as error:
        hint = did_you_mean(error.name, map(str, table.columns), most=3) or "A text stands in quotes."
        raise UserError(f"--query {query!r}: {error}. {hint} {COLUMNS_HINT}") from None
    except ValueError as error:
        raise UserError(
            f"--query {query!r}: not a condition on the columns ({error}). For example \"dataset == 'cifar100'\"; write a "
            f"name with a slash in backticks. {COLUMNS_HINT}"
        ) from None


def as_text(table: pd.DataFrame, form: Literal["csv", "json"]) -> str:
    """The frame as CSV, or as a JSON list of objects without their empty values."""
    if form == "csv":
        return str(safe_cells(table).to_csv(index=False))
    rows = [{key: value for key, value in row.items() if not _is_empty(value)} for row in table.to_dict("records")]
    return json.dumps(rows, indent=1, ensure_ascii=False, default=lambda value: value.item()) + "\n"


def overview(runs: Sequence[Run], kept: set[str]) -> str:
    """A table for the terminal: each run with its headline metrics.

    Args:
        runs: Finished runs.
        kept: The folders of those to show, as the frame has them.
    """
    rows = []
    for run in runs:
        record = run.record
        if printable(str(run.path)) in kept:
            main = [(name, record.metrics[name]) for name in record.headlines if name in record.metrics]
            metrics = ", ".join(f"{name} {value:.2f}" for name, value in main)
            rows.append([record.name, record.dataset, record.framework, record.method, record.seed, metrics])
    columns = ["run", "data", "framework", "method", "seed", "metrics"]
    shown = [[printable(str(cell)) for cell in row] for row in rows]
    return tabulate(shown, columns, tablefmt="simple", disable_numparse=True)


def safe_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `safe_cell` in every place, and in its headings."""
    plain: pd.DataFrame = table.apply(
        lambda column: column if pd.api.types.is_numeric_dtype(column) else column.map(safe_cell)
    )
    plain.columns = pd.Index([safe_cell(name) for name in table.columns])
    return plain


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """The frame as a Parquet file; columns of mixed types become text."""
    plain = table.copy()
    for name in plain.columns:
        values = [value for value in plain[name] if not _is_empty(value)]
        kinds = {type(value) for value in values}
        # A Parquet column has one type, and no integers beyond 64 bits.
        mixed = len(kinds - {int, float}) > (0 if kinds & {int, float} else 1)
        if mixed or any(isinstance(value, int) and abs(value) >= 2**63 for value in values):
            plain[name] = [None if _is_empty(value) else str(value) for value in plain[name]]
    write_atomic(path, lambda file: plain.to_parquet(file, index=False))
