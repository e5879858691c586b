"""SLURM's commands and the parsing of their output; works with and without accounting."""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mixmask.engine.errors import RunFailure, UserError
from mixmask.engine.progress import say
from mixmask.engine.wording import printable

ACTIVE = frozenset(
    {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"}
    | {"STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
SECONDS = 60
NOT_CONFIGURED = (  # error messages of SLURM's commands on a machine without a configuration
    r"could not establish a configuration source",
    r"unable to process configuration file",
    r"no such file or directory.*slurm\.conf|slurm\.conf.*no such file or directory",
    r"resolve_ctls_from_dns_srv",
    r"no slurm config",
)


@dataclass(frozen=True)
class JobState:
    """A job, or a task of an array.

    Attributes:
        state: SLURM's word: PENDING, RUNNING, FAILED, TIMEOUT …
        reason: Why it waits or ended, in SLURM's words.
        node: Where it runs.
        seconds: For how long it has run.
    """

    state: str
    reason: str = ""
    node: str = ""
    seconds: int = 0

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def run(command: list[str]) -> str:
    """Run one of SLURM's commands.

    Raises:
        UserError: If the command is not installed.
        RunFailure: With its message, if it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: not found, so this is not a machine that can talk to SLURM; "
            f"log in to the cluster, or use --cluster local or inline"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunFailure(f"{command[0]}: no answer within {SECONDS} s; is slurmctld up?") from None
    if done.returncode:
        words = "; ".join((done.stderr or done.stdout).strip().splitlines())
        if any(re.search(pattern, words, re.IGNORECASE) for pattern in NOT_CONFIGURED):
            raise UserError(
                f"SLURM is installed here, but this machine is not set up to talk to a cluster ({printable(words)}). Log in "
                f"to the cluster, set SLURM_CONF, or use --cluster local or inline"
            )
        raise RunFailure(f"{' '.join(command[:3])}: {printable(words)}")
    return done.stdout


def queued() -> dict[str, JobState]:
    """The user's jobs that wait, run, or ended a few minutes ago, by id (``12`` or ``12_3``)."""
    fields = "%i|%T|%r|%N|%M"
    text = run(["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", f"--format={fields}"])
    found = {}
    for line in text.splitlines():
        job, state, reason, node, elapsed = line.strip().split("|")
        found[job] = JobState(state, "" if reason == "None" else reason, node, _seconds(elapsed))
    return found


def accounted(jobs: Iterable[str]) -> dict[str, JobState]:
    """States from accounting (sacct) of jobs that squeue no longer lists; empty without accounting."""
    ids = sorted({job.split("_")[0] for job in jobs}, key=int)
    if not ids:
        return {}
    try:
        text = run(
            ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}"]
            + ["--format=JobID,State,ExitCode,NodeList,ElapsedRaw"]
        )
    except UserError:
        return {}
    except RunFailure as error:
        if "disabled" not in str(error):
            say(f"accounting does not answer, so jobs that the queue has forgotten are judged by their files: {error}")
        return {}
    found = {}
    for line in text.splitlines():
        job, state, code, node, elapsed = line.split("|")
        state, _, by = state.partition(" ")  # "CANCELLED by 1000"
        reason = by or (f"exit code {code.split(':')[0]}" if state == "FAILED" else "")
        found[job] = JobState(state, reason, node, int(elapsed or 0))
    return found


def state_of(job: str) -> str | None:
    """A job's current state from the controller, or None if it does not answer or does not know the job."""
    try:
        text = run(["scontrol", "show", "job", job])
    except (UserError, RunFailure):
        return None
    match = re.search(r"JobState=(\w+)", text)
    return match.group(1) if match else None


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs, waiting or running."""
    ids = list(jobs)
    if ids:
        run(["scancel", *ids])


def cancel_named(names: Sequence[str]) -> None:
    """Cancel the user's jobs of these names."""
    run(["scancel", f"--user={getpass.getuser()}", f"--name={','.join(names)}"])


def largest_array() -> int:
    """Largest number of tasks in an array; 1000 if SLURM's configuration does not say."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", run(["scontrol", "show", "config"]), re.MULTILINE)
    return max(int(match.group(1)) - 1, 1) if match else 1000


def _seconds(elapsed: str) -> int:
    """``1-02:03:04``, ``2:03:04`` or ``3:04`` as seconds."""
    days, _, clock = elapsed.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + (int(part) if part.isdigit() else 0)
    return total + 86400 * int(days or 0)
