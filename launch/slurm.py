"""Submission to SLURM through submitit: arrays with dependencies, all of them or none."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from engine.errors import RunFailure, UserError
from engine.progress import say
from launch import queue
from launch.arrays import Array
from launch.cluster import Profile, Resources
from launch.jobs import CellJob, FinishJob, ProbeJob
from launch.ledger import Launch
from launch.suite import Suite


def header(suite: str, array: Array, profile: Profile, folder: Path, snapshot: Path, job_ids: Mapping[str, str]) -> str:
    """The ``#SBATCH`` lines of an array, as submitit would write them.

    Args:
        suite: Its name is part of the job's.
        array: What is submitted.
        profile: Of the cluster.
        folder: Of the launch.
        snapshot: Of the code.
        job_ids: Of the arrays before it, or words that stand for them.
    """
    parameters = profile.sbatch_parameters(array.resources, snapshot, array.dependency(job_ids))
    text = submitit_slurm._make_sbatch_string(
        command="",
        folder=folder / "jobs" / array.name,
        job_name=f"{suite}.{array.name}",
        map_count=len(array.cells) if len(array.cells) > 1 else None,
        **parameters,
    )
    return "\n".join(line for line in text.splitlines() if line.startswith("#SBATCH"))


def submit(
    arrays: Sequence[Array], jobs: Mapping[str, CellJob], profile: Profile, suite: Suite, record: Launch
) -> None:
    """Submit every array and the last job, and write their ids down; if one is refused, cancel the others.

    Raises:
        UserError: If sbatch is missing, or the nodes do not see the folder of runs.
        RunFailure: With sbatch's message and the header that caused it.
    """
    if not arrays:
        return
    assert record.snapshot is not None
    _check_shared(profile, suite, record)
    cells = {cell.id: cell for cell in record.cells}
    ids: dict[str, str] = {}
    with _all_or_none(ids):
        for array in arrays:
            parameters = profile.sbatch_parameters(array.resources, record.snapshot, array.dependency(ids))
            work = [jobs[cell.id] for cell in array.cells]
            submitted = _sbatch(f"{suite.name}.{array.name}", work, parameters, profile, record, array.name)
            ids[array.name] = submitted[0].job_id.split("_")[0]
            for cell, job in zip(array.cells, submitted, strict=True):
                cells[cell.id] = cells[cell.id].model_copy(update={"job": job.job_id, "log": Path(job.paths.stdout)})
            record.cells = tuple(cells.values())
            record.jobs = tuple(ids.values())
            record.write()
            say(f"submitted {array.name}: job {ids[array.name]}, {len(work)} tasks")
        waits = sorted({*ids.values(), *(cell.job for cell in record.cells if cell.job is not None)})
        parents = {job for job in waits if "_" not in job}
        after = ":".join(job for job in waits if job in parents or job.split("_")[0] not in parents)
        resources = profile.resolve(suite.resources.finish)
        parameters = profile.sbatch_parameters(resources, record.snapshot, f"afterany:{after}")
        finish = _sbatch(f"{suite.name}.finish", [FinishJob(record.file)], parameters, profile, record, "finish")
        ids["finish"] = finish[0].job_id
        record.jobs, record.finish_job = tuple(ids.values()), finish[0].job_id
        record.write()
    say(
        f"submitted finish: job {record.finish_job}, which writes {record.folder.parents[1]}/tables.md\n"
        f"mixmask status {suite.name} shows how far it is"
    )


@contextlib.contextmanager
def _all_or_none(ids: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if ids:
            queue.cancel(ids.values())
            say(f"cancelled what had been submitted: {', '.join(f'{name} (job {job})' for name, job in ids.items())}")
        raise


def _sbatch(
    name: str,
    work: Sequence[Callable[[], None]],
    parameters: Mapping[str, Any],
    profile: Profile,
    record: Launch,
    folder: str,
) -> list[submitit.Job[None]]:
    """Submit one array, or a plain job if it has one task."""
    place = record.folder / "jobs" / folder
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
        executor.update_parameters(job_name=name, **parameters)
        return list(executor.submit_array(list(work)))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; is SLURM installed on this machine?") from None
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        written = sorted(place.glob(".submission_file_*.sh"), key=lambda file: file.stat().st_mtime)
        lines = written[-1].read_text(encoding="utf-8").splitlines() if written else []
        shown = "\n".join(line for line in lines if line.startswith("#SBATCH"))
        raise RunFailure(f"sbatch refuses {name}: {str(error).strip()}\nIts header was:\n{shown}") from None


def _check_shared(profile: Profile, suite: Suite, record: Launch) -> None:
    """Let a small job write a file, and see that it appears here; once for each profile and folder of runs.

    Raises:
        UserError: If the job has run and the file is not seen.
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
    job = _sbatch(f"{suite.name}.probe", [ProbeJob(traces)], parameters, profile, record, "probe")[0]
    say(f"submitted probe: job {job.job_id}; waiting up to {profile.shared_check_s} s to see that nodes share {runs}")
    end = time.monotonic() + profile.shared_check_s
    try:
        while time.monotonic() < end:
            state = queue.queued().get(job.job_id)
            if (traces / job.job_id).exists():
                proof.touch()
                return
            if state is None or not state.is_active:
                time.sleep(2)  # what a network file system may take to show a new file
                if (traces / job.job_id).exists():
                    continue
                how = "" if state is None else f" ({state.state.lower()} on {state.node})"
                raise UserError(
                    f"{runs}: a job has ended{how}, and the file that it should have written there is not seen here: "
                    f"{traces / job.job_id}. The folder of runs must be one that the nodes share (--runs), and "
                    f"the nodes' Python must be able to start (container, setup, python of the profile). "
                    f"Its log, if any: {job.paths.stdout}"
                )
            time.sleep(0.5)
    finally:
        if not proof.exists():
            with contextlib.suppress(RunFailure):
                queue.cancel([job.job_id])
    say(f"the probe has not started within {profile.shared_check_s} s; going on without its proof")
