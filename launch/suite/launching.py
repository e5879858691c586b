"""``mixmask launch``: submit the jobs of a suite, or describe them in a dry run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from mixmask.engine.errors import ConfigError, NotWritable, RunDirectoryError, RunFailure, UserError
from mixmask.engine.ownership import Owner, read_owner
from mixmask.engine.progress import say
from mixmask.engine.provenance import code
from mixmask.engine.storage import RunDirectory, write_text
from mixmask.launch.slurm import slurm_cli, submission
from mixmask.launch.slurm.jobs import CellJob
from mixmask.launch.slurm.profile import Profile
from mixmask.launch.slurm.snapshot import freeze
from mixmask.launch.slurm.work import ConversionWork, StageWork
from mixmask.launch.suite import local, manifest
from mixmask.launch.suite.arrays import Array, plan_arrays
from mixmask.launch.suite.cells import Cell, check_cells, expand
from mixmask.launch.suite.manifest import Cluster, Launch
from mixmask.launch.suite.suite import Suite
from mixmask.transfer import stage as transfer_stage
from mixmask.transfer.protocol import LABELS, TransferRecipe

SETTLING_SECONDS = 60.0  # longest wait for jobs that are COMPLETING
LAUNCHING_SECONDS = 600.0  # longest wait for another launch into the same folder of runs
LARGEST_ARRAY = 1000  # tasks of an array, where SLURM cannot be asked


@dataclass(frozen=True)
class Plan:
    """What a launch would do.

    Attributes:
        suite: What was asked for.
        profile: The cluster's profile.
        cluster: Where it would run.
        runs: Folder of all runs, absolute.
        cells: All cells of the suite.
        queued: Job ids of cells that are already pending or running, by cell id.
        arrays: The remaining cells as arrays, in the order of submission.
        orphans: Ids of jobs whose parent nobody computes any more; cancelled before their cells are submitted again.
    """

    suite: Suite
    profile: Profile
    cluster: Cluster
    runs: Path
    cells: tuple[Cell, ...]
    queued: Mapping[str, str]
    arrays: tuple[Array, ...]
    orphans: tuple[str, ...] = ()

    @property
    def finished(self) -> tuple[Cell, ...]:
        """Cells with nothing left to do."""
        return tuple(cell for cell in self.cells if cell.is_finished)

    def describe(self) -> str:
        """A summary: number of cells, arrays with their dependencies, and the requested hours."""
        new = sum(len(array.cells) for array in self.arrays)
        lines = [
            f"suite     {self.suite.name}: {len(self.cells)} cells, {len(self.finished)} finished, "
            f"{len(self.queued)} queued or running, {new} to do in {len(self.arrays)} arrays"
        ]
        for array in self.arrays:
            counts = Counter(
                f"{cell.protocol} on {cell.dataset}" if cell.dataset else cell.protocol for cell in array.cells
            )
            what = ", ".join(f"{count} × {what}" for what, count in counts.items())
            waits = f", each after its own cell of {array.after.name}" if array.after is not None else ""
            waits += f", after job {', '.join(array.after_jobs)}" if array.after_jobs else ""
            lines.append(f"  {array.name:<12} {len(array.cells)} cell{'s' * (len(array.cells) != 1)} ({what}){waits}")
            lines.append(f"  {'':<12} {array.resources.describe()} each")
        if self.arrays:
            lines.append(f"  {'finish':<12} the tables, after all of them, however they end")
        else:
            return "\n".join(lines)
        gpus = sum(len(array.cells) * array.resources.gpus * array.resources.minutes for array in self.arrays) / 60
        cpus = sum(len(array.cells) * array.resources.cpus * array.resources.minutes for array in self.arrays) / 60
        lines.append(f"asked for at most {gpus:,.0f} GPU-hours and {cpus:,.0f} CPU-hours, if every job starts once")
        return "\n".join(lines)


def make_plan(
    suite: Suite,
    folder: Path,
    profile: Profile,
    cluster: Cluster,
    runs: Path,
    check_data: bool,
    dry: bool = False,
) -> Plan:
    """Expand a suite and find the cells that are left to do.

    Args:
        suite: What is asked for.
        folder: What its paths are relative to.
        profile: Of the cluster.
        cluster: Where it is to run.
        runs: Folder of all runs.
        check_data: Open every data set once.
        dry: For a dry run: if SLURM does not answer, say so and plan without it.

    Raises:
        UserError: If the suite, a recipe, a checkpoint or the data are invalid, or SLURM is not installed.
        RunFailure: If SLURM does not answer.
    """
    runs = runs.resolve()
    cells = expand(suite, folder, profile, runs, download=not dry)
    waiting: dict[str, str] = {}
    limit = LARGEST_ARRAY
    if cluster == "slurm":
        try:
            waiting = _queued(cells, runs)
            limit = slurm_cli.largest_array()
        except (UserError, RunFailure) as error:
            if not dry:
                raise
            say(f"SLURM does not answer here, so already queued jobs are not known: {error}")
    orphans = _orphans(cells, waiting)
    waiting = {cell: job for cell, job in waiting.items() if cell not in orphans}
    left = [cell for cell in cells if not cell.is_finished and cell.id not in waiting]
    if check_data:
        check_cells(left)
    for resources in {cell.resources for cell in left} if cluster == "slurm" else ():
        if profile.signal_delay_s >= 60 * resources.minutes:
            raise ConfigError(
                f"a time limit of {resources.minutes} min (time_min) leaves no time before the signal that announces its "
                f"end {profile.signal_delay_s} s earlier (signal_delay_s of the profile)"
            )
    arrays = plan_arrays(left, waiting, limit)
    return Plan(suite, profile, cluster, runs, cells, waiting, arrays, tuple(orphans.values()))


def _queued(cells: Sequence[Cell], runs: Path) -> dict[str, str]:
    """Active jobs of unfinished cells, by cell id; launches of other suites are included."""
    known: dict[str, list[str]] = {}
    for launch in manifest.launches(runs):
        for launched in launch.cells:
            if launched.job is not None and launch.cluster == "slurm":
                known.setdefault(launched.id, []).append(launched.job)
    for cell in cells:
        # A SLURM job that no launch has recorded may work on the run; its owner file names it.
        owner = read_owner(RunDirectory(cell.run).owner_file)
        if owner is not None and owner.get("job"):
            known.setdefault(cell.id, []).append(str(owner["job"]))
    states = _settled({job for cell in cells for job in known.get(cell.id, [])})
    found = {}
    for cell in cells:
        active = [job for job in known.get(cell.id, []) if job in states and states[job].is_active]
        if active and not cell.is_finished:
            found[cell.id] = active[-1]
    return found


def _settled(jobs: Set[str]) -> dict[str, slurm_cli.JobState]:
    """The queue after these jobs have left COMPLETING; until then it is not known whether they did their work."""
    end = time.monotonic() + SETTLING_SECONDS
    while True:
        states = slurm_cli.queued()
        ending = sorted(job for job in jobs if job in states and states[job].state == "COMPLETING")
        if not ending or time.monotonic() > end:
            return states
        say(f"waiting for jobs that are ending: {', '.join(ending)}")
        time.sleep(2)


def _orphans(cells: Sequence[Cell], waiting: Mapping[str, str]) -> dict[str, str]:
    """Queued cells, by id, whose pretraining is neither finished nor queued; SLURM has not cancelled them yet."""
    by_id = {cell.id: cell for cell in cells}
    return {
        cell.id: waiting[cell.id]
        for cell in cells
        if cell.id in waiting
        and cell.parent is not None
        and cell.parent not in waiting
        and not by_id[cell.parent].is_finished
    }


def launch(suite: Suite, folder: Path, profile: Profile, cluster: Cluster, runs: Path, check_data: bool) -> bool:
    """Submit what is left of a suite, or run it here.

    Returns:
        Whether every cell is finished, or has a job.

    Raises:
        UserError: If anything is wrong; nothing is left submitted then.
        RunFailure: If SLURM refuses; nothing is left submitted then.
    """
    runs = runs.resolve()
    # Two launches at the same time would both submit the same unfinished cells.
    lock = Owner(runs / ".launching.json", wait=LAUNCHING_SECONDS)
    try:
        lock.acquire()
    except NotWritable as error:
        raise UserError(f"the folder of runs cannot be written: {error}") from None
    except RunDirectoryError as error:
        raise UserError(f"another launch into this folder has not ended: {error}") from None
    try:
        plan = make_plan(suite, folder, profile, cluster, runs, check_data)
        say(plan.describe())
        _relabel(plan.finished)
        record = _record(plan)
        jobs = _jobs(plan, record)
        if cluster == "slurm":
            try:
                slurm_cli.cancel(plan.orphans)
                submission.submit(plan.arrays, jobs, plan.profile, suite, record)
            except BaseException:
                if not record.jobs:  # nothing was submitted: status keeps showing the previous launch
                    record.file.unlink(missing_ok=True)
                raise
    finally:
        lock.release()
    if cluster == "slurm" and (plan.arrays or plan.queued):
        return True
    if cluster != "slurm":
        local.run(plan.arrays, jobs, plan.profile, record)
    from mixmask.launch.suite.summary import write_results  # imports pandas, SciPy and matplotlib

    print(write_results(plan.runs, suite.name))
    return all(cell.is_finished for cell in plan.cells)


def _relabel(finished: Sequence[Cell]) -> None:
    """Update the labels of finished transfer cells to those that the suite gives them now."""
    for cell in finished:
        if isinstance(cell.recipe, TransferRecipe) and any(getattr(cell.recipe, key) is not None for key in LABELS):
            try:
                transfer_stage.relabel(cell.recipe, RunDirectory(cell.run))
            except RunDirectoryError as error:  # the report lists it, and the other cells can go on
                say(f"warning: {cell.id}: its labels stay as they are: {error}")


def _record(plan: Plan) -> Launch:
    """Write the launch's file, and freeze the code that its jobs will run."""
    folder, now = manifest.new_launch_folder(plan.runs, plan.suite.name)
    cells = tuple(
        cell.launched().model_copy(update={"job": plan.queued.get(cell.id), "log": None}) for cell in plan.cells
    )
    snapshot = None
    if plan.cluster != "inline" and (plan.arrays or plan.queued):
        snapshot = freeze(manifest.suite_folder(plan.runs, plan.suite.name) / "code")
    record = Launch(
        suite=plan.suite.name,
        created=now,
        cluster=plan.cluster,
        folder=folder,
        commit=code().commit,
        snapshot=snapshot,
        cells=cells,
    )
    record.write()
    return record


def _jobs(plan: Plan, record: Launch) -> dict[str, CellJob]:
    """The job of each cell, by cell id; the resolved recipes are written to the launch's folder."""
    from mixmask.engine.config import to_yaml

    found = {}
    for array in plan.arrays:
        for cell in array.cells:
            # Made now, so that another suite with the same work finds it by the fingerprint, under any name.
            cell.run.mkdir(parents=True, exist_ok=True)
            work: StageWork | ConversionWork
            if cell.recipe is not None:
                recipe = record.folder / "recipes" / cell.stage / f"{cell.run.name}.yaml"
                write_text(recipe, to_yaml(cell.recipe))
                work = StageWork(cell.stage, recipe, cell.run)
            else:
                assert cell.source is not None
                assert cell.target is not None
                work = ConversionWork(cell.run, cell.source, cell.done[0], cell.target)
            found[cell.id] = CellJob(
                cell=cell.id,
                work=work,
                run=cell.run,
                done=cell.done,
                folder=Path.cwd(),
                traces=record.folder / "started",
                max_requeues=plan.profile.max_requeues,
                processes=cell.resources.tasks if cell.resources.one_task_per_node else 1,
                local_cache=plan.profile.local_cache,
            )
    return found
