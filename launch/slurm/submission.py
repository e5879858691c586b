"""Submission to SLURM through submitit: arrays with dependencies, all of them or none."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from mixmask.engine.errors import RunFailure, UserError
from mixmask.engine.progress import say
from mixmask.launch.slurm import slurm_cli
from mixmask.launch.slurm.jobs import CellJob, FinishJob, ProbeJob
from mixmask.launch.slurm.profile import Profile, Resources
from mixmask.launch.suite.arrays import Array
from mixmask.launch.suite.manifest import Launch, launches
from mixmask.launch.suite.suite import Suite

APPEARING_SECONDS = 30.0  # how long a network file system may take to show a new file


def header(suite: str, array: Array, profile: Profile, folder: Path, snapshot: Path, dependency: str | None) -> str:
    """The ``#SBATCH`` lines of an array, as submitit would write them.

    Args:
        suite: Name of the suite, part of the job's name.
        array: What is submitted.
        profile: The cluster's profile.
        folder: Folder of the launch.
        snapshot: Folder of the code snapshot.
        dependency: In sbatch's syntax, with job ids or placeholders.
    """
    parameters = profile.sbatch_parameters(array.resources, snapshot, dependency)
    text = submitit_slurm._make_sbatch_string(
        command="",
        folder=folder / "jobs" / array.name,
        job_name=job_name(suite, array.name, folder),
        map_count=len(array.cells) if len(array.cells) > 1 else None,
        **parameters,
    )
    return "\n".join(line for line in text.splitlines() if line.startswith("#SBATCH"))


def submit(
    arrays: Sequence[Array], jobs: Mapping[str, CellJob], profile: Profile, suite: Suite, record: Launch
) -> None:
    """Submit every array and the finish job, and record their ids; if one is refused, cancel the others.

    The launch's file is deleted only after all submitted jobs are cancelled. Otherwise `status` and `cancel` would not
    know them, and the same command would submit everything twice.

    Raises:
        UserError: If sbatch is missing, or the nodes do not see the folder of runs.
        RunFailure: With sbatch's message and the header that caused it.
    """
    if not arrays and (not any(cell.job for cell in record.cells) or _finish_waits(record)):
        return
    assert record.snapshot is not None
    _check_shared(profile, suite, record)
    cells = {cell.id: cell for cell in record.cells}
    ids: dict[str, str] = {}
    names = [job_name(suite.name, name, record.folder) for name in (*(array.name for array in arrays), "finish")]
    with _all_or_none(ids, names, record):
        for array in arrays:
            parameters = profile.sbatch_parameters(array.resources, record.snapshot, array.dependency(ids))
            work = [jobs[cell.id] for cell in array.cells]
            submitted = _sbatch(suite.name, array.name, work, parameters, profile, record)
            ids[array.name] = submitted[0].job_id.split("_")[0]
            for cell, job in zip(array.cells, submitted, strict=True):
                cells[cell.id] = cells[cell.id].model_copy(update={"job": job.job_id, "log": Path(job.paths.stdout)})
            # Written after each array, so that the file lists every submitted job if this process is killed.
            record.cells = tuple(cells.values())
            record.jobs = tuple(ids.values())
            record.write()
            say(f"submitted {array.name}: job {ids[array.name]}, {len(work)} tasks")
        waits = sorted({*ids.values(), *(cell.job for cell in record.cells if cell.job is not None)})
        # A dependency on an array covers all its tasks; single tasks are listed only if their array is not.
        parents = {job for job in waits if "_" not in job}
        after = ":".join(job for job in waits if job in parents or job.split("_")[0] not in parents)
        resources = profile.resolve(suite.resources.finish)
        parameters = profile.sbatch_parameters(resources, record.snapshot, f"afterany:{after}")
        last = FinishJob(record.folder.parents[3], suite.name)
        finish = _sbatch(suite.name, "finish", [last], parameters, profile, record)
        ids["finish"] = finish[0].job_id
        record.jobs, record.finish_job = tuple(ids.values()), finish[0].job_id
        record.write()
    say(
        f"submitted finish: job {record.finish_job}, which writes {record.folder.parents[1]}/report.md\n"
        f"mixmask status {suite.name} --runs {shlex.quote(str(record.folder.parents[3]))} shows how far it is"
    )


def _finish_waits(record: Launch) -> bool:
    """Whether the finish job of an earlier launch is still queued or running; it reports on the newest launch."""
    states = slurm_cli.queued()
    earlier = (launch.finish_job for launch in launches(record.folder.parents[3], record.suite))
    return any(job in states and states[job].is_active for job in earlier if job is not None)


def job_name(suite: str, array: str, folder: Path) -> str:
    """An array's job name in the queue; a random suffix of the launch's folder tells launches apart."""
    return f"{suite}.{array}.{folder.name[-4:]}"


@contextlib.contextmanager
def _all_or_none(ids: Mapping[str, str], names: Sequence[str], record: Launch) -> Iterator[None]:
    """On any error, cancel all jobs by id and by name: sbatch may have accepted a job without returning its id."""
    try:
        yield
    except BaseException:
        try:
            slurm_cli.cancel(ids.values())
            slurm_cli.cancel_named(names)
            record.file.unlink(missing_ok=True)
            if ids:
                shown = ", ".join(f"{name} (job {job})" for name, job in ids.items())
                say(f"cancelled what had been submitted: {shown}")
        except (UserError, RunFailure) as error:
            record.jobs = tuple(ids.values())
            with contextlib.suppress(OSError):
                record.write()
            say(
                f"what had been submitted could not be cancelled ({error}). `mixmask status {record.suite}` shows it, "
                f"`mixmask cancel {record.suite}` tries again; or scancel {' '.join(ids.values())}"
            )
        raise


def _sbatch(
    suite: str,
    array: str,
    work: Sequence[Callable[[], None]],
    parameters: Mapping[str, Any],
    profile: Profile,
    record: Launch,
) -> list[submitit.Job[None]]:
    """Submit one array, or a plain job if it has one task."""
    place = record.folder / "jobs" / array
    try:
        executor = submitit.SlurmExecutor(
            place, max_num_timeout=profile.max_timeouts, python=profile.command(sys.executable)
        )
    except RuntimeError:
        raise UserError(
            "srun: not found, so this is not a machine that can submit to SLURM; log in to the cluster, "
            "or use --cluster local or inline"
        ) from None
    try:
        executor.update_parameters(job_name=job_name(suite, array, record.folder), **parameters)
        return list(executor.submit_array(list(work)))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; is SLURM installed on this machine?") from None
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        written = sorted(place.glob(".submission_file_*.sh"), key=lambda file: file.stat().st_mtime)
        lines = written[-1].read_text(encoding="utf-8").splitlines() if written else []
        why = str(error).strip().splitlines() or [type(error).__name__]
        shown = [line for line in lines if line.startswith("#SBATCH")]
        raise RunFailure(f"sbatch refuses {suite}.{array}: {why[0]}", *why[1:], "Its header was:", *shown) from None


def _check_shared(profile: Profile, suite: Suite, record: Launch) -> None:
    """Check with a small job that the nodes share the folder of runs; once per profile and folder.

    Raises:
        UserError: If the job has ended and its file does not appear here, or if it reports a problem.
    """
    runs = record.folder.parents[3]
    digest = hashlib.sha256(profile.model_dump_json().encode()).hexdigest()[:12]
    proof = runs / "suites" / f".seen-by-nodes-{digest}"
    if not profile.shared_check_s or proof.exists():
        return
    assert record.snapshot is not None
    traces = record.folder / "probe"
    resources = Resources(time_min=5).over(profile.resolve(suite.resources.finish))
    parameters = profile.sbatch_parameters(resources, record.snapshot, None)
    job = _sbatch(suite.name, "probe", [ProbeJob(traces)], parameters, profile, record)[0]
    say(
        f"submitted job {job.job_id}, which checks that the nodes share {runs}; waiting up to "
        f"{profile.shared_check_s} s for it"
    )
    trace = traces / job.job_id
    end = time.monotonic() + profile.shared_check_s
    ended_at: float | None = None
    try:
        # A job that has ended keeps its APPEARING_SECONDS, even beyond the time for the check.
        while time.monotonic() < end or ended_at is not None:
            if job.job_id in _listed(traces):
                problem = trace.read_text(encoding="utf-8")
                if problem:
                    raise UserError(f"{problem} (container, setup and environment of the profile)")
                proof.touch()
                return
            state = slurm_cli.queued().get(job.job_id)
            if ended_at is None and (state is None or not state.is_active):
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() > ended_at + APPEARING_SECONDS:
                how = "" if state is None else f" ({state.state.lower()} on {state.node})"
                raise UserError(
                    f"{runs}: a job has ended{how}, and the file that it should have written there is not seen here: "
                    f"{trace}. The folder of runs must be one that the nodes share (--runs), and "
                    f"the nodes' Python must be able to start (container, setup, python of the profile). "
                    f"Its log, if any: {job.paths.stdout}"
                )
            time.sleep(1)
    finally:
        if not proof.exists():
            with contextlib.suppress(RunFailure):
                slurm_cli.cancel([job.job_id])
    say(f"the check of the shared folder has not started within {profile.shared_check_s} s; continuing without it")


def _listed(folder: Path) -> list[str]:
    """The names in a folder, listed anew: a network file system may have cached that a name does not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        os.listdir(folder.parent)
        return []
