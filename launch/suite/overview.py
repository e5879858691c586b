"""``mixmask status`` in 80 columns: recipes × seeds, then the cells that are running or need attention."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from mixmask.engine.wording import printable
from mixmask.launch.suite.manifest import Launch
from mixmask.launch.suite.status import COLOURS, FIRST, CellStatus

SHORT = {"not started": "–", "pending": "waits", "cancelled": "cancelled", "suspended": "susp."}
DETAILED = ("running", "failed", "suspended", "stopped", "cancelled")
MOST_SEEDS = 5  # per line; a recipe with more seeds takes several lines


def overview(launch: Launch, found: Sequence[CellStatus], rows: int | None = None, remark: str = "") -> RenderableType:
    """The matrix, then the details of every cell that runs or did not end well.

    Args:
        launch: The launch that the cells belong to.
        found: The states of its cells.
        rows: Largest number of lines, for a short screen: details are cut first, and omitted cells are counted.
        remark: Text for the end.
    """
    details = [one for one in found if one.state in DETAILED]
    matrix = _matrix(found)
    # The details of a cell take up to three lines.
    room = len(details) if rows is None else max((rows - len(matrix) - 4) // 3, 1)
    hint = (
        ("a cell's log: mixmask logs CELL", f"every cell: mixmask status {launch.suite} --cells")
        if rows is None
        else ()
    )
    return Group(
        _summary(launch, found),
        *matrix,
        *_details(details, room, "cells that run or did not end well"),
        *_last_lines(launch, *hint, remark),
    )


def cells(launch: Launch, found: Sequence[CellStatus], rows: int | None = None, remark: str = "") -> RenderableType:
    """Every cell with its progress or result, its job and its log; arguments as `overview` takes them."""
    room = len(found) if rows is None else max((rows - 4) // 3, 1)
    return Group(_summary(launch, found), *_details(found, room, "cells"), *_last_lines(launch, remark))


def _summary(launch: Launch, found: Sequence[CellStatus]) -> Text:
    counts = Counter(one.state for one in found)
    summary = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return Text(f"{launch.suite}: {summary}", style="bold")


def _last_lines(launch: Launch, *remarks: str) -> list[Text]:
    report = launch.folder.parents[1] / "report" / "index.html"
    said = [Text(remark) for remark in remarks if remark]
    return [*said, _line(f"report in {_near(report)}", "")] if report.is_file() else said


def _details(found: Sequence[CellStatus], room: int, what: str) -> list[Text]:
    said = []
    shown = sorted(found, key=lambda one: FIRST.index(one.state))[:room] if len(found) > room else found
    for one in shown:
        said.append(_line(f"{one.cell}  {one.state}{_requeues(one)}", COLOURS.get(one.state, "")))
        about = " · ".join(filter(None, (printable(one.detail), one.job and f"job {one.job}")))
        said += [Text(f"    {about}")] if about else []
        said += [_line(f"    {_near(Path(one.log))}", "dim")] if one.log else []
    return [*said, Text(f"… and {len(found) - room} more {what}")] if len(found) > room else said


def _near(path: Path) -> str:
    """A path relative to the current folder if it lies inside, else as it is."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _line(text: str, style: str) -> Text:
    """A line that is never wrapped, so that it can be copied and pasted."""
    return Text(printable(text), style=style, no_wrap=True, overflow="ignore")


def _requeues(one: CellStatus) -> str:
    return f", requeued ×{one.requeues}" if one.requeues else ""


def _matrix(found: Sequence[CellStatus]) -> list[Text]:
    """For each recipe a heading with the name of its metric, then its seeds."""
    lines: dict[str, list[CellStatus]] = {}
    twice = {of for of, count in Counter((one.recipe, one.seeds) for one in found).items() if count > 1}
    for one in found:
        # Two entries of a suite may be called alike; only their ids tell them apart.
        heading = one.cell if (one.recipe, one.seeds) in twice else one.recipe
        lines.setdefault(heading, []).append(one)
    said = []
    for recipe, group in lines.items():
        metric = next((one.detail.rpartition(" ")[0] for one in group if _number(one)), "")
        said.append(_line(f"{recipe}  {metric}".rstrip(), ""))
        for start in range(0, len(group), MOST_SEEDS):
            said.append(Text("    ").append_text(Text("").join(map(_entry, group[start : start + MOST_SEEDS]))))
    return said


def _number(one: CellStatus) -> str:
    """The number of a finished cell; conversions have none."""
    word = one.detail.rpartition(" ")[2]
    return word if one.state == "done" and word.removeprefix("-").replace(".", "", 1).isdigit() else ""


def _entry(one: CellStatus) -> Text:
    """``1: 68.3`` in a fixed width: the number of a finished cell, the share of a running one, or its state."""
    word = _number(one) or SHORT.get(one.state, one.state)
    if one.state == "running" and " %" in one.detail:
        word = one.detail.split(" %")[0] + " %"
    label = f"{one.seeds}: " if one.seeds else ""
    return Text(f"{label}{word}".ljust(14), style=COLOURS.get(one.state, ""))
