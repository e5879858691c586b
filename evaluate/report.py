"""All results on one self-contained HTML page: no network, no other files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from mixmask.engine.errors import DataError
from mixmask.engine.predictions import SHEET
from mixmask.engine.storage import RunDirectory, last_lines, require_output_folder, require_own_file, write_text
from mixmask.engine.texts import read_run_file
from mixmask.engine.wording import printable
from mixmask.evaluate.collect import Collection, Run, ablation, flat
from mixmask.evaluate.comparison import Comparison, compare
from mixmask.evaluate.drawing import Plot
from mixmask.evaluate.headline import caveats, facts, finding
from mixmask.evaluate.layouts import choose
from mixmask.evaluate.names import name, text_of
from mixmask.evaluate.plots import plots_of
from mixmask.evaluate.published import Published, published_numbers
from mixmask.evaluate.render import TableFormat, render
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import Table, TableCell, build
from mixmask.evaluate.templating import html_table
from mixmask.evaluate.verify import Check, expectations

LOG_LINES = 12
MOST_IMAGE_BYTES = 4_000_000
GENERATOR = '<meta name="generator" content="mixmask report">'
COPIES: dict[str, TableFormat] = {"Markdown": "md", "LaTeX": "latex", "CSV": "csv"}
FILTERS = ("Stage", "Protocol", "Data set", "Framework", "Method")


def write_report(
    collection: Collection,
    out: Path,
    published: Sequence[Published] = (),
    force: bool = False,
    templates: Path | None = None,
) -> Path:
    """Write ``index.html`` into a folder, whole or not at all; an older report there is replaced.

    Args:
        collection: What to report.
        out: The folder.
        published: Published numbers in addition to the paper's.
        force: Also replace an ``index.html`` that is not a report.
        templates: A folder whose ``table.html.j2`` is used instead of ours.

    Returns:
        The file.

    Raises:
        UserError: If the folder is a file, or ``index.html`` in it is no report.
    """
    require_output_folder(out)
    page = out / "index.html"
    require_own_file(page, GENERATOR.encode(), force)
    write_text(page, render_report(collection, out, published, templates))
    return page


def render_report(
    collection: Collection,
    out: Path,
    published: Sequence[Published] = (),
    templates: Path | None = None,
    live: tuple[str, str] | None = None,
) -> str:
    """The page.

    Args:
        collection: What to report.
        out: Where links to run folders start.
        published: Published numbers in addition to the paper's.
        templates: A folder whose ``table.html.j2`` is used instead of ours.
        live: For a page that a server keeps up to date: HTML before the tables, and a script after ours.
    """
    runs = collection.distinct
    results = results_of(runs)
    tables = [table for table in (build(layout, results) for layout in choose(None, published)) if table.num_runs]
    vanilla = [run for run in runs if run.record.stage == "transfer" and run.record.method == "vanilla"]
    others = [run for run in runs if run.record.stage == "transfer" and run.record.method not in ("vanilla", "random")]
    comparisons: list[Comparison] = compare(others, vanilla) if vanilla and others else []
    checks: list[Check] = expectations(collection)
    plots = plots_of(runs, (*published_numbers(), *published))
    listed = _listed(runs, out)
    num_transfers = sum(run.record.stage == "transfer" for run in runs)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(page_file), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"p": lambda text: printable(str(text)), "id": run_id}
    return environment.get_template("report.html.j2").render(
        title=f"Transfer results: {printable(collection.folder.resolve().name)}",
        finding=finding(runs, comparisons),
        facts=facts(runs, date.today()),
        caveats=caveats(runs),
        live=Markup(live[0]) if live else "",
        summary=f"{len(runs) - num_transfers} pretraining and {num_transfers} transfer runs, finished"
        + (f"; {len(collection.unfinished)} are not" if collection.unfinished else "")
        + ".",
        style=Markup(page_file("report.css")),
        script=Markup(page_file("report.js") + (live[1] if live else "")),
        tables=[{"id": table.id, "html": html_table(table, _linked, templates), "forms": COPIES} for table in tables],
        comparisons=comparisons,
        checks=checks,
        plots=[_drawn(plot) for plot in plots],
        runs=listed,
        filters={label: sorted({run["columns"][n] for run in listed}) for n, label in enumerate(FILTERS)},
        left_out=[printable(line) for line in collection.remarks(most=1000).splitlines()],
        footer=_sources(tables),
        data=Markup(_data(tables, runs)),
    )


def run_id(run: Run) -> str:
    """The HTML id of a run: its fingerprint, or a digest if the fingerprint is not a plain word."""
    fingerprint = run.record.fingerprint
    plain = re.fullmatch(r"[A-Za-z0-9_-]{1,40}", fingerprint) is not None
    word = fingerprint if plain else hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    return f"run-{'' if run.record.stage == 'transfer' else 'p-'}{word}"


def page_file(file: str) -> str:
    """A template, a style or a script of ``page/``."""
    return resources.files("mixmask.evaluate").joinpath("page", file).read_text(encoding="utf-8")


def _data(tables: Sequence[Table], runs: Sequence[Run]) -> str:
    """What the page's script reads, as JSON that is safe inside a script element: tables to copy, runs to compare."""
    document = {
        "tables": {table.id: {form: render(table, kind) for form, kind in COPIES.items()} for table in tables},
        "runs": {
            run_id(run): {
                "name": printable(run.record.name),
                "metrics": {printable(key): value for key, value in run.record.metrics.items()},
                "settings": {printable(key): printable(text_of(value)) for key, value in _everything(run).items()},
            }
            for run in runs
        },
    }
    text = json.dumps(document)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _everything(run: Run) -> dict[str, Any]:
    """Every setting and circumstance of a run, as flat keys."""
    record = run.record
    return {
        **flat(record.settings),
        **flat(record.recipe),
        **flat(record.pretraining, "pretrain."),
        "seed": record.seed,
        **flat(record.environment, "environment."),
    }


