"""What runs in a job: one cell, the check of the shared folder, and the last job that writes the tables.

submitit pickles these objects and starts them on the node, one task per process. On SLURM's signal, submitit calls
`checkpoint` and requeues the job. During training, the training loop replaces that handler by its own, which only sets
a flag: the loop finishes the step, saves a checkpoint and raises `Interrupted`. Rank 0 then raises the signal once
more, for submitit.

torch is imported as late as possible, so that the job of a finished cell ends at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import submitit
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from mixmask.engine import ownership
from mixmask.engine.errors import Interrupted, RunFailure, UserError
from mixmask.engine.storage import RunDirectory, write_text
from mixmask.launch.slurm import slurm_cli
from mixmask.launch.slurm.attempts import Attempts, Place
from mixmask.launch.slurm.spawn import run_on_node

REQUEUE_PATIENCE = (2, 5, 10, 20)  # seconds to wait after each failed attempt to requeue


@dataclass(frozen=True)
class CellJob:
    """The job of one cell.

    Attributes:
        cell: The cell's id.
        work: What it does; can be pickled.
        run: The run directory.
        done: Files that exist once the cell is finished.
        folder: Working directory of the launch; relative paths in recipes start there.
        traces: Folder in which a job leaves a file when it starts.
        max_requeues: Largest number of requeues.
        processes: Processes that this task starts; with 1, the task does the work itself.
        local_cache: Folder on the node for temporary and compiled files.
    """

    cell: str
    work: Callable[[], None] = field(compare=False)
    run: Path
    done: tuple[Path, ...]
    folder: Path
    traces: Path
    max_requeues: int
    processes: int = 1
    local_cache: str | None = None

    @property
    def attempts(self) -> Attempts:
        """The log of all jobs of this cell."""
        return Attempts(RunDirectory(self.run).attempts_file)

    def __call__(self) -> None:
        """Do the work, from its checkpoint if there is one.

        Raises:
            SystemExit: 2 for a user error, 1 for a failure, 128 + signal if the job was stopped for good.
        """
        place = Place.here()
        try:
            leave_trace(self.traces, place)
            os.chdir(self.folder)
            if all(file.is_file() for file in self.done):
                print(f"{self.cell}: finished before, see {self.run}", flush=True)
                return
            self.attempts.write(place, "started")
        except (OSError, UserError) as error:
            print(f"error: {self.cell}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        try:
            # SLURM's own requeues, after a preemption, do not call `checkpoint`; this limit holds for them, too.
            if self.attempts.starts(place.job) - 1 > self.max_requeues:
                raise RunFailure(f"{self.cell}: given up after {self.max_requeues} requeues (max_requeues)")
            _use_local_cache(self.local_cache)
            _name_local_processes(place)
            if self.processes > 1:
                run_on_node(self.work, self.processes)
            else:
                self.work()
            absent = [str(file) for file in self.done if not file.is_file()]
            if absent and not place.rank:
                raise RunFailure(
                    f"{self.cell}: {', '.join(absent)} is missing, although the run says that it is finished; "
                    f"delete {self.run} to do it again"
                )
        except Interrupted as stop:
            self.stopped(place, stop.signal, str(stop))
        except (UserError, RunFailure) as error:
            self.failed(place, error.told(), error.exit_code)
        except SystemExit as end:  # the processes have agreed to end, and rank 0 has printed why
            code = end.code if isinstance(end.code, int) else 1
            if code <= 128:
                # submitit exits this way after a requeue, too; `checkpoint` has then written "stopped".
                if self.attempts.last(place.job) != "stopped":
                    self.attempts.write(place, "failed")
                raise
            self.stopped(place, code - 128, "")
        except Exception as error:
            self.attempts.write(place, "failed", traceback.format_exception_only(error)[-1].strip())
            raise
        else:
            # The work is done: a signal that arrives from now on must not requeue the job.
            if place.cluster == "slurm":
                signal.signal(submitit.JobEnvironment()._usr_sig(), signal.SIG_IGN)
            self.attempts.write(place, "done")

    def failed(self, place: Place, message: str, code: int) -> None:
        """End with a message instead of a traceback."""
        self.attempts.write(place, "failed", message)
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(code)

    def stopped(self, place: Place, number: int, message: str) -> None:
        """Requeue the job after its checkpoint, unless it was cancelled or SLURM requeues it.

        A job that is being cancelled, or that SLURM requeues itself (preemption), is no longer RUNNING. A job that is
        still RUNNING got the signal before its time limit or in the grace time of a preemption. Its rank 0 raises the
        signal once more, for submitit, which counts timeouts and calls `checkpoint`.
        """
        print(message or f"{self.cell}: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        self.attempts.write(place, "stopped")
        if place.cluster == "inline":
            raise Interrupted(message, number)
        # A requeue restarts all processes of the job, so rank 0 alone decides on it.
        if place.rank:
            return
        if ownership.TAKEN_OVER.is_set():
            self.failed(place, f"failed: {self.cell}: another job has taken it over", 1)
        if place.cluster == "local" and number != submitit.JobEnvironment()._usr_sig():  # the user, not the time limit
            raise SystemExit(128 + number)
        # If the controller does not answer, the job counts as RUNNING, so that it is requeued rather than lost.
        if place.cluster == "slurm" and (slurm_cli.state_of(place.job) or "RUNNING") != "RUNNING":
            raise SystemExit(128 + number)
        for patience in REQUEUE_PATIENCE:
            try:
                # submitit's handler is back in place; if the requeue succeeds, it ends this process.
                signal.raise_signal(submitit.JobEnvironment()._usr_sig())
            except UncompletedJobError as error:
                self.failed(place, f"failed: {self.cell}: {error}", 1)
            except subprocess.SubprocessError as error:  # slurmctld is busy
                print(f"{self.cell}: not queued again yet: {error}", file=sys.stderr, flush=True)
                time.sleep(patience)
            except FileNotFoundError:
                break
        self.failed(place, f"failed: {self.cell}: saved, but scontrol cannot queue it again; launch the suite again", 1)

    def checkpoint(self) -> DelayedSubmission | None:
        """What submitit requeues. None if the cell is done or the limit is reached; submitit then ends the job."""
        place = Place.here()
        if self.attempts.last(place.job) == "done":
            return None
        if self.attempts.starts(place.job) > self.max_requeues:
            print(
                f"{self.cell}: given up after {self.max_requeues} requeues (max_requeues)", file=sys.stderr, flush=True
            )
            return None
        if self.attempts.last(place.job) != "stopped":  # the signal came outside the training loop
            self.attempts.write(place, "stopped")
        return DelayedSubmission(self)


def _use_local_cache(folder: str | None) -> None:
    """Put temporary and compiled files on the node's own disk. Must be called before torch is imported."""
    if folder is None:
        return
    place = Path(os.path.expandvars(folder))
    place.mkdir(parents=True, exist_ok=True)
    names = {
        "TMPDIR": "tmp",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "XDG_CACHE_HOME": "cache",
    }
    for variable, name in names.items():
        (place / name).mkdir(exist_ok=True)
        os.environ[variable] = str(place / name)


