"""The results of a suite: its tables, its HTML page, and a list of unfinished cells."""

from __future__ import annotations

import html
from pathlib import Path

from tabulate import tabulate

from mixmask.engine.errors import UserError
from mixmask.engine.records import finished_record
from mixmask.engine.storage import RunDirectory, write_text
from mixmask.engine.wording import printable
from mixmask.evaluate.collect import Collection, collection_of
from mixmask.evaluate.layouts import choose
from mixmask.evaluate.render import render_all
from mixmask.evaluate.report import write_report
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import build
from mixmask.launch.slurm.attempts import Attempts
from mixmask.launch.suite.manifest import Launch, LaunchedCell, latest, suite_folder
from mixmask.launch.suite.status import headline


def write_results(runs: Path, suite: str) -> str:
    """Write ``tables.md``, ``tables.csv``, ``report.md`` and ``report/index.html`` for the cells of the newest launch.

    Returns:
        The report as text: the tables, the result of each finished cell, and the reason for each unfinished one.
    """
    launch = latest(runs, suite)
    folder = suite_folder(runs, suite)
    collection = _collect(launch, folder)
    found = results_of(collection.distinct)
    tables = [table for table in (build(layout, found) for layout in choose(None, ())) if table.num_runs]
    missing = [f"- {cell.id}: {_why(cell, launch)}" for cell in launch.cells if not cell.is_finished]
    done = len(launch.cells) - len(missing)
    text = f"# {launch.suite}\n\n{done} of {len(launch.cells)} cells are finished.\n\n{render_all(tables, 'md')}"
    results = [
        [cell.name, cell.dataset, cell.protocol, *_seeds(cell), headline(cell)]
        for cell in launch.cells
        if cell.stage == "transfer" and cell.is_finished
    ]
    if results:
        columns = ["cell", "data", "protocol", "pretraining seed", "seed", "result"]
        text += f"\nEvery cell:\n\n{tabulate(results, columns, tablefmt='pipe')}\n"
    if missing:
        text += "\nNot finished:\n\n" + "\n".join(missing) + "\n"
    write_text(folder / "tables.md", render_all(tables, "md"))
    write_text(folder / "tables.csv", render_all(tables, "csv"))
    write_text(folder / "report.md", text)
    written = [folder / "report.md"]
    if collection.runs:
        written.append(write_report(collection, folder / "report"))
    return "\n".join([text, *map(str, written)])


def _seeds(cell: LaunchedCell) -> tuple[str, int]:
    """The seeds of the backbone and of the run itself."""
    try:
        record = finished_record(RunDirectory(cell.run))
    except UserError:
        return "?", cell.seed
    return ("–" if record.pretrain_seed is None else str(record.pretrain_seed)), cell.seed


def _collect(launch: Launch, folder: Path) -> Collection:
    """The runs of a launch's cells; a damaged record is listed, not fatal."""
    work = {cell.run: cell.is_finished for cell in launch.cells if cell.stage != "convert"}
    return collection_of(folder, work.items())


def _why(cell: LaunchedCell, launch: Launch) -> str:
    """Why a cell has no result, as far as its run directory tells."""
    lines = Attempts(RunDirectory(cell.run).attempts_file).read()
    if not lines:
        parent = next((other for other in launch.cells if other.id == cell.parent), None)
        if parent is not None and not parent.is_finished:
            return f"its backbone {parent.id} is not finished"
        return "never started"
    last = lines[-1]
    if last["event"] == "failed":
        return html.escape(printable(str(last.get("message") or "failed").splitlines()[0]), quote=False)
    if last["event"] == "started":
        return f"job {last['job']} ended without a word, as if killed"
    return f"{last['event']} (job {last['job']})"
