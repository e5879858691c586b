"""The commands around suites: launch, status, cancel, logs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from mixmask.engine.builtin_configs import config_file
from mixmask.launch.commands.options import SuiteFile, SuiteOverrides
from mixmask.launch.commands.terminal import show

Suite = Annotated[str, typer.Argument(help="A suite's file, or the name of a launched one.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs; the nodes must share it.")]


def launch(
    suite: SuiteFile,
    overrides: SuiteOverrides = None,
    cluster: Annotated[
        Literal["slurm", "local", "inline"],
        typer.Option(help="SLURM, processes on this machine one after another, or this very process."),
    ] = "slurm",
    profile: Annotated[
        Path | None, typer.Option(help="Describes the cluster: a YAML file like configs/cluster/example.yaml.")
    ] = None,
    runs: Runs = Path("runs"),
    check_data: Annotated[bool, typer.Option(help="Open every data set once before anything is submitted.")] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the graph, the counts, the sbatch headers and the hours; submit nothing."
        ),
    ] = False,
) -> None:
    """Run a suite: pretrain, convert, transfer, tables, as dependent job arrays that survive preemption.

    Repeat the command to continue a suite: finished cells are skipped, unfinished ones resume from their checkpoints, and
    queued ones are not queued twice.

    \b
    Examples:
      mixmask launch table5 --profile my_cluster.yaml --dry-run
      mixmask launch demo --cluster inline
    """
    from mixmask.launch.estimate.estimate import short_estimate
    from mixmask.launch.slurm import submission
    from mixmask.launch.slurm.profile import load_profile
    from mixmask.launch.suite import launching, manifest
    from mixmask.launch.suite.arrays import Array
    from mixmask.launch.suite.suite import load_suite

    suite = config_file(suite, "suites")
    chosen, given = (
        load_suite(suite, overrides or ()),
        load_profile(config_file(profile, "cluster") if profile is not None else None),
    )
    if not dry_run:
        if not launching.launch(chosen, suite.parent, given, cluster, runs, check_data):
            raise typer.Exit(1)
        return
    plan = launching.make_plan(chosen, suite.parent, given, cluster, runs, check_data, dry=True)
    show(plan.describe())
    show(short_estimate(plan.cells, given))
    if cluster != "slurm" or not plan.arrays:
        return
    folder = manifest.suite_folder(plan.runs, chosen.name) / "launches" / "…"
    snapshot = manifest.suite_folder(plan.runs, chosen.name) / "code" / "…"
    names = {array.name: f"<{array.name}>" for array in plan.arrays}
    for array in plan.arrays:
        show(
            f"\n{array.name}\n{submission.header(chosen.name, array, given, folder, snapshot, array.dependency(names))}"
        )
    last = Array("finish", given.resolve(chosen.resources.finish), ())
    after = f"afterany:{':'.join([*names.values(), *plan.queued.values()])}"
    show(f"\nfinish\n{submission.header(chosen.name, last, given, folder, snapshot, after)}")


def status(
    suite: Suite,
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    cells: Annotated[bool, typer.Option("--cells", help="Every cell with its job and log.")] = False,
    watch: Annotated[float, typer.Option(help="Refresh every so many seconds, until all cells have ended.", min=0)] = 0,
) -> None:
    """Show how far a suite is: recipes × seeds, then the cells that are running or have failed.

    A finished cell shows its headline metric, a running one its progress. `1:` is the seed; `0/1:` are the seeds of the
    backbone and of the cell.

    \b
    Examples:
      mixmask status table5 --watch 30
      mixmask status table5 --cells
    """
    from rich.console import Console
    from rich.live import Live

    from mixmask.engine.errors import RunFailure
    from mixmask.launch.suite import manifest
    from mixmask.launch.suite import status as states
    from mixmask.launch.suite.overview import cells as every_cell
    from mixmask.launch.suite.overview import overview

    newest = manifest.latest(runs.resolve(), _name(suite))
    draw = every_cell if cells else overview

    def look() -> list[states.CellStatus]:
        return states.status(newest)

    if as_json:
        show(states.as_json(newest.suite, look()))
        return
    found = look()
    console = Console()
    if not watch:
        console.print(draw(newest, found), crop=False)
        return
    rows = console.size.height - 8 if console.is_terminal else None
    with Live(draw(newest, found, rows), console=console, auto_refresh=False) as live:
        while any(one.state in ("pending", "running", "suspended") for one in found):
            time.sleep(watch)
            remark = ""
            try:
                found = look()
            except RunFailure as error:  # slurmctld is busy or restarting: keep the previous table
                remark = f"not asked at {time.strftime('%H:%M:%S')}, shown as before: {error}"
            live.update(draw(newest, found, rows, remark), refresh=True)


def cancel(suite: Suite, runs: Runs = Path("runs")) -> None:
    """Cancel every pending or running job of a suite. Finished cells stay; `mixmask launch` continues with the rest.

    \b
    Example:
      mixmask cancel table5
    """
    from mixmask.launch.suite import manifest
    from mixmask.launch.suite import status as states

    name = _name(suite)
    manifest.latest(runs.resolve(), name)
    jobs = states.cancel(list(manifest.launches(runs.resolve(), name)))
    show(f"cancelled {', '.join(jobs)}" if jobs else "no job of it is pending or running")


def logs(
    cell: Annotated[
        str, typer.Argument(help="A cell's id or a part of it, a name that status shows, a job or a run directory.")
    ],
    runs: Runs = Path("runs"),
    lines: Annotated[int, typer.Option(help="Print the last lines only; 0 prints all.", min=0)] = 40,
) -> None:
    """Print the newest log of a cell.

    \b
    Example:
      mixmask logs cifar100-moco-mixmask-cifar100-knn
    """
    from mixmask.engine.errors import UserError
    from mixmask.launch.suite import manifest
    from mixmask.launch.suite import status as states

    newest, found = states.find_cell(list(manifest.launches(runs.resolve()))[::-1], cell)
    one = next(one for one in states.status(newest) if one.cell == found.id)
    if one.log is None and one.state == "done":
        raise UserError(f"{one.cell}: was finished before it was launched here; its run directory is {one.run}")
    if one.log is None or not Path(one.log).is_file():
        raise UserError(f"{one.cell}: {one.state}, and there is no log yet{f' ({one.log})' if one.log else ''}")
    text = Path(one.log).read_text(encoding="utf-8", errors="replace").splitlines()
    show(f"{one.log}: {one.state} {one.detail}".strip(), err=True)
    show("\n".join(text[-lines:] if lines else text))


def _name(suite: str) -> str:
    """A suite's name, from the name itself or from the suite's file."""
    from mixmask.engine.config import read_config

    path = Path(suite)
    if path.suffix in (".yaml", ".yml"):
        tree, _ = read_config(path)
        return str(tree.get("name", path.stem))
    return suite
