"""``mixmask status``: the state of every cell of a suite, from the run directories and SLURM's queue."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mixmask.engine.errors import UserError, listed
from mixmask.engine.ownership import describe_owner, read_owner, seems_alive
from mixmask.engine.storage import RunDirectory, last_lines
from mixmask.engine.wording import printable
from mixmask.launch.slurm import slurm_cli
from mixmask.launch.slurm.attempts import Attempts
from mixmask.launch.slurm.slurm_cli import JobState
from mixmask.launch.suite.manifest import Launch, LaunchedCell

State = Literal["done", "running", "pending", "suspended", "failed", "cancelled", "stopped", "not started"]
FIRST = ("running", "failed", "suspended", "stopped", "cancelled", "pending", "not started", "done")  # shown first
COLOURS = {
    "done": "green",
    "suspended": "yellow",
    "running": "cyan",
    "pending": "yellow",
    "failed": "red",
    "cancelled": "magenta",
}
UNSEEN_SECONDS = 60  # a job that runs longer without leaving a trace here does not share this folder
CAUSES = (  # log lines that say why a job ended, the most informative first
    r"^(error|failed): ",
    r"execve\(\): ",  # srun could not start the program: no such container, no such Python
    r": No module named ",
    r"^[\w.]*(Error|Exception|Interrupt)\b",
    r"(?i)oom-kill|out of memory",
    r"^srun: error: .*: tasks? [\d,-]+: (?!Exited with|Terminated)",
    r"^slurmstepd.*\*\*\*",
)


@dataclass(frozen=True)
class CellStatus:
    """The state of a cell.

    Attributes:
        cell: The cell's id.
        recipe: Name that all seeds of its recipe share.
        seeds: Its seed; empty if the recipe has a single one.
        stage: pretrain, convert or transfer.
        state: What `State` lists.
        detail: Progress, the reason for waiting, the last error line, or the headline metric.
        requeues: Number of requeues of its job.
        job: Its SLURM job.
        log: The log of its first process.
        run: The run directory.
    """

    cell: str
    recipe: str
    seeds: str
    stage: str
    state: State
    detail: str
    requeues: int
    job: str | None
    log: str | None
    run: str


def status(launch: Launch) -> list[CellStatus]:
    """The state of every cell of a launch.

    Raises:
        UserError: If SLURM's commands are not installed on this machine.
        RunFailure: If SLURM does not answer.
    """
    states: dict[str, JobState] = {}
    if launch.cluster == "slurm" and any(not cell.is_finished for cell in launch.cells):
        states = slurm_cli.queued()
        unknown = [c.job for c in launch.cells if not c.is_finished and c.job is not None and c.job not in states]
        # sacct answers for whole arrays; for tasks that are in the queue as well, the queue is right.
        states = slurm_cli.accounted(unknown) | states
    found: dict[str, CellStatus] = {}
    for cell in launch.cells:
        found[cell.id] = _status(cell, launch, states, found)
    return list(found.values())


def _status(
    cell: LaunchedCell, launch: Launch, states: Mapping[str, JobState], before: Mapping[str, CellStatus]
) -> CellStatus:
    attempts = Attempts(RunDirectory(cell.run).attempts_file)
    lines = attempts.read()
    log = next((line["log"] for line in reversed(lines) if line.get("log")), None)
    log = log or (str(cell.log) if cell.log is not None else None)
    state, detail = _state(cell, launch, states, before, lines, log)
    starts = attempts.starts(cell.job) if cell.job is not None else 0
    # A pending job that has started before is waiting for its next start.
    requeues = starts if state == "pending" else max(starts - 1, 0)
    return CellStatus(
        cell.id, cell.recipe, cell.seeds, cell.stage, state, detail, requeues, cell.job, log, str(cell.run)
    )


def _state(
    cell: LaunchedCell,
    launch: Launch,
    states: Mapping[str, JobState],
    before: Mapping[str, CellStatus],
    lines: Sequence[Mapping[str, Any]],
    log: str | None,
) -> tuple[State, str]:
    if cell.is_finished:
        return "done", headline(cell)
    job = states.get(cell.job) if cell.job is not None else None
    mine = [line for line in lines if line["job"] == cell.job] if cell.job is not None else list(lines)
    if job is not None and job.state == "PENDING":
        waits = {"Dependency": f"for {cell.parent}" if cell.parent else "", "Priority": "for its turn"}
        return "pending", waits.get(job.reason, job.reason)
    if job is not None and job.is_active:
        if job.state == "SUSPENDED":
            return "suspended", progress(cell.run)
        if job.state not in ("RUNNING", "COMPLETING"):
            return "pending", job.state.lower().replace("_", " ")
        if not (launch.folder / "started" / str(cell.job)).exists() and job.seconds > UNSEEN_SECONDS and not mine:
            return "running", f"on {job.node}, but its files are not seen in {launch.folder}: is that folder shared?"
        return "running", progress(cell.run)
    owner = read_owner(RunDirectory(cell.run).owner_file)
    # No SLURM job, but a living process works on the run: local, inline or started by hand.
    if job is None and owner is not None and seems_alive(RunDirectory(cell.run).owner_file):
        return "running", f"{progress(cell.run)} ({describe_owner(owner)})".strip()
    parent = before.get(cell.parent) if cell.parent is not None else None
    if job is not None and job.state == "CANCELLED":
        if parent is not None and parent.state not in ("done", "running", "pending", "suspended"):
            return "cancelled", f"because {parent.cell} {parent.state}"
        return "cancelled", ""
    last = mine[-1] if mine else None
    if last is not None:
        how = f"{job.state.lower().replace('_', ' ')}: " if job is not None and job.state != "FAILED" else ""
        if last["event"] == "failed":
            return "failed", how + (last.get("message") or last_error(log))
        if last["event"] == "done":
            return "failed", f"ended well, but {', '.join(map(str, cell.done))} is not seen here"
        if last["event"] == "stopped":
            at = progress(cell.run)
            return "stopped", f"{how}{at}{'; ' if at else ''}launch the suite again to resume"
        return "failed", how + (last_error(log) or "ended without a word, as if killed or out of memory")
    if job is not None:
        where = f" on {job.node}" if job.node else ""
        return "failed", f"{job.state.lower()}{where} {job.reason}: {last_error(log) or f'left nothing in {cell.run}'}"
    if parent is not None and parent.state not in ("done", "running", "pending", "suspended"):
        return "cancelled" if cell.job is not None else "not started", f"because {parent.cell} {parent.state}"
    if cell.job is not None:
        return "cancelled", "its job is gone from the queue and has left nothing"
    return "not started", ""


def headline(cell: LaunchedCell) -> str:
    """The headline metric of a finished cell, such as ``knn/top1 68.30``, or the file name of a conversion."""
    if cell.stage == "convert":
        return cell.done[0].name
    try:
        document = json.loads(cell.done[0].read_text(encoding="utf-8"))
        if "headlines" not in document:  # of an earlier version; the module needs torch, whose import takes seconds
            from mixmask.engine.records import migrated

            document = migrated(document)
        metrics = document["metrics"]
        return next((f"{printable(name)} {metrics[name]:.2f}" for name in document["headlines"] if name in metrics), "")
    except (OSError, ValueError, KeyError, TypeError):
        return f"damaged: {cell.done[0]}"


def progress(run: Path) -> str:
    """``37 % · 1,240 images/s · 2 h 05 min left`` from the end of a run's log; empty before its first line."""
    for line in reversed(last_lines(RunDirectory(run).log_file)):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"step", "of", "seconds"} <= entry.keys() and entry["step"]:
            left = (entry["of"] - entry["step"]) * entry["seconds"] / entry["step"]
            rate = f" · {entry['images_per_second']:,.0f} images/s" if "images_per_second" in entry else ""
            return f"{100 * entry['step'] // entry['of']} %{rate} · {duration(left)} left"
    return ""


