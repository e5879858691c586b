"""Tables of results: where each result goes, which runs share a cell, and what the footnotes say."""

from __future__ import annotations

import math
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mixmask.evaluate.names import text_of
from mixmask.evaluate.published import Published
from mixmask.evaluate.reference import departures, in_words, unstated
from mixmask.evaluate.results import Result, of_backbone, telling_keys
from mixmask.evaluate.statistics import Summary, summarize, within_noise

Key = tuple[str, ...]  # of a row or a column: one text for each level
Place = tuple[Key, Key]

MISSING = "–"
NOT_RECORDED = "how the backbone was pretrained is not recorded"


@dataclass(frozen=True)
class TableCell:
    """The results of runs that differ in seeds only, beside the published number.

    Attributes:
        results: One per run, ordered by seed; empty where there is only a published number.
        published: The published number with the same recipe, if there is one.
        best: Whether its mean is the highest of the comparable ones in its column; never where one of these is a single
            run.
        near_best: Whether it is not significantly different from the best (`within_noise`).
        marks: The letters of its footnotes.
    """

    results: tuple[Result, ...]
    published: Published | None = None
    best: bool = False
    near_best: bool = False
    marks: tuple[str, ...] = ()

    @property
    def summary(self) -> Summary | None:
        """Mean, sample standard deviation and n."""
        return summarize([result.value for result in self.results]) if self.results else None

    @property
    def few(self) -> str:
        """A remark if there are fewer runs than the protocol asks for (five on VOC); else empty."""
        record = self.results[0].run.record if self.results else None
        if record is None or len(self.results) >= record.num_seeds:
            return ""
        return f"fewer than {record.num_seeds} runs: {record.variation}"

    @property
    def difference(self) -> float | None:
        """Mean minus published, in points."""
        summary = self.summary
        return None if summary is None or self.published is None else summary.mean - self.published.value


@dataclass(frozen=True)
class Line:
    """A line of a table. ``marks`` are the letters of its footnotes, on the backbone.

    None is an empty cell. A result that is missing is a `TableCell` without results, on the first line of its row.
    """

    row: Key
    marks: tuple[str, ...]
    cells: tuple[TableCell | None, ...]


@dataclass(frozen=True)
class Table:
    """A finished table, in no format yet.

    Attributes:
        id: Short name, such as ``5``.
        title: What it shows.
        row_names: What each level of a row is.
        columns: One key per column.
        lines: From top to bottom.
        footnotes: Letter and text.
        notes: Remarks on the table as a whole.
    """

    id: str
    title: str
    row_names: Key
    columns: tuple[Key, ...]
    lines: tuple[Line, ...]
    footnotes: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def num_runs(self) -> int:
        """The number of runs that the table shows."""
        runs = {result.run for line in self.lines for cell in line.cells if cell for result in cell.results}
        return len(runs)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of its published numbers."""
        cells = [cell for line in self.lines for cell in line.cells if cell is not None]
        return tuple(dict.fromkeys(cell.published.where for cell in cells if cell.published is not None))


@dataclass(frozen=True)
class TableLayout:
    """What a table shows and where.

    Attributes:
        id, title, row_names: As in `Table`.
        places: The places of a result: several for an ablation's default, none if it does not belong here.
        published: Published numbers and their places, in the order of rows and columns.
        stated: The recipe of the published number at a result's place; if it is empty, there are no departures.
        said: Keys that a place itself already shows.
        sections: Whether the first level of a row is a section, with a best result of its own.
        order: Positions of texts that are not sorted alphabetically or by number.
        notes: As in `Table`.
        finish: What is done with the finished table, such as adding means.
    """

    id: str
    title: str
    row_names: Key
    places: Callable[[Result], Iterable[Place]]
    published: Sequence[tuple[Place, Published]] = ()
    stated: Callable[[Result, Place], Mapping[str, Any]] = lambda result, place: {}
    said: Callable[[Place], Sequence[str]] = lambda place: ()
    sections: bool = False
    order: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    finish: Callable[[Table], Table] = lambda table: table


@dataclass(frozen=True)
class _Texts:
    """Footnote texts: on the backbone (beside the line), and on the measurement and all else (beside the cell)."""

    backbone: tuple[str, ...] = ()
    measurement: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Group:
    """The results of one pool at one place, their departures from the stated recipe, and further remarks."""

    place: Place
    results: tuple[Result, ...]
    departures: _Texts
    remarks: tuple[str, ...]

    @property
    def first(self) -> Result:
        return self.results[0]


def build(layout: TableLayout, results: Sequence[Result]) -> Table:
    """Fill a layout with results.

    Results share a cell only if they differ in nothing but seeds. Others at the same place get lines of their own, and
    footnotes say how they differ from the published protocol or from each other: on the backbone beside the line, on
    the measurement beside the cell. A published number is shown beside every result that has no departure from the
    publication's recipe.
    """
    groups = _groups(layout, results)
    published = dict(layout.published)
    rows = _ordered(layout, (place[0] for place in published), (group.place[0] for group in groups), layout.sections)
    columns = _ordered(layout, (place[1] for place in published), (group.place[1] for group in groups))
    best = _marked(groups, layout.sections)
    texts = _texts(groups)
    common = Counter((group.place[1], group.first.measurement) for group in groups)
    faithful = {group.place for group in groups if group.departures == _Texts()}
    lines: list[_Line] = []
    for row in rows:
        stacks: dict[tuple[str, ...], dict[Key, list[_Noted]]] = defaultdict(lambda: defaultdict(list))
        for place, number in published.items():
            if place[0] == row and place not in faithful:
                stacks[()][place[1]].append(_noted(TableCell((), number), ()))
        own = [group for group in groups if group.place[0] == row]
        for group in sorted(
            own,
            key=lambda group: (
                group.departures != _Texts(),
                -common[group.place[1], group.first.measurement],
                texts[group].measurement,
            ),
        ):
            beside = published.get(group.place) if group.departures == _Texts() else None
            cell = TableCell(group.results, beside, *best[group])
            stacks[texts[group].backbone][group.place[1]].append(_noted(cell, texts[group].measurement))
        lines += _unstacked(row, stacks, columns)
    return layout.finish(_lettered(layout, columns, lines))


_Noted = tuple[TableCell, tuple[str, ...]]  # a cell and the texts of its footnotes
_Line = tuple[Key, tuple[str, ...], dict[Key, _Noted]]  # row, texts on the backbone, cells by column


def _noted(cell: TableCell, texts: tuple[str, ...]) -> _Noted:
    """A cell with its footnotes, among them the source of a number that is not the paper's, and too few runs."""
    number = cell.published
    source = (f"published by {number.source}",) if number is not None and number.added else ()
    return cell, (*texts, *source, *((cell.few,) if cell.few else ()))