def _sources(tables: Sequence[Table]) -> str:
    found = dict.fromkeys(source for table in tables for source in table.sources)
    return f"Published numbers: {'; '.join(found)}." if found else ""


def _linked(cell: TableCell, text: str) -> str:
    """A cell's text as a link to its run or, of several runs, as an expandable list of links."""
    links = [
        f'<a href="#{run_id(result.run)}">{_seeds(result.seeds)}: {result.value:.2f}</a>' for result in cell.results
    ]
    if len(links) == 1:
        return f'<a href="#{run_id(cell.results[0].run)}">{text}</a>'
    return f'<details class="runs"><summary>{text}</summary>{"".join(links)}</details>'


def _seeds(seeds: tuple[int | None, int]) -> str:
    own = f"seed {seeds[1]}"
    return own if seeds[0] in (None, seeds[1]) else f"{own} (backbone {seeds[0]})"


def _drawn(plot: Plot) -> dict[str, str]:
    image = base64.b64encode(plot.render("svg")).decode()
    return {
        "title": printable(plot.title),
        "text": printable(plot.text),
        "caption": printable(plot.caption),
        "image": image,
    }


def _listed(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """What the template needs of every run, sorted by stage, name and seed."""
    known = {run.record.fingerprint: run_id(run) for run in runs if run.record.stage == "pretrain"}
    children: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        if run.record.parent:
            child = {"id": run_id(run), "name": printable(run.record.name)}
            children.setdefault(run.record.parent, []).append(child)
    order = sorted(runs, key=lambda run: (run.record.stage, run.record.name, run.record.seed, run.record.fingerprint))
    names = Counter(run.record.name for run in runs)
    return [
        _described(run, out, known, children.get(run.record.fingerprint, []), names[run.record.name] > 1)
        for run in order
    ]


def _described(
    run: Run, out: Path, known: Mapping[str, str], children: list[dict[str, str]], twice: bool
) -> dict[str, Any]:
    record = run.record
    headline, order = "", None
    if record.headline is not None:
        metric, order = record.headline
        headline = f"{record.headlines[metric]} {order:.2f}"
    columns = (
        record.stage,
        record.title if record.stage == "transfer" else "",
        name(record.dataset),
        name(record.framework),
        name(record.method),
    )
    return {
        "id": run_id(run),
        "fingerprint": printable(record.fingerprint),
        "name": printable(record.name),
        "label": printable(record.name) + (f" ({printable(record.fingerprint)[:8]})" if twice else ""),
        "columns": [printable(text) for text in columns],
        "epochs": record.pretrain_epochs,
        "seed": _seeds((record.pretrain_seed, record.seed)) if record.stage == "transfer" else f"seed {record.seed}",
        "settings": printable(_settings(run)),
        "headline": printable(headline),
        "order": order,
        "parent": printable(record.parent or ""),
        "parent_known": record.parent in known,
        "parent_id": known.get(record.parent or "", ""),
        "children": children if record.stage == "pretrain" else [],
        "command": reproduce(run),
        "path": printable(str(run.path)),
        "folder": quote(os.fsencode(os.path.relpath(run.path.resolve(), out.resolve()))) + "/",
        "images": _images(run),
        "metrics": {printable(key): value for key, value in record.metrics.items()},
        "environment": {printable(str(key)): printable(str(value)) for key, value in record.environment.items()},
        "recipe": "\n".join(map(printable, last_lines(RunDirectory(run.path).recipe_file))),
        "log": "\n".join(map(printable, last_lines(RunDirectory(run.path).log_file)[-LOG_LINES:])),
    }


def _settings(run: Run) -> str:
    """The settings that distinguish runs of one method: those of the mixture and of the protocol."""
    record = run.record
    varied = {key: value for key, value in ablation(record).items() if value is not None}
    varied |= {key: record.settings[key] for key in ("k", "lr", "engine", "iterations") if key in record.settings}
    return ", ".join(f"{key} {text_of(value)}" for key, value in varied.items())


def reproduce(run: Run, recipe_file: str | None = None) -> str:
    """The shell commands that repeat a run, from the recipe in its folder or from ``recipe_file``."""
    record = run.record
    recipe = recipe_file or shlex.quote(printable(str(RunDirectory(run.path).recipe_file)))
    again = f"mixmask {'pretrain' if record.stage == 'pretrain' else 'transfer'} --runs again {recipe}"
    commit = record.environment.get("git_commit")
    pure, plus, state = printable(str(commit or "")).partition("+")
    lines = [f"git checkout {shlex.quote(pure)}"] if pure else []
    if recipe_file is None and (run.path / "changes.patch").is_file():
        lines.append(f"git apply {shlex.quote(printable(str(run.path / 'changes.patch')))}")
    elif plus and lines:
        lines[0] += "  # the run had uncommitted changes" if state == "changes" else f"  # state of the files: {state}"
    return "\n".join([*lines, again])


def _images(run: Run) -> list[dict[str, str]]:
    """The images to embed: a detector's sheet of sample detections, if there is one."""
    path = run.path / SHEET
    try:
        payload = read_run_file(path, MOST_IMAGE_BYTES)
    except DataError:
        return []
    text = f"Test pictures of {run.record.name}: found (left) and true objects (right)"
    return [{"form": "jpeg", "data": base64.b64encode(payload).decode(), "text": printable(text)}]