def duration(seconds: float) -> str:
    """Seconds as text: ``20 s``, ``5 min``, ``2 h 05 min``, ``3 days``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 48 * 60 else f"{minutes // 1440} days"


def last_error(log: str | None) -> str:
    """The log line that best explains the end: the last one with the first of `CAUSES` found, else the last line."""
    if log is None:
        return ""
    lines = [printable(line.strip()) for line in last_lines(Path(log))]
    for pattern in CAUSES:
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            return found[-1]
    return next((line for line in reversed(lines) if line), "")


def as_json(suite: str, found: Sequence[CellStatus]) -> str:
    """The states of all cells as JSON, for scripts."""
    return json.dumps({"suite": suite, "cells": [asdict(one) for one in found]}, indent=1)


def cancel(launches: Sequence[Launch]) -> list[str]:
    """Cancel all pending and running jobs of a suite, the finish job of each launch included.

    Returns:
        The ids of the cancelled jobs.

    Raises:
        UserError: If nothing of it runs on SLURM.
    """
    known = {job for launch in launches if launch.cluster == "slurm" for job in launch.jobs}
    if not known:
        raise UserError("nothing to cancel: the suite has no job on SLURM")
    states = slurm_cli.queued()
    active = sorted(
        {job.split("_")[0] for job, state in states.items() if state.is_active and job.split("_")[0] in known},
        key=int,
    )
    slurm_cli.cancel(active)
    return active


def find_cell(launches: Sequence[Launch], wanted: str) -> tuple[Launch, LaunchedCell]:
    """Find a cell by its id, job, run directory, or a part of its id or name; ``launches`` are newest first.

    Raises:
        UserError: If none or several do; they are listed.
    """
    found: dict[str, tuple[Launch, LaunchedCell]] = {}
    for launch in launches:
        for cell in launch.cells:
            if wanted in (cell.id, cell.job, str(cell.run)):
                return launch, cell
            if wanted in cell.id or wanted in cell.recipe or wanted in f"{cell.stage}/{cell.name}":
                found.setdefault(cell.id, (launch, cell))
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise UserError(f"no cell's id contains '{wanted}'; `mixmask status SUITE --cells` lists them")
    raise UserError(f"'{wanted}' fits several cells; name one:", *listed(sorted(found), 20))
