"""What a suite ends with: its tables, and which cells are missing from them."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from engine.records import Record
from engine.storage import write_text
from evaluate.collect import Run
from evaluate.paper import choose
from evaluate.render import render_all
from evaluate.results import results_of
from evaluate.tables import build
from launch.jobs import Attempts
from launch.ledger import Launch, LaunchedCell, latest, suite_folder
from launch.status import headline


def write_results(runs: Path, suite: str) -> str:
    """Write ``tables.md``, ``tables.csv`` and ``report.md`` of a suite's cells, as its newest launch lists them.

    Returns:
        The report: the table, every finished cell's result, and why each of the others is not.
    """
    launch = latest(runs, suite)
    folder = suite_folder(runs, suite)
    runs_of_it = [_run(cell) for cell in launch.cells if cell.stage != "convert" and cell.is_finished]
    found = results_of(run for run in runs_of_it if run is not None)
    tables = [table for table in (build(layout, found) for layout in choose(None, ())) if table.num_runs]
    missing = [f"- {cell.id}: {_why(cell, launch)}" for cell in launch.cells if not cell.is_finished]
    done = len(launch.cells) - len(missing)
    text = f"# {launch.suite}\n\n{done} of {len(launch.cells)} cells are finished.\n\n{render_all(tables, 'md')}"
    results = [
        [cell.name, cell.dataset, cell.protocol, cell.seed, headline(cell)]
        for cell in launch.cells
        if cell.stage == "transfer" and cell.is_finished
    ]
    if results:
        columns = ["cell", "data", "protocol", "seed", "result"]
        text += f"\nEvery cell:\n\n{tabulate(results, columns, tablefmt='pipe')}\n"
    if missing:
        text += "\nNot finished:\n\n" + "\n".join(missing) + "\n"
    write_text(folder / "tables.md", render_all(tables, "md"))
    write_text(folder / "tables.csv", render_all(tables, "csv"))
    write_text(folder / "report.md", text)
    return f"{text}\n{folder / 'report.md'}"


def _run(cell: LaunchedCell) -> Run | None:
    """A finished cell's run; None if its record is damaged, which `headline` says."""
    try:
        return Run(cell.run, Record.read(cell.run / "record.json"))
    except (OSError, ValueError):
        return None


def _why(cell: LaunchedCell, launch: Launch) -> str:
    """What is known of a cell without a result, from its folder alone."""
    lines = Attempts(cell.run / "attempts.jsonl").read()
    if not lines:
        parent = next((other for other in launch.cells if other.id == cell.parent), None)
        if parent is not None and not parent.is_finished:
            return f"its backbone {parent.id} is not finished"
        return "never started"
    last = lines[-1]
    if last["event"] == "failed":
        return str(last.get("message") or "failed").splitlines()[0]
    if last["event"] == "started":
        return f"job {last['job']} ended without a word, as if killed"
    return f"{last['event']} (job {last['job']})"
