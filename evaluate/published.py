"""Published tables: what is in them and how it was measured, as ``evaluate/tables/*.yaml`` says. One file is one table.

A file that is put there is found; so are the files in a package that is named as an entry point of the group
``mixmask.tables``. `PublishedTable` says what may stand in it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from mixmask.engine.config import Recipe, recipe_of_text
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.registry import load_entry_points
from mixmask.engine.texts import read_text
from mixmask.evaluate.names import OLD_KEYS, key_of

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

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
THEIRS = {"mask_rcnn_c4": "detect_coco", "faster_rcnn_c4": "detect_voc"}  # what earlier files call our protocols
MADE_OF = {"source", "dataset", "framework", "method", "protocol", "pretrain_epochs", "metric"}


@dataclass(frozen=True)
class Published:
    """One published number.

    ``protocol`` and ``metric`` have the names of this project's records, ``title`` is what tables call the protocol;
    ``setting`` is what was varied, such as ``("mix.grid", "4")``; ``pretrain_epochs`` is None where the source does not say;
    ``where`` is for a footnote; ``added`` says that it comes from no table of the project's or of a package.
    """

    source: str
    table: str
    dataset: str
    framework: str
    method: str
    protocol: str
    title: str
    pretrain_epochs: float | None
    setting: tuple[str, str] | None
    metric: str
    value: float
    where: str
    added: bool = False


class ProtocolWords(Recipe):
    """What a protocol and its metrics are called in a table whose numbers nobody has run yet."""

    title: str
    metrics: dict[str, str]


class PublishedTable(Recipe):
    """A published table.

    Attributes:
        title: What it shows.
        order: Its place among the tables.
        where: Which results belong to it: keys of results or recipes, and a value or several; ``*`` stands for any ending.
        without: What of these does not, when all of its keys fit.
        pretrained_on: ``dataset``: only backbones that were pretrained on the data set that they are tested on.
        ablations: Whether results belong whose mixture departs from the recipe of their row.
        rows: What each level of a row is called, and the key that it shows.
        varied: Instead of ``rows``: keys that are varied one at a time. A section of rows for each.
        columns: The key that each level of a column shows, or a text with keys in braces.
        says: Keys of which rows and columns say enough, besides those that they show.
        any_dataset: Whether results belong on data sets of which no number is published.
        summary: Whether the mean over the columns and the mean rank stand beside each row.
        states: Keys of recipes and the values that the publication states. A number stands beside runs made so.
        suite: The suite whose recipes are those of the publication, too (`make reference`).
        protocols: The protocols of its numbers; ``semisup_*`` stands for all of its kind, and ``{}`` for the ending.
        sources: Where the numbers stand, by a short name; the first is meant where a number names none.
        notes: Remarks under the table.
        numbers: In each, one key has several values with a number each: ``method: {vanilla: 65.7, mixmask: 68.4}``.
    """

    title: str
    order: float = 100
    where: dict[str, Any] = Field(default_factory=dict)
    without: dict[str, Any] = Field(default_factory=dict)
    pretrained_on: str | None = Field(None, pattern="^dataset$")
    ablations: bool = True
    rows: dict[str, str] = Field(default_factory=dict)
    varied: tuple[str, ...] = ()
    columns: tuple[str, ...] = Field(min_length=1)
    says: tuple[str, ...] = ()
    summary: bool = False
    any_dataset: bool = False
    states: dict[str, Any] = Field(default_factory=dict)
    suite: str | None = None
    protocols: dict[str, ProtocolWords] = Field(default_factory=dict)
    sources: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    numbers: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> PublishedTable:
        if bool(self.rows) == bool(self.varied):
            raise ValueError("a table has either rows or varied")
        for number, entry in enumerate(self.numbers):
            self._check(number, entry)
        return self

    def _check(self, number: int, entry: Mapping[str, Any]) -> None:
        spread = [key for key, value in entry.items() if isinstance(value, Mapping)]
        if len(spread) != 1:
            raise ValueError(
                f"numbers.{number}: one key has several values with a number each, got {len(spread)} such keys"
            )
        missing = {"dataset", "framework", "method", "protocol", "metric"} - entry.keys()
        if missing:
            raise ValueError(f"numbers.{number}: {', '.join(sorted(missing))} is missing")
        settings = [key for key in entry if key not in MADE_OF]
        if len(settings) > 1:
            raise ValueError(f"numbers.{number}: {' and '.join(settings)}: one setting at most is varied")
        if "protocol" not in spread and self.words(entry["protocol"]) is None:
            raise ValueError(f"numbers.{number}: protocol {entry['protocol']}: is not under protocols")
        if self.sources and entry.get("source", next(iter(self.sources))) not in self.sources:
            raise ValueError(f"numbers.{number}: source {entry['source']}: is not under sources")
        for value in entry[spread[0]].values():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"numbers.{number}: {spread[0]}: a number was expected (given: {value!r})")

    def words(self, protocol: str) -> ProtocolWords | None:
        """What a protocol is called in it."""
        for name, words in self.protocols.items():
            if fnmatchcase(protocol, name):
                ending = protocol[len(name.rstrip("*")) :]
                return ProtocolWords(title=words.title.format(ending), metrics=words.metrics)
        return None

    def published(self, id: str) -> Iterator[Published]:
        """Its numbers, in their order."""
        for entry in self.numbers:
            spread = next(key for key, value in entry.items() if isinstance(value, Mapping))
            for key, value in entry[spread].items():
                one = {**entry, spread: key}
                source = one.get("source", next(iter(self.sources), ""))
                setting = next(((key, _text(one[key])) for key in one if key not in MADE_OF), None)
                epochs, words = one.get("pretrain_epochs"), self.words(one["protocol"])
                assert words is not None  # `_check`
                yield Published(
                    source, id, one["dataset"], one["framework"], one["method"], one["protocol"],
                    words.title, None if epochs is None else float(epochs), setting,
                    one["metric"], float(value), _where(self.sources.get(source, source), id),
                )  # fmt: skip


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _where(source: str, table: str) -> str:
    return f"{source}, table {table}" if table.isdigit() else source


@cache
def published_tables() -> dict[str, PublishedTable]:
    """Every published table by its name, the project's and those of other packages, in their order.

    Raises:
        ConfigError: If a file is not as `PublishedTable` says, a name is there twice, or an entry point cannot be loaded.
    """
    found: dict[str, PublishedTable] = {}
    places: list[Traversable] = [
        resources.files("mixmask.evaluate").joinpath("tables"),
        *(resources.files(module) for module in load_entry_points("mixmask.tables")),
    ]
    for place in places:
        for file in sorted(place.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".yaml"):
                name = file.name.removesuffix(".yaml")
                if name in found:
                    raise ConfigError(f"{file}: there is a table of the name '{name}' already")
                found[name] = recipe_of_text(PublishedTable, file.read_text(encoding="utf-8"), str(file))
    return dict(sorted(found.items(), key=lambda item: item[1].order))


@cache
def published_numbers() -> tuple[Published, ...]:
    """The numbers of every published table."""
    return tuple(number for id, table in published_tables().items() for number in table.published(id))


# --- more numbers, from CSV ------------------------------------------------------------------------------------------


def read_published(path: Path) -> tuple[Published, ...]:
    """More numbers for tables that there are, from a CSV file with the columns `COLUMNS`.

    Raises:
        DataError: With the file, the line and what is wrong in it.
    """
    lines, name = read_text(path).splitlines(), str(path)
    try:
        return tuple(_rows(csv.DictReader(lines, strict=True), name))
    except csv.Error as error:
        raise DataError(f"{name}: not a readable CSV file ({error})") from None


def _rows(reader: csv.DictReader[str], name: str) -> Iterator[Published]:
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{name}: no column {', '.join(missing)}; a file of published numbers has {', '.join(COLUMNS)}")
    for entry in reader:
        where = f"{name}, line {reader.line_num}"
        if None in entry or None in entry.values():
            raise DataError(f"{where}: {len(COLUMNS)} fields were expected")
        needed = ("source", "table", "dataset", "framework", "method", "protocol", "metric")
        empty = [column for column in needed if not entry[column]]
        if empty:
            raise DataError(f"{where}: {', '.join(empty)} is empty")
        yield _number_of(entry, where)


def _number_of(entry: Mapping[str, str], where: str) -> Published:
    tables = published_tables()
    if entry["table"] not in tables:
        raise DataError(f"{where}: there is no table {entry['table']!r}; valid: {', '.join(tables)}")
    protocol = THEIRS.get(entry["protocol"], key_of(entry["protocol"]))
    words = tables[entry["table"]].words(protocol)
    if words is None:
        valid = ", ".join(tables[entry["table"]].protocols)
        raise DataError(f"{where}: protocol is {entry['protocol']!r}; valid for table {entry['table']}: {valid}")
    metric = entry["metric"] if "/" in entry["metric"] else f"{protocol.split('_')[0]}/{entry['metric']}"
    if metric not in words.metrics:
        valid = ", ".join(words.metrics)
        raise DataError(f"{where}: metric is {entry['metric']!r}; valid for {protocol}: {valid}")
    setting = None
    if entry["setting"]:
        key, _, value = entry["setting"].partition("=")
        setting = (OLD_KEYS.get(key, key), value)
    epochs = _number(entry["pretrain_epochs"], "pretrain_epochs", where) if entry["pretrain_epochs"] else None
    return Published(
        entry["source"],
        entry["table"],
        key_of(entry["dataset"]),
        key_of(entry["framework"]),
        key_of(entry["method"]),
        protocol,
        words.title,
        epochs,
        setting,
        metric,
        _number(entry["value"], "value", where),
        _where(entry["source"], entry["table"]),
        added=True,
    )


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {column} is {text!r}, a number was expected")
    return value


def of_table(numbers: Sequence[Published], id: str) -> list[Published]:
    """Those of one table, in their order."""
    return [number for number in numbers if number.table == id]
