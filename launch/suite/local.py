"""Running a suite on this machine: one cell after another in this process, or as processes that submitit starts."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import submitit

from mixmask.engine.errors import Interrupted, UserError
from mixmask.engine.ownership import read_owner
from mixmask.engine.progress import logged, say
from mixmask.engine.storage import RunDirectory
from mixmask.launch.slurm.jobs import CellJob
from mixmask.launch.slurm.profile import Profile
from mixmask.launch.suite.arrays import Array
from mixmask.launch.suite.cells import Cell
from mixmask.launch.suite.manifest import Launch


def run(arrays: Sequence[Array], jobs: Mapping[str, CellJob], profile: Profile, record: Launch) -> None:
    """Run the arrays one after another. A cell without its backbone is skipped; a failed cell does not stop the others.

    Raises:
        Interrupted: If this process was asked to stop.
    """
    for array in arrays:
        ready = []
        for cell in array.cells:
            if array.after is not None and not all(file.is_file() for file in jobs[_parent(cell)].done):
                say(f"{cell.id}: left out, because {cell.parent} is not finished")
            else:
                ready.append(cell)
        with _stoppable():
            if record.cluster == "inline":
                for cell in ready:
                    log = record.folder / "jobs" / array.name / f"{cell.id.replace('/', '_')}.log"
                    _note(record, cell, log=log)
                    with logged(log):
                        _in_this_process(jobs[cell.id])
            else:
                _as_processes(array, ready, jobs, profile, record)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C stop the whole suite, not only one cell; a second Ctrl-C stops it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise Interrupted("stopped; the same command continues with what is missing", number)

    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; the same command continues with what is missing", signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Processes that are started in this context ignore Ctrl-C; `_stop` sends them one SIGTERM instead."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _note(record: Launch, cell: Cell, **found: object) -> None:
    """Store a cell's job and log in the launch's file."""
    record.cells = tuple(one.model_copy(update=found) if one.id == cell.id else one for one in record.cells)
    record.write()


def _parent(cell: Cell) -> str:
    assert cell.parent is not None
    return cell.parent


def _in_this_process(job: CellJob) -> None:
    say(f"\n{job.cell}")
    with _unchanged():
        try:
            job()
        except Interrupted:
            raise
        except SystemExit as end:
            say(f"{job.cell}: ended with exit code {end.code}")
        except Exception:
            traceback.print_exc()


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    """Restore the working directory and the environment variables at the end."""
    folder, environment = os.getcwd(), dict(os.environ)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)


def _as_processes(
    array: Array, cells: Sequence[Cell], jobs: Mapping[str, CellJob], profile: Profile, record: Launch
) -> None:
    """Run cells one after another; without GPUs, as many at a time as the profile says (``array_parallelism``)."""
    assert record.snapshot is not None
    if array.resources.num_nodes > 1:
        raise UserError(f"{array.name}: asks for {array.resources.num_nodes} nodes; --cluster local has this one")
    # submitit gives every local job the same first GPUs, so jobs with GPUs run one at a time.
    several = "array_parallelism" in profile.model_fields_set and not array.resources.gpus
    width = profile.array_parallelism if several else 1
    executor = submitit.LocalExecutor(
        record.folder / "jobs" / array.name,
        max_num_timeout=profile.max_timeouts,
        python=profile.command(sys.executable),
    )
    executor.update_parameters(
        timeout_min=array.resources.minutes,
        gpus_per_node=array.resources.gpus_per_node or 0,
        tasks_per_node=1 if array.resources.one_task_per_node else array.resources.tasks,
        nodes=array.resources.num_nodes,
        signal_delay_s=profile.signal_delay_s,
        stderr_to_stdout=True,
        setup=[
            *profile.setup_lines(record.snapshot, batch_script=False),
            f"cd {shlex.quote(str(record.snapshot))}",
            # The shell must survive SIGTERM, to wait for the processes that write their checkpoints.
            "trap : TERM",
        ],
    )
    for start in range(0, len(cells), width):
        chosen = cells[start : start + width]
        with _deaf_to_the_terminal():
            started = executor.submit_array([jobs[cell.id] for cell in chosen])
        for cell, job in zip(chosen, started, strict=True):
            log = job.paths.stdout
            say(f"{cell.id}: process {job.job_id}, log {log}")
            _note(record, cell, job=job.job_id, log=log)
        try:
            for cell, job in zip(chosen, started, strict=True):
                job.wait()
                say(f"{cell.id}: {'done' if cell.is_finished else 'not finished, see its log'}")
        except Interrupted:
            _stop(chosen, started)
            raise


def _stop(cells: Sequence[Cell], jobs: Sequence[submitit.Job[Any]]) -> None:
    """Let running processes write a checkpoint and end, and wait for them."""
    running = [(cell, job) for cell, job in zip(cells, jobs, strict=True) if not job.done()]
    say(f"waiting for {len(running)} processes to write their checkpoints; Ctrl-C again does not wait")
    for cell, _ in running:
        # The owner is rank 0; the other ranks agree with it on the stop.
        owner = read_owner(RunDirectory(cell.run).owner_file)
        if owner is not None and isinstance(owner.get("pid"), int):
            with contextlib.suppress(ProcessLookupError):
                os.kill(owner["pid"], signal.SIGTERM)
    for _, job in running:
        job.wait()
