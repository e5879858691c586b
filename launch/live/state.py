"""What goes on in a folder of runs right now: runs that train or stand still, and suites."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mixmask.engine.errors import Told
from mixmask.engine.ownership import describe_owner, read_owner, seems_alive
from mixmask.engine.storage import RunDirectory
from mixmask.engine.wording import printable
from mixmask.evaluate.collect import Collection
from mixmask.evaluate.curves import DIAGNOSTICS
from mixmask.evaluate.logs import number_of, read_log
from mixmask.launch.suite.manifest import Launch, launches
from mixmask.launch.suite.status import duration, progress, status

MOST_POINTS = 200  # of a curve
MOST_SHOWN = 60  # runs that are not finished, the newest first
QUEUE_SECONDS = 30.0  # SLURM is not asked more often than that


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without a record.

    Attributes:
        name: Its folder's name.
        stage: pretrain or transfer.
        state: ``running``; ``stale`` if its owner gives no sign of life; ``stopped`` if nobody owns it.
        detail: Progress, or why it is not running, in words.
        share: How much of it is done, from 0 to 1; None if it has not logged a step.
        seconds: Since its log was last written; None without a log.
        curves: Step and value of every logged loss and accuracy.
    """

    name: str
    stage: str
    state: Literal["running", "stale", "stopped"]
    detail: str
    share: float | None
    seconds: float | None
    curves: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class SuiteState:
    """A launched suite: how many of its cells are in which state, or why that is not known."""

    name: str
    counts: dict[str, int]
    problem: str


class LiveState:
    """Looks at a folder of runs, again and again.

    Args:
        runs: The folder.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._suites: tuple[float, list[SuiteState]] = (-QUEUE_SECONDS, [])

    def version(self, collection: Collection) -> str:
        """A digest that changes when a run finishes, disappears, or gets another record."""
        marks = []
        for run in collection.runs:
            try:
                found = RunDirectory(run.path).record_file.stat()
            except OSError:
                continue
            marks.append((str(run.path), found.st_mtime_ns, found.st_size))
        damaged = [str(path) for path, _ in collection.damaged]
        return hashlib.sha256(json.dumps([marks, damaged]).encode()).hexdigest()[:16]

    def look(self, collection: Collection) -> dict[str, Any]:
        """The state, ready for JSON."""
        newest = sorted(collection.unfinished, key=_last_sign, reverse=True)
        return {
            "version": self.version(collection),
            "runs": [asdict(unfinished_run(place)) for place in newest[:MOST_SHOWN]],
            "more": max(len(newest) - MOST_SHOWN, 0),
            "suites": [asdict(suite) for suite in self.suites()],
        }

    def suites(self) -> list[SuiteState]:
        """The newest launch of every suite; what SLURM says is kept for half a minute."""
        asked, found = self._suites
        if time.monotonic() - asked >= QUEUE_SECONDS:
            try:
                newest = {launch.suite: launch for launch in launches(self.runs)}
                found = [_suite(launch) for launch in newest.values()]
            except Told as error:  # one damaged file must not end the page
                found = [SuiteState("suites", {}, printable(str(error)))]
            self._suites = (time.monotonic(), found)
        return found


def unfinished_run(place: Path) -> UnfinishedRun:
    """What can be said of a run directory without a record."""
    directory = RunDirectory(place)
    owner = read_owner(directory.owner_file)
    log = read_log(directory.log_file)
    seconds = _age(directory.log_file)
    at = progress(place)
    state: Literal["running", "stale", "stopped"]
    if owner is None:
        state, detail = "stopped", f"{at}; nobody works on it: repeat its command to resume" if at else "not started"
    elif seems_alive(directory.owner_file):
        state, detail = "running", at or describe_owner(owner)
    else:
        since = _age(directory.owner_file)
        silent = f" for {duration(since)}" if since is not None else ""
        state, detail = "stale", f"no sign of life{silent} of {describe_owner(owner)}; repeat its command to resume"
    last = log[-1] if log else {}
    step, of = number_of(last, "step"), number_of(last, "of")
    share = min(step / of, 1.0) if step is not None and of else None
    return UnfinishedRun(
        printable(place.name), printable(place.parent.name), state, printable(detail), share, seconds, _curves(log)
    )


def _curves(log: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        step = number_of(entry, "step")
        for key in entry:
            value = number_of(entry, key)
            if key not in DIAGNOSTICS and step is not None and value is not None:
                curves.setdefault(printable(key), []).append((step, value))
    return {key: _thinned(points) for key, points in curves.items()}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` of the points, the last one among them."""
    every = -(-len(points) // MOST_POINTS)
    return (
        points[:: every or 1]
        if not points or points[:: every or 1][-1] == points[-1]
        else [*points[::every], points[-1]]
    )


def _last_sign(place: Path) -> float:
    directory = RunDirectory(place)
    times = []
    for file in (directory.log_file, directory.owner_file, directory.recipe_file):
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _age(file: Path) -> float | None:
    try:
        return max(time.time() - os.stat(file).st_mtime, 0.0)
    except OSError:
        return None


def _suite(launch: Launch) -> SuiteState:
    try:
        counts = Counter(cell.state for cell in status(launch))
    except Told as error:
        return SuiteState(printable(launch.suite), {}, printable(str(error)))
    return SuiteState(printable(launch.suite), dict(counts.most_common()), "")
