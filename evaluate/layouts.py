"""Where results stand: in the published tables, in the overview of methods × protocols, in free pivots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mixmask.engine.errors import UserError
from mixmask.evaluate.collect import ABLATED
from mixmask.evaluate.means import with_means
from mixmask.evaluate.names import OLD_KEYS, average_precision_name, epochs_name, method_order, name, setting_name
from mixmask.evaluate.published import Published, PublishedTable, of_table, published_numbers, published_tables
from mixmask.evaluate.reference import stated
from mixmask.evaluate.results import Result
from mixmask.evaluate.table import Key, Place, TableLayout

Values = Callable[[str], Any]  # what a result or a published number has under a key


def _of_result(result: Result) -> Values:
    return lambda key: result.dims[key] if key in result.dims else result.known.get(key)


def _of_number(number: Published) -> Values:
    """A published number says less of itself: what it does not say fits every condition."""
    values = {
        "protocol": number.protocol,
        "dataset": number.dataset,
        "framework": number.framework,
        "method": number.method,
        "metric": number.metric,
        "title": number.title,
        "pretrain_epochs": number.pretrain_epochs,
        **dict([number.setting] if number.setting else []),
    }
    return values.get


def _fits(values: Values, conditions: Mapping[str, Any], unknown: bool) -> bool:
    """Whether all conditions hold; ``unknown`` is what holds of what is not known."""
    for key, wanted in conditions.items():
        value = values(key)
        if value is None:
            if not unknown:
                return False
            continue
        options = wanted if isinstance(wanted, list | tuple) else [wanted]
        if not any(value == one or (isinstance(one, str) and fnmatchcase(str(value), one)) for one in options):
            return False
    return True


class _Published:
    """A published table as a layout."""

    def __init__(self, id: str, table: PublishedTable, numbers: Sequence[Published]) -> None:
        self.id, self.table = id, table
        placed = [(place, one) for one in of_table(numbers, id) for place in self._places_of(one)]
        self.placed = _in_place(placed)
        self.epochs = {place: number.pretrain_epochs for place, number in self.placed}
        self.usual_epochs = {number.dataset: number.pretrain_epochs for _, number in self.placed}

    def layout(self) -> TableLayout:
        table = self.table
        shown = [key for key in (*table.rows.values(), *table.columns) if key.startswith("mix.")]
        if any("pretrain_epochs" in key for key in (*table.rows.values(), *table.columns)):
            shown.append("pretrain.epochs")
        section = {name(key): key for key in table.varied}
        return TableLayout(
            self.id,
            table.title,
            tuple(table.rows) or ("varied", "value"),
            self.places,
            self.placed,
            self.claims,
            said=lambda place: [*table.says, *shown, *([section[place[0][0]]] if table.varied else [])],
            sections=bool(table.varied),
            order=method_order(),
            notes=table.notes,
            finish=with_means if table.summary else lambda finished: finished,
        )

    def places(self, result: Result) -> Iterable[Place]:
        """Where a result stands, if it belongs to the table: an ablation's default stands in every section."""
        dims, values = result.dims, _of_result(result)
        if not self._belongs(values, unknown=False):
            return
        if self.table.pretrained_on and dims["pretrain_dataset"] not in (None, dims["dataset"]):
            return
        if self.usual_epochs and dims["dataset"] not in self.usual_epochs and not self.table.any_dataset:
            return
        usual = stated(dims)
        unusual = {key for key in ABLATED if key in usual and dims[key] not in (None, usual[key])}
        if not self.table.ablations and unusual:
            return
        for key in self.table.varied:
            if dims[key] is not None and unusual & {*self.table.varied} <= {key}:
                yield (name(key), setting_name(key, dims[key])), self._column(values)
        if self.table.rows and all(values(key) is not None for key in self.table.rows.values() if key in ABLATED):
            yield self._row(values), self._column(values)

    def claims(self, result: Result, place: Place) -> Mapping[str, Any]:
        """What is stated of a place."""
        recipes = stated(result.dims)
        if not recipes and self.table.states:  # of what is not stated, nothing departs
            recipes = dict(result.facts)
        claims = {**recipes, **self.table.states}
        epochs = self.epochs.get(place, self.usual_epochs.get(result.dims["dataset"]))
        if epochs is not None and claims:
            claims["pretrain.epochs"] = epochs
        return claims

    def _belongs(self, values: Values, unknown: bool) -> bool:
        without = bool(self.table.without) and _fits(values, self.table.without, unknown=False)
        return _fits(values, self.table.where, unknown) and not without

    def _places_of(self, number: Published) -> Iterable[Place]:
        values = _of_number(number)
        if not self._belongs(values, unknown=True):
            return
        if not self.table.varied:
            yield self._row(values), self._column(values)
        elif number.setting is not None and number.setting[0] in self.table.varied:
            yield (name(number.setting[0]), setting_name(*number.setting)), self._column(values)

    def _row(self, values: Values) -> Key:
        return tuple(_shown(key, values) for key in self.table.rows.values())

    def _column(self, values: Values) -> Key:
        return tuple(_shown(key, values) for key in self.table.columns)