def _unstacked(
    row: Key, stacks: Mapping[tuple[str, ...], Mapping[Key, Sequence[_Noted]]], columns: Sequence[Key]
) -> list[_Line]:
    """The lines of a row: one for each backbone's texts, and more where several cells stand in one column."""
    lines: list[_Line] = []
    for backbone in sorted(stacks):
        for level in range(max(map(len, stacks[backbone].values()))):
            on_it = {column: stack[level] for column, stack in stacks[backbone].items() if level < len(stack)}
            lines.append((row, backbone, on_it))
    filled = {column for _, _, cells in lines for column in cells}
    missing: dict[Key, _Noted] = {column: (TableCell(()), ()) for column in columns if column not in filled}
    return [(row, lines[0][1], {**lines[0][2], **missing}), *lines[1:]]


def _lettered(layout: TableLayout, columns: Sequence[Key], lines: Sequence[_Line]) -> Table:
    """The finished table, with a letter for every footnote in reading order."""
    letters: dict[str, str] = {}
    for _, backbone, cells in lines:
        met = [*backbone, *(text for column in columns if column in cells for text in cells[column][1])]
        for text in met:
            letters.setdefault(text, _letter(len(letters)))

    def finished(found: _Noted | None) -> TableCell | None:
        return None if found is None else replace(found[0], marks=tuple(sorted(letters[text] for text in found[1])))

    return Table(
        id=layout.id,
        title=layout.title,
        row_names=layout.row_names,
        columns=tuple(columns),
        lines=tuple(
            Line(
                row, tuple(letters[text] for text in backbone), tuple(finished(cells.get(column)) for column in columns)
            )
            for row, backbone, cells in lines
        ),
        footnotes=tuple((letter, text) for text, letter in letters.items()),
        notes=layout.notes,
    )


def _groups(layout: TableLayout, results: Sequence[Result]) -> list[_Group]:
    pooled: dict[tuple[Place, tuple[str, ...]], list[Result]] = defaultdict(list)
    for result in results:
        for place in layout.places(result):
            pooled[place, result.pool].append(result)
    groups = []
    for (place, _), found in sorted(pooled.items(), key=lambda item: item[0]):
        by_seed = sorted(found, key=lambda r: (*(-1 if s is None else s for s in r.seeds), r.run.record.fingerprint))
        stated, said = layout.stated(by_seed[0], place), layout.said(place)
        departing = _by_side(departures(by_seed[0], stated, said))
        groups.append(_Group(place, tuple(by_seed), departing, _remarks(by_seed, stated, said)))
    return groups


def _remarks(results: Sequence[Result], stated: Mapping[str, Any], said: Sequence[str]) -> tuple[str, ...]:
    """Remarks that are no departures: what is not stated, not recorded, or unusual about the runs."""
    known, record = results[0].known, results[0].run.record
    foreign = not record.pretraining and record.method != "random"
    silent = [
        f"{key} {text_of(known[key])}"
        for key in (unstated(results[0].dims) if stated else ())
        if known.get(key) is not None and key not in said
    ]
    engine = known.get("engine")
    backbones = {result.run.record.parent or result.run.record.fingerprint for result in results}
    texts = [
        NOT_RECORDED if foreign else "",
        "the transfer recipe is not recorded" if stated and not record.recipe else "",
        f"{', '.join(silent)} (the publication does not say)" if silent else "",
        f"engine {engine} (published: Detectron2; the two are proven equal)"
        if stated and engine == "torchvision"
        else "",
    ]
    if 1 < len(backbones) < len(results):
        texts.append(f"{len(results)} runs on {len(backbones)} backbones, which are not independent")
    if len({result.seeds for result in results}) < len(results):
        texts.append("several runs have the same seed")
    return tuple(filter(None, texts))


