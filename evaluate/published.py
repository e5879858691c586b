"""Published numbers, with where they stand."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from mixmask.engine.errors import DataError
from mixmask.engine.records import said_before_schema_3
from mixmask.engine.texts import read_text
from mixmask.evaluate.names import key_of

COLUMNS = (
    "source",
    "table",
    "dataset",
    "framework",
    "method",
    "protocol",
    "pretrain_epochs",
    "setting",
    "metric",
    "value",
)
SOURCES = {
    "paper": "MixMask: Revisiting Masking Strategy for Siamese ConvNets, arXiv:2210.11456",
    "code": "README of the authors' code, github.com/kirill-vish/MixMask",
}
PROTOCOLS = {"mask_rcnn_c4": "detect_coco", "faster_rcnn_c4": "detect_voc"}  # theirs: ours


@dataclass(frozen=True)
class Published:
    """One published number.

    ``protocol`` and ``metric`` have the names of this project's records; ``setting`` is what was varied, such as
    ``("grid_size", "4")``; ``pretrain_epochs`` is None where the source does not say.
    """

    source: str
    table: str
    dataset: str
    framework: str
    method: str
    protocol: str
    pretrain_epochs: float | None
    setting: tuple[str, str] | None
    metric: str
    value: float

    @property
    def where(self) -> str:
        """For a footnote."""
        return f"{SOURCES.get(self.source, self.source)}, {'table ' * self.table.isdigit()}{self.table}"


@cache
def of_the_paper() -> tuple[Published, ...]:
    """The numbers that come with the project."""
    text = resources.files("mixmask.evaluate").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_parse(text.splitlines(), "published.csv"))


def read_published(path: Path) -> tuple[Published, ...]:
    """More numbers, from a CSV file with the columns `COLUMNS`.

    Raises:
        DataError: With the file, the line and what is wrong in it.
    """
    return tuple(_parse(read_text(path).splitlines(), str(path)))


def _parse(lines: Sequence[str], name: str) -> list[Published]:
    try:
        return _rows(csv.DictReader(lines, strict=True), name)
    except csv.Error as error:
        raise DataError(f"{name}: not a readable CSV file ({error})") from None


def _rows(reader: csv.DictReader[str], name: str) -> list[Published]:
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{name}: no column {', '.join(missing)}; a file of published numbers has {', '.join(COLUMNS)}")
    found = []
    for entry in reader:
        where = f"{name}, line {reader.line_num}"
        if None in entry or None in entry.values():
            raise DataError(f"{where}: {len(COLUMNS)} fields were expected")
        empty = [
            column for column in ("source", "dataset", "framework", "method", "protocol", "metric") if not entry[column]
        ]
        if empty:
            raise DataError(f"{where}: {', '.join(empty)} is empty")
        protocol = PROTOCOLS.get(entry["protocol"], key_of(entry["protocol"]))
        metric = entry["metric"] if "/" in entry["metric"] else f"{protocol.split('_')[0]}/{entry['metric']}"
        valid = said_before_schema_3(protocol)["headlines"] if protocol != "pretrain" else {}
        if not valid:
            known = "knn, linear, semisup_1 …, detect_voc, detect_coco"
            raise DataError(f"{where}: protocol is {entry['protocol']!r}; valid: {known}")
        if metric not in valid:
            raise DataError(f"{where}: metric is {entry['metric']!r}; valid for {protocol}: {', '.join(valid)}")
        setting = None
        if entry["setting"]:
            key, _, value = entry["setting"].partition("=")
            setting = (key, value)
        epochs = _number(entry["pretrain_epochs"], "pretrain_epochs", where) if entry["pretrain_epochs"] else None
        value = _number(entry["value"], "value", where)
        found.append(
            Published(
                entry["source"],
                entry["table"],
                key_of(entry["dataset"]),
                key_of(entry["framework"]),
                key_of(entry["method"]),
                protocol,
                epochs,
                setting,
                metric,
                value,
            )
        )
    return found


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {column} is {text!r}, a number was expected")
    return value
