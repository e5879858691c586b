"""What runs in a job: one cell, the check of the shared folder, and the last job that writes the tables.

submitit pickles these objects and starts them on the node, one task per process. submitit answers SLURM's signal by calling
`checkpoint` and queueing the job again. While a cell trains, the training loop has put its own handler there, which only
sets a flag; the loop saves at the next step and ends with `Interrupted`, and then the first process hands the signal on to
submitit.

Nothing here imports torch before it must: a cell that is finished ends at once.
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

REQUEUE_PATIENCE = (2, 5, 10, 20)  # seconds between attempts to be queued again


@dataclass(frozen=True)
class CellJob:
    """A cell, as a job runs it.

    Attributes:
        cell: Its id.
        work: What it does.
        run: The run directory.
        done: Files whose presence says that it is finished.
        folder: The user's folder at the launch, which relative paths in recipes start from.
        traces: Where the job leaves a mark that it has started.
        max_requeues: How often it may be queued again.
        processes: How many this task starts; 1 is the task itself.
        local_cache: The node's folder for temporary files.
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
        """What is known of earlier jobs."""
        return Attempts(RunDirectory(self.run).attempts_file)

    def __call__(self) -> None:
        """Do the work, or go on with it.

        Raises:
            SystemExit: 2 for a user's mistake, 1 for a failure, 128 + signal if it was stopped for good.
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
        except SystemExit as end:  # several processes have agreed on it, and the first has said why
            code = end.code if isinstance(end.code, int) else 1
            if code <= 128:
                if self.attempts.last(place.job) != "stopped":  # by submitit, which has queued it again
                    self.attempts.write(place, "failed")
                raise
            self.stopped(place, code - 128, "")
        except Exception as error:
            self.attempts.write(place, "failed", traceback.format_exception_only(error)[-1].strip())
            raise
        else:
            if (
                place.cluster == "slurm"
            ):  # a signal that comes now has nothing to stop, and nothing is to be queued again
                signal.signal(submitit.JobEnvironment()._usr_sig(), signal.SIG_IGN)
            self.attempts.write(place, "done")

    def failed(self, place: Place, message: str, code: int) -> None:
        """End with a message instead of a traceback."""
        self.attempts.write(place, "failed", message)
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(code)

    def stopped(self, place: Place, number: int, message: str) -> None:
        """After a checkpoint: queue the job again, if nobody else does.

        A job that is being cancelled, or that SLURM queues again itself (preemption), is no longer RUNNING. One that is
        has been told to stop before its time limit or within a preemption's grace time; its first process hands the
        signal on to submitit, which counts timeouts and calls `checkpoint`.
        """
        print(message or f"{self.cell}: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        self.attempts.write(place, "stopped")
        if place.cluster == "inline":
            raise Interrupted(message, number)
        if place.rank:
            return
        if ownership.TAKEN_OVER.is_set():
            self.failed(place, f"failed: {self.cell}: another job has taken it over", 1)
        if place.cluster == "local" and number != submitit.JobEnvironment()._usr_sig():  # the user, not the time limit
            raise SystemExit(128 + number)
        if place.cluster == "slurm" and (slurm_cli.state_of(place.job) or "RUNNING") != "RUNNING":
            raise SystemExit(128 + number)
        for patience in REQUEUE_PATIENCE:
            try:
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
        """What submitit queues again; None after too many times, and the job fails."""
        place = Place.here()
        if self.attempts.last(place.job) == "done":
            return None
        if self.attempts.starts(place.job) > self.max_requeues:
            print(
                f"{self.cell}: given up after {self.max_requeues} requeues (max_requeues)", file=sys.stderr, flush=True
            )
            return None
        if self.attempts.last(place.job) != "stopped":  # the signal came before training or after it
            self.attempts.write(place, "stopped")
        return DelayedSubmission(self)


def _use_local_cache(folder: str | None) -> None:
    """Point what writes temporary files or compiles at the node's own disk; before torch is imported."""
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
    """Give the processes of a local job the names that torchrun would give them."""
    count = int(os.environ.get("SUBMITIT_LOCAL_NTASKS", "1"))
    if place.cluster != "local" or count == 1:
        return
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(15000 + int(place.job) % 20000),
    )


def leave_trace(traces: Path, place: Place, text: str = "") -> None:
    """A file that shows to those who see the folder that a job has started."""
    if place.rank == 0:
        write_text(traces / place.job, text)


@dataclass(frozen=True)
class ProbeJob:
    """Shows that the nodes write to the folder that the launching machine reads, and that jobs there can talk to SLURM."""

    traces: Path

    def __call__(self) -> None:
        """Leave a trace, and in it what is wrong."""
        place = Place.here()
        problem = ""
        if slurm_cli.state_of(place.job) is None:
            problem = (
                "a job cannot run scontrol there, so nothing could be queued again after a preemption or a time limit"
            )
        leave_trace(self.traces, place, problem)


@dataclass(frozen=True)
class FinishJob:
    """The last job of a launch: the tables, and which cells have none to show."""

    runs: Path
    suite: str

    def __call__(self) -> None:
        """Write them."""
        from mixmask.launch.suite.summary import write_results

        print(write_results(self.runs, self.suite), flush=True)
