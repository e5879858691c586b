"""The commands that read finished runs: results, tables, compare, plots, report, verify, card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixmask.launch.commands.options import Force
from mixmask.launch.commands.terminal import show

if TYPE_CHECKING:
    from mixmask.evaluate.collect import Collection
    from mixmask.evaluate.published import Published

RunsArgument = Annotated[Path, typer.Argument(help="Folder of runs; every record.json below it is read.")]
Out = Annotated[Path | None, typer.Option(help="Write here instead of to the terminal.")]
More = Annotated[
    list[Path] | None,
    typer.Option("--published", help="A CSV file with more published numbers; may be given several times."),
]
Templates = Annotated[
    Path | None,
    typer.Option(help="A folder of Jinja templates (table.md.j2, table.tex.j2, table.html.j2) that come before ours."),
]


def results(
    runs: RunsArgument,
    query: Annotated[
        str | None, typer.Option(help="Only runs that fulfil this condition, e.g. \"dataset == 'cifar100'\".")
    ] = None,
    form: Annotated[
        Literal["csv", "json", "parquet"] | None,
        typer.Option(
            "--format", help="By default what --out ends in; else csv, and on a terminal the main columns only."
        ),
    ] = None,
    out: Out = None,
    force: Force = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="With the average precision of every class.")] = False,
    columns: Annotated[bool, typer.Option("--columns", help="Describe the columns and stop.")] = False,
) -> None:
    """Print one row per finished run: its metrics, its recipe, its environment.

    Write columns with a slash in backticks in a query.

    \b
    Examples:
      mixmask results runs --query "dataset == 'cifar100' and `knn/top1` > 60"
      mixmask results runs --out results.parquet
      mixmask results runs --columns
    """
    from mixmask.engine.errors import UserError
    from mixmask.evaluate import collect

    if out is not None:
        _check_out(out, force)
    terminal = form is None and out is None and sys.stdout.isatty()
    form = form or _form_of_results(out)
    collection = _collect(runs)
    table = collect.frame(collection.runs, per_class)
    if columns:
        described = {**collect.FIXED, **collect.PATTERNS}
        show("\n".join(f"{name}: {text}" for name, text in described.items()))
        show("\nhere: " + ", ".join(map(str, table.columns)))
        return
    if query is not None:
        table = collect.select(table, query)
        if table.empty:
            show(f"no run below {runs} fits {query!r}", err=True)
    if form == "parquet":
        if out is None:
            raise UserError(
                "--format parquet: parquet is a binary format: write it to a file with --out results.parquet"
            )
        collect.write_parquet(table, out)
        show(out)
        return
    if terminal:
        show(collect.overview(collection.runs, {*table["run"]}))
        show("every column: --format csv or json, or --out results.parquet", err=True)
        return
    _give(collect.as_text(table, form), out)


def _form_of_results(out: Path | None) -> Literal["csv", "json", "parquet"]:
    from mixmask.engine.errors import UserError

    forms: dict[str, Literal["csv", "json", "parquet"]] = {".csv": "csv", ".json": "json", ".parquet": "parquet"}
    if out is None:
        return "csv"
    if out.suffix not in forms:
        raise UserError(f"{out}: no format has the suffix '{out.suffix}'; valid: {', '.join(forms)}, or give --format")
    return forms[out.suffix]


def tables(
    runs: RunsArgument,
    table: Annotated[
        str | None,
        typer.Option(
            help="A table's name: a number of the paper's, methods, … (--table list names all). Default: all with a run."
        ),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="A table of your own: what its rows are, e.g. framework,method.")
    ] = None,
    cols: Annotated[str | None, typer.Option(help="What its columns are, e.g. dataset,protocol.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Its metric, e.g. bbox/AP50; by default each protocol's first.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Only runs that fulfil this condition, as in mixmask results.")
    ] = None,
    form: Annotated[
        Literal["term", "md", "latex", "csv", "html"] | None,
        typer.Option("--format", help="By default what --out ends in (.md .tex .csv .html), or the terminal's."),
    ] = None,
    out: Out = None,
    force: Force = False,
    published: More = None,
    templates: Templates = None,
) -> None:
    """Print the paper's tables with your numbers beside the published ones, or a table of your own.

    A cell is the mean over runs that differ in their seeds only. Runs that differ in anything else (epochs, batch size,
    schedule, engine, k …) have a line of their own, and a footnote says what differs.

    \b
    Examples:
      mixmask tables runs
      mixmask tables runs --table 7 --format latex --out table7.tex
      mixmask tables runs --rows method --cols dataset,pretrain_epochs --metric knn/top1
    """
    from mixmask.engine.errors import UserError
    from mixmask.engine.wording import printable
    from mixmask.evaluate import collect
    from mixmask.evaluate import layouts as table_layouts
    from mixmask.evaluate.render import form_of, render_all
    from mixmask.evaluate.results import first_headline, results_of
    from mixmask.evaluate.table import build

    if out is not None:
        _check_out(out, force)
    _check_templates(templates)
    if table == "list":
        show("\n".join(f"{layout.id:<10} {layout.title}" for layout in table_layouts.choose(None, ())))
        return
    chosen = form or (form_of(out.suffix) if out is not None else "term")
    more = _published(published)
    if (rows is None) != (cols is None) or (metric is not None and rows is None):
        raise UserError("--rows, --cols and --metric make a table of your own: give --rows and --cols together")
    if rows is not None and table is not None:
        raise UserError("--table is one of the paper's, --rows and --cols make one of your own: give one or the other")
    layouts = [] if rows is not None else table_layouts.choose(table, more)
    collection = _collect(runs)
    kept = list(collection.distinct)
    if query is not None:
        fits = {*collect.select(collect.frame(kept), query)["run"]}
        kept = [run for run in kept if printable(str(run.path)) in fits]
        if not kept:
            raise UserError(f"--query {query!r}: fits none of {len(collection.distinct)} finished runs")
    found = results_of(kept)
    if rows is not None and cols is not None:
        found = [one for one in found if first_headline(one)] if metric is None else results_of(kept, [metric])
        if metric is not None and not found:
            valid = sorted({name for run in kept for name in run.record.metrics if run.record.stage == "transfer"})
            raise UserError(f"--metric {metric}: no transfer run has it; there are {', '.join(valid) or 'none'}")
        known = {key for one in found for key in one.known}
        layouts = [
            table_layouts.pivot(rows.split(","), cols.split(","), known, metric or "each protocol's first metric")
        ]
    built = [build(layout, found) for layout in layouts]
    if table is None:
        built = [one for one in built if one.num_runs]
    if not any(one.num_runs for one in built):
        which = f"table {table}" if table else "any table"
        remedy = "--table methods shows every transfer run" if table else "mixmask transfer makes some"
        show(f"none of {len(kept)} finished runs has a place in {which}; {remedy}", err=True)
    _give(render_all(built, chosen, templates=templates), out)


def compare(
    first: Annotated[
        str, typer.Argument(help="A method (mixmask), a condition as in mixmask results, or a run's folder.")
    ],
    second: Annotated[str, typer.Argument(help="What it is compared with.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs; not used for two run folders.")] = Path("runs"),
    metric: Annotated[str | None, typer.Option(help="One metric only, e.g. bbox/AP50.")] = None,
) -> None:
    """Compare two ways of pretraining: the difference, its interval and a test.

    Groups of runs are compared over their seeds, with a t interval and a t-test, paired where the seeds pair. Two run
    folders are compared image by image, from their saved predictions.

    \b
    Examples:
      mixmask compare mixmask vanilla --runs runs
      mixmask compare "mix.grid == 4" "mix.grid == 2" --runs runs --metric knn/top1
      mixmask compare runs/transfer/voc-detect-1a2b3c4d5e6f runs/transfer/voc-detect-6f5e4d3c2b1a
    """
    from mixmask.engine.errors import UserError
    from mixmask.evaluate import comparison

    metrics = [metric] if metric else None
    if Path(first).is_dir() and Path(second).is_dir():
        for pair in comparison.compare_runs(Path(first), Path(second), metrics):
            show(pair.words())
        different = comparison.differences(Path(first), Path(second))
        if different:
            show(f"measured differently: {different}", err=True)
        return
    collection = _collect(runs)
    groups = [comparison.chosen(collection, which) for which in (first, second)]
    if metric is not None and not any(metric in run.record.metrics for group in groups for run in group):
        there = sorted(
            {name for group in groups for run in group for name in run.record.metrics if name.count("/") < 2}
        )
        raise UserError(f"--metric {metric}: none of these runs has it; there are {', '.join(there)}")
    found = comparison.compare(groups[0], groups[1], metrics)
    for one in found:
        show(one.words())
    if not found:
        raise UserError(
            f"no run of {first!r} has the same protocol and data as one of {second!r}: there is nothing to compare"
        )


def plots(
    runs: RunsArgument,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("plots"),
    published: More = None,
    force: Force = False,
) -> None:
    """Draw what every protocol measured, training curves, budgets, ablations and throughput, as PNG, SVG and PDF.

    \b
    Example:
      mixmask plots runs --out plots
    """
    from mixmask.engine.errors import UserError
    from mixmask.engine.storage import require_output_folder
    from mixmask.evaluate.drawing import write_plots
    from mixmask.evaluate.plots import plots_of
    from mixmask.evaluate.published import published_numbers

    require_output_folder(out)
    more = _published(published)
    drawn = plots_of(_collect(runs).distinct, (*published_numbers(), *more))
    if not drawn:
        raise UserError(f"{runs}: no finished run has anything to plot")
    for path in write_plots(drawn, out, force):
        show(path)


def report(
    runs: RunsArgument,
    out: Annotated[Path | None, typer.Option(help="Folder for index.html; by default report.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page instead, and keep it up to date while runs train.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --serve: the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --serve: the port; 0 takes a free one.", min=0, max=65535)] = 8765,
    published: More = None,
    templates: Templates = None,
    force: Force = False,
) -> None:
    """Write one HTML page with every table, comparison, plot and run; it needs no network and no other file.

    With --serve, watch the page in a browser while runs train: curves, stale runs, suites, new results. Only this
    machine can read it; from elsewhere use ssh -L 8765:127.0.0.1:8765.

    \b
    Examples:
      mixmask report runs --out report
      mixmask report runs --serve
    """
    from mixmask.engine.errors import UserError
    from mixmask.engine.storage import require_output_folder
    from mixmask.evaluate.report import write_report

    _check_templates(templates)
    if not serve:
        folder = out or Path("report")
        require_output_folder(folder)
        show(write_report(_collect(runs), folder, _published(published), force, templates))
        return
    if out is not None:
        raise UserError("--out and --serve: a served page is not written; give one or the other")
    from mixmask.launch.live.server import LOOPBACK, LivePage, open_server

    page = LivePage(runs, _published(published), templates)
    page.page()  # a folder that is missing is reported now, not in the browser
    with open_server(page, host, port) as server:
        if host not in LOOPBACK:
            show(f"{host}: everyone who can reach this address can read the results", err=True)
        show(f"http://{host}:{server.server_address[1]}/  (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            show("stopped", err=True)


def verify(runs: RunsArgument) -> None:
    """Check which finished runs reproduce the scores that their configs expect. Exit code 1 if one does not.

    What has not been measured yet, or was measured with another protocol than the paper's, is listed and fails nothing.

    \b
    Example:
      mixmask verify runs
    """
    from mixmask.evaluate.verify import verify as check

    checks = check(_collect(runs))
    for one in checks:
        show(one.words())
    failed = sum(one.reproduced is False for one in checks)
    otherwise = sum(bool(one.otherwise) for one in checks)
    waiting = sum(one.reproduced is None for one in checks) - otherwise
    done = len(checks) - failed - waiting - otherwise
    text = f"{done} reproduced, {failed} not reproduced, {waiting} not measured yet"
    show(text + f", {otherwise} measured otherwise" * bool(otherwise))
    if failed:
        raise typer.Exit(1)


def card(
    run: Annotated[Path, typer.Argument(help="The folder of a finished pretraining run.")],
    runs: Annotated[
        Path | None, typer.Option(help="Where to look for transfer runs of it; by default its folder of runs.")
    ] = None,
    out: Out = None,
    force: Force = False,
    license: Annotated[str, typer.Option(help="As model hubs name it: mit, apache-2.0, cc-by-nc-4.0 …")] = "unknown",
) -> None:
    """Write a model card for a backbone: method, data, recipe, transfer results, environment, licence, citation.

    \b
    Example:
      mixmask card runs/pretrain/imagenet-mocov2-mixmask-1a2b3c4d5e6f --license mit --out README.md
    """
    from mixmask.evaluate.card import write_card

    if out is not None:
        _check_out(out, force)
    text = write_card(run, runs, license)
    if not (run / "backbone.safetensors").is_file():
        show(f"{run}: there is no backbone.safetensors, the file that the card is for", err=True)
    _give(text, out)


def _collect(runs: Path) -> Collection:
    """The finished runs; those that are left out are reported on standard error."""
    from mixmask.evaluate.collect import collect

    collection = collect(runs)
    remarks = collection.remarks()
    if remarks:
        show(remarks, err=True)
    return collection


def _published(files: list[Path] | None) -> list[Published]:
    """The numbers of ``--published``."""
    from mixmask.evaluate.published import read_published

    return [number for path in files or () for number in read_published(path)]


def _check_out(out: Path, force: bool) -> None:
    from mixmask.engine.storage import require_output_file

    require_output_file(out, force)


def _check_templates(folder: Path | None) -> None:
    from mixmask.engine.errors import UserError
    from mixmask.evaluate.templating import FILES

    if folder is not None and not any((folder / file).is_file() for file in FILES.values()):
        raise UserError(f"--templates {folder}: holds none of {', '.join(FILES.values())}")


def _give(text: str, out: Path | None) -> None:
    from mixmask.engine.storage import write_text

    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
        show(out)