def _name_local_processes(place: Place) -> None:
    """Set torchrun's environment variables (RANK, WORLD_SIZE, …) in a process of ``--cluster local``."""
    count = int(os.environ.get("SUBMITIT_LOCAL_NTASKS", "1"))
    if place.cluster != "local" or count == 1:
        return
    # All processes derive the same port from the job id, without talking to each other.
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(15000 + int(place.job) % 20000),
    )


def leave_trace(traces: Path, place: Place, text: str = "") -> None:
    """Leave a file which shows that the job has started and that the node can write to the folder."""
    if place.rank == 0:
        write_text(traces / place.job, text)


@dataclass(frozen=True)
class ProbeJob:
    """Checks that the nodes share the folder with the launching machine, and that jobs can talk to SLURM."""

    traces: Path

    def __call__(self) -> None:
        """Write the trace; its text is the problem found, empty if there is none."""
        place = Place.here()
        problem = ""
        if slurm_cli.state_of(place.job) is None:
            problem = (
                "a job cannot run scontrol there, so nothing could be queued again after a preemption or a time limit"
            )
        leave_trace(self.traces, place, problem)


@dataclass(frozen=True)
class FinishJob:
    """The last job of a launch: it writes the tables and lists the unfinished cells."""

    runs: Path
    suite: str

    def __call__(self) -> None:
        """Write the tables, and print the report."""
        from mixmask.launch.suite.summary import write_results

        print(write_results(self.runs, self.suite), flush=True)
