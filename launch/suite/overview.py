"""``mixmask status`` at a glance: recipes × seeds, and under it what runs or needs somebody; 80 columns are enough."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from mixmask.engine.wording import printable
from mixmask.launch.suite.manifest import Launch
from mixmask.launch.suite.status import COLOURS, FIRST, CellStatus

SEED = re.compile(r"_seed-([0-9]+)")
SHORT = {"not started": "–", "pending": "waits", "cancelled": "cancelled", "suspended": "susp."}
DETAILED = ("running", "failed", "suspended", "stopped", "cancelled")
MOST_SEEDS = 5  # side by side; more seeds stand in further lines of their recipe


def overview(launch: Launch, found: Sequence[CellStatus], rows: int | None = None, remark: str = "") -> RenderableType:
    """The matrix, then a line of details for every cell that runs or did not end well.

    Args:
        launch: Whose cells they are.
        found: Their states.
        rows: Most lines in all, as on a short screen: details go first, and what is left out is counted.
        remark: For the end.
    """
    counts = Counter(one.state for one in found)
    summary = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    details = sorted((one for one in found if one.state in DETAILED), key=lambda one: FIRST.index(one.state))
    said: list[RenderableType] = [Text(f"{launch.suite}: {summary}", style="bold"), *_matrix(found)]
    room = len(details) if rows is None else max((rows - 4) // 2, 1)
    for one in details[:room]:
        said.append(_line(f"{one.cell}  {one.state}{_requeues(one)}", COLOURS.get(one.state, "")))
        log = (one.log or "").removeprefix(f"{launch.folder}/")
        said.append(Text("    " + " · ".join(filter(None, (printable(one.detail), one.job, log))), overflow="fold"))
    if len(details) > room:
        said.append(Text(f"… and {len(details) - room} more cells that run or did not end well"))
    report = launch.folder.parents[1] / "report" / "index.html"
    said += [
        Text(text) for text in (remark, f"logs in {launch.folder}/", f"report in {report}" * report.is_file()) if text
    ]
    return Group(*said)


def _line(text: str, style: str) -> Text:
    """A line that is never broken: what stands in it is copied and pasted."""
    return Text(printable(text), style=style, no_wrap=True, overflow="ignore")


def _requeues(one: CellStatus) -> str:
    return f", requeued ×{one.requeues}" if one.requeues else ""


def _matrix(found: Sequence[CellStatus]) -> list[Text]:
    lines: dict[str, list[tuple[str, CellStatus]]] = {}
    for one in found:
        lines.setdefault(SEED.sub("", one.cell), []).append(("/".join(SEED.findall(one.cell)), one))
    said = []
    for recipe, cells in lines.items():
        said.append(_line(recipe, ""))
        said += [_entries(cells[start : start + MOST_SEEDS]) for start in range(0, len(cells), MOST_SEEDS)]
    return said


def _entries(part: Sequence[tuple[str, CellStatus]]) -> Text:
    line = Text("    ")
    for seed, one in part:
        line.append_text(_entry(seed, one))
    return line


def _entry(seed: str, one: CellStatus) -> Text:
    """``1: 68.3`` in a fixed width: the number of a finished cell, the share of a running one, or its state."""
    word: str = SHORT.get(one.state, one.state)
    number = re.search(r"-?[0-9]+(\.[0-9]+)?$", one.detail)
    if one.state == "done" and number is not None:
        word = number[0]
    elif one.state == "running" and " %" in one.detail:
        word = one.detail.split(" %")[0] + " %"
    label = f"{seed}: " if seed else ""
    return Text(f"{label}{word}".ljust(14), style=COLOURS.get(one.state, ""))