def _by_side(texts: Mapping[str, str]) -> _Texts:
    """Join the texts by key: one text for the backbone's keys, one for the measurement's."""
    sides = [in_words([text for key, text in texts.items() if of_backbone(key) == side]) for side in (True, False)]
    return _Texts(*((side,) if side else () for side in sides))


def _texts(groups: Sequence[_Group]) -> dict[_Group, _Texts]:
    """The footnotes of each group: departures, and the keys that distinguish it from groups that look the same."""
    backbone = _telling(groups, of_backbones=True)
    measurement = _telling(groups, of_backbones=False)
    texts = {
        group: _Texts(
            (*group.departures.backbone, *backbone[group]),
            (*group.departures.measurement, *measurement[group], *group.remarks),
        )
        for group in groups
    }
    seen = Counter((group.place, texts[group]) for group in groups)
    for group in groups:
        if seen[group.place, texts[group]] > 1:
            own = group.first
            told = f"run {own.run.record.name}: backbone {own.pool[4][:8]}, measured as {own.protocol_key[:8]}"
            texts[group] = _Texts(texts[group].backbone, (*texts[group].measurement, told))
    return texts


def _telling(groups: Sequence[_Group], of_backbones: bool) -> dict[_Group, tuple[str, ...]]:
    """The keys that distinguish each group: of backbones in a row where some share a place, or of measurements."""
    lines: dict[Any, list[_Group]] = defaultdict(list)
    for group in groups:
        row, column = group.place
        departing = group.departures.backbone if of_backbones else group.departures.measurement
        lines[row if of_backbones else column, departing].append(group)
    result: dict[_Group, tuple[str, ...]] = {}
    for own in lines.values():
        alike: dict[Any, list[Result]] = defaultdict(list)
        for group in own:
            alike[group.place if of_backbones else None].append(group.first)
        keys = [key for found in alike.values() for key in telling_keys(found) if of_backbone(key) == of_backbones]
        for group in own:
            known = group.first.known
            told = [f"{key} {text_of(known[key])}" for key in dict.fromkeys(keys) if known.get(key) is not None]
            result[group] = ("; ".join(told),) if told else ()
    return result


def _marked(groups: Sequence[_Group], sections: bool) -> dict[_Group, tuple[bool, bool]]:
    """Whether each group is (the best, not significantly different from it), among comparable ones in its column."""
    marks: dict[_Group, tuple[bool, bool]] = dict.fromkeys(groups, (False, False))
    rivals: dict[Any, list[_Group]] = defaultdict(list)
    for group in groups:
        section = group.place[0][0] if sections else ""
        rivals[group.place[1], section, group.results[0].peers].append(group)
    for own in rivals.values():
        summaries = {group: summarize([result.value for result in group.results]) for group in own}
        # A single run says nothing about the spread, so where one is among the rivals there is no winner.
        if len(own) > 1 and min(summary.n for summary in summaries.values()) > 1:
            top = max(summary.mean for summary in summaries.values())
            first = next(group for group in own if summaries[group].mean == top)
            for group, summary in summaries.items():
                is_best = summary.mean == top
                marks[group] = (is_best, not is_best and within_noise(summary, summaries[first]))
    return marks


def _ordered(layout: TableLayout, first: Iterable[Key], rest: Iterable[Key], sections: bool = False) -> list[Key]:
    """Keys without repetition: the published ones as published, then others in natural order, sections together."""
    known = list(dict.fromkeys(first))
    more = sorted({key for key in rest if key not in known}, key=lambda key: _natural(key, layout))
    for key in more:
        same = [number for number, other in enumerate(known) if sections and other[0] == key[0]]
        known.insert(same[-1] + 1 if same else len(known), key)
    return known


def _natural(key: Key, layout: TableLayout) -> tuple[Any, ...]:
    """A sort key: numbers by value, other texts alphabetically, unless the layout gives them an order."""

    def part(text: str) -> tuple[int, float, str]:
        if text in layout.order:
            return (1, layout.order[text], "")
        try:
            number = float(text.split(" ")[0].replace(",", ""))
        except ValueError:
            number = math.nan
        return (0, number, text) if math.isfinite(number) else (2, 0.0, text)

    return tuple(part(text) for text in key)


def _letter(number: int) -> str:
    """The footnote letter of a number from 0 on: a … z, aa, ab …"""
    letters = string.ascii_lowercase
    return letters[number] if number < 26 else _letter(number // 26 - 1) + letters[number % 26]