def _shown(key: str, values: Values) -> str:
    """What a row or a column says of a key, or of a text with keys in braces."""
    if "{" in key:
        return re.sub(r"\{([\w.]+)\}", lambda found: _shown(found[1], values), key)
    value = values(key)
    if key == "protocol":
        return str(values("title"))
    if key == "metric":
        return average_precision_name(str(value)) or str(value)
    if key == "pretrain_epochs":
        return epochs_name(value)
    return setting_name(key, value) if key in ABLATED else name(value)


def layouts(published: Sequence[Published] = ()) -> dict[str, TableLayout]:
    """The published tables, by their names.

    Args:
        published: Numbers besides those that they have.
    """
    numbers = (*published_numbers(), *published)
    return {id: _Published(id, table, numbers).layout() for id, table in published_tables().items()}


def _in_place(placed: Iterable[tuple[Place, Published]]) -> list[tuple[Place, Published]]:
    """Each number in a cell of its own: one for a cell that has another already gets a row with its source's name."""
    taken: set[Place] = set()
    result = []
    for place, number in placed:
        if place in taken:
            row = (*place[0][:-1], f"{place[0][-1]} ({number.source})")
            place = (row, place[1])
        taken.add(place)
        result.append((place, number))
    return result


# --- without published numbers ---------------------------------------------------------------------------------------


def methods_by_protocols() -> TableLayout:
    """Ways of pretraining × everything that was measured."""

    def row(dims: Mapping[str, Any]) -> Key:
        return (
            name(dims["pretrain_dataset"]),
            name(dims["framework"]),
            name(dims["method"]),
            dims["arch"],
            epochs_name(dims["pretrain_epochs"]),
        )

    def column(dims: Mapping[str, Any]) -> Key:
        return name(dims["dataset"]), dims["column"]

    return TableLayout(
        "methods",
        "Methods × protocols",
        ("pretrained on", "framework", "method", "arch", "epochs"),
        lambda result: [(row(result.dims), column(result.dims))],
        order=method_order(),
    )


PIVOT = (
    "dataset",
    "protocol",
    "metric",
    "framework",
    "method",
    "arch",
    "pretrain_dataset",
    "pretrain_epochs",
    *ABLATED,
)


def pivot(rows: Sequence[str], columns: Sequence[str], known: Iterable[str], what: str = "results") -> TableLayout:
    """Results by any of their dimensions.

    Args:
        rows: What a row is: dimensions (`PIVOT`), or keys of recipes such as ``lr`` and ``pretrain.batch_size``.
        columns: What a column is.
        known: Keys that some result has.
        what: The metric, for the title.

    Raises:
        UserError: If a dimension is unknown, or stands twice.
    """
    rows, columns = ([OLD_KEYS.get(key, key) for key in keys] for keys in (rows, columns))
    valid = dict.fromkeys((*PIVOT, *sorted(known)))
    wrong = [one for one in (*rows, *columns) if one not in valid]
    if wrong:
        raise UserError(f"{', '.join(map(repr, wrong))}: no such dimension. Valid: {', '.join(valid)}")
    both = [*rows, *columns]
    if not rows or not columns or len({*both}) < len(both):
        raise UserError("--rows and --cols name at least one dimension each, none of them twice")

    def text(result: Result, key: str) -> str:
        value = result.dims[key] if key in PIVOT else result.known.get(key)
        return f"{value:,.10g}" if isinstance(value, float) else name(value)

    def places(result: Result) -> Iterable[Place]:
        yield tuple(text(result, key) for key in rows), tuple(text(result, key) for key in columns)

    title = f"{what}: {', '.join(rows)} × {', '.join(columns)}"
    return TableLayout("pivot", title, tuple(rows), places, order=method_order())


def choose(table: str | None, published: Sequence[Published]) -> list[TableLayout]:
    """The layouts for a name, or all.

    Raises:
        UserError: If there is no such table.
    """
    every = {**layouts(published), "methods": methods_by_protocols()}
    if table is None:
        return [*every.values()]
    if table not in every:
        raise UserError(f"--table {table}: no such table. Valid: {', '.join(every)}")
    return [every[table]]
