"""What a job does: once, again, when it is stopped, when it fails, and how often."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmJobEnvironment

from mixmask.engine.config import Recipe
from mixmask.engine.errors import ConfigError, Interrupted, RunFailure
from mixmask.engine.storage import RunDirectory
from mixmask.launch.slurm import jobs
from mixmask.launch.slurm.attempts import Place
from mixmask.launch.slurm.jobs import CellJob
from mixmask.launch.slurm.snapshot import freeze
from mixmask.launch.suite import manifest
from mixmask.launch.suite import summary as finishing
from tests.launch.fake_slurm import FakeSlurm, fake

__all__ = ["fake"]


class Anything(Recipe):
    x: int = 1


class Work:
    """Stands for training: does what it is told, and counts."""

    def __init__(self, *ends: BaseException | None) -> None:
        self.ends, self.count = list(ends), 0

    def __call__(self, done: tuple[Path, ...]) -> None:
        self.count += 1
        end = self.ends.pop(0)
        if end is not None:
            raise end
        for file in done:
            file.write_text("{}")


def given(job: CellJob, work: Callable[[tuple[Path, ...]], object]) -> CellJob:
    """The job with other work."""
    return replace(job, work=partial(work, job.done))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CellJob:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "pretrain" / "x-1"
    return CellJob("pretrain/x-1", lambda: None, run, (run / "record.json",), tmp_path, tmp_path / "started", 2)


@pytest.fixture
def in_slurm(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SignalHandler:
    """This process as task 0 of job 12_3, with submitit's handler in place; ``requeued`` in the folder notes requeues."""
    (fake.folder / "scontrol").write_text(
        '#!/bin/sh\nif [ "$1" = requeue ]; then echo "$2" >> "$FAKE/requeued"; else cat "$FAKE/job"; fi\n'
    )
    (fake.folder / "job").write_text("JobState=RUNNING")
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path / "jobs"),
        "SLURM_JOB_ID": "15",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "jobs").mkdir()
    return SignalHandler(SlurmJobEnvironment(), JobPaths(tmp_path / "jobs", "12_3", 0), DelayedSubmission(print))


def start(job: CellJob, handler: SignalHandler, max_num_timeout: int = 5) -> None:
    """As submitit starts it on a node."""
    delayed = DelayedSubmission(job)
    delayed.set_timeout(60, max_num_timeout)
    handler._delayed = delayed
    before = signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
    try:
        delayed.result()
    finally:
        signal.signal(signal.SIGUSR2, before)


def events(job: CellJob) -> list[str]:
    return [line["event"] for line in job.attempts.read()]


def test_a_finished_cell_ends_at_once(job: CellJob, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(None)
    job = given(job, work)
    job()
    job()
    assert work.count == 1
    assert events(job) == ["started", "done"]
    assert pickle.loads(pickle.dumps(job)) == job


def test_a_stopped_job_is_queued_again_by_submitit(
    job: CellJob, in_slurm: SignalHandler, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(Interrupted("stopped at step 3", signal.SIGUSR2), SystemExit(128 + signal.SIGTERM), None)
    job = given(job, work)
    for _ in range(2):  # one process says so with an exception, several with an exit code
        with pytest.raises(SystemExit) as end:
            start(job, in_slurm)
        assert end.value.code == -1
    assert (fake.folder / "requeued").read_text() == "12_3\n12_3\n"
    again = DelayedSubmission.load(JobPaths(job.folder / "jobs", "12_3", 0).submitted_pickle)
    assert again.function == job
    start(job, in_slurm)
    assert events(job) == ["started", "stopped", "started", "stopped", "started", "done"]
    assert {line["job"] for line in job.attempts.read()} == {"12_3"}


def test_a_cancelled_or_preempted_job_does_not_queue_itself(
    job: CellJob, in_slurm: SignalHandler, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(Interrupted("stopped", signal.SIGTERM))
    job = given(job, work)
    (fake.folder / "job").write_text("JobState=COMPLETING")
    with pytest.raises(SystemExit) as end:
        start(job, in_slurm)
    assert end.value.code == 128 + signal.SIGTERM
    assert not (fake.folder / "requeued").exists()


@pytest.mark.parametrize("fails", ["busy", "absent"])
def test_a_requeue_that_fails_is_tried_again_or_said(
    job: CellJob,
    in_slurm: SignalHandler,
    fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
) -> None:
    work = Work(Interrupted("stopped", signal.SIGUSR2))
    job = given(job, work)
    monkeypatch.setattr(jobs, "REQUEUE_PATIENCE", (0, 0))
    if fails == "busy":  # once
        (fake.folder / "scontrol").write_text(
            '#!/bin/sh\n[ -e "$FAKE/tried" ] && [ "$1" = requeue ] && echo "$2" >> "$FAKE/requeued" && exit 0\n'
            'touch "$FAKE/tried"; exit 1\n'
        )
    else:
        monkeypatch.setenv("PATH", str(fake.folder.parent))
    with pytest.raises(SystemExit) as end:
        start(job, in_slurm)
    assert end.value.code == (-1 if fails == "busy" else 1)
    assert (fake.folder / "requeued").exists() == (fails == "busy")
    if fails == "absent":
        assert "saved, but scontrol cannot queue it again; launch the suite again" in capsys.readouterr().err


def test_a_job_whose_work_another_has_taken_over_is_not_queued_again(
    job: CellJob,
    in_slurm: SignalHandler,
    fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work, taken_over = Work(Interrupted("stopped", signal.SIGTERM)), threading.Event()
    taken_over.set()
    job = given(job, work)
    monkeypatch.setattr(jobs.ownership, "TAKEN_OVER", taken_over)
    with pytest.raises(SystemExit):
        start(job, in_slurm)
    assert "another job has taken it over" in capsys.readouterr().err
    assert job.attempts.read() == []  # the run is the other one's, its list of attempts, too
    assert not (fake.folder / "requeued").exists()


def test_a_record_without_its_backbone_is_said(job: CellJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        job()
    assert "record.json is missing, although" in job.attempts.read()[-1]["message"]


def test_only_the_first_process_queues_again(
    job: CellJob, in_slurm: SignalHandler, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(SystemExit(128 + signal.SIGUSR2))
    job = given(job, work)
    monkeypatch.setenv("SLURM_PROCID", "1")
    start(job, in_slurm)
    assert not (fake.folder / "requeued").exists()
    assert events(job) == []


@pytest.mark.parametrize(("timeouts", "requeues", "reason"), [(0, 9, "timed-out too many"), (9, 0, "returned None")])
def test_retries_are_bounded(
    job: CellJob,
    in_slurm: SignalHandler,
    fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    timeouts: int,
    requeues: int,
    reason: str,
) -> None:
    work = Work(Interrupted("stopped", signal.SIGUSR2))
    job = given(job, work)
    monkeypatch.setattr(SignalHandler, "has_timed_out", lambda self: True)
    job = replace(job, max_requeues=requeues)
    with pytest.raises(SystemExit) as end:
        start(job, in_slurm, max_num_timeout=timeouts)
    assert end.value.code == 1
    assert events(job) == ["started", "stopped", "failed"]
    assert reason in job.attempts.read()[-1]["message"]
    assert not (fake.folder / "requeued").exists()


def test_slurm_s_own_requeues_are_bounded_too(
    job: CellJob, in_slurm: SignalHandler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = replace(job, work=lambda: os._exit(1))
    place = Place.here()
    for _ in range(3):
        job.attempts.write(place, "started")  # and nothing more: the node was lost
    with pytest.raises(SystemExit) as end:
        start(job, in_slurm)
    assert end.value.code == 1
    assert "given up after 2 requeues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(ConfigError("no such key"), 2, "error: no such key"), (RunFailure("not finite"), 1, "failed: not finite")],
)
def test_failures_are_said_without_a_traceback(
    job: CellJob,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    work = Work(error)
    job = given(job, work)
    with pytest.raises(SystemExit) as end:
        job()
    assert end.value.code == code
    assert capsys.readouterr().err == f"{message}\n"
    assert job.attempts.read()[-1]["message"] == message


def test_an_unforeseen_error_keeps_its_traceback(job: CellJob, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(ZeroDivisionError("by zero"))
    job = given(job, work)
    with pytest.raises(ZeroDivisionError):
        job()
    assert job.attempts.read()[-1]["message"] == "ZeroDivisionError: by zero"


def test_attempts_survive_a_torn_line_and_do_not_hinder_the_run(job: CellJob) -> None:
    place = Place("slurm", "5", 0, None)
    job.attempts.write(place, "started")
    with job.attempts.file.open("a") as file:
        file.write('5\n[1]\n{"event": "do')
    assert job.attempts.starts("5") == 1
    RunDirectory(job.run).check(Anything(), "abc")


def test_the_node_s_own_disk_is_used(job: CellJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    jobs._use_local_cache("$SCRATCH/$SLURM_JOB_ID")
    assert os.environ["TMPDIR"] == str(tmp_path / "scratch" / "9" / "tmp")
    assert (tmp_path / "scratch" / "9" / "triton").is_dir()


def test_the_code_is_frozen_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmask.engine import provenance
    from mixmask.launch.slurm import snapshot

    first = freeze(tmp_path)
    assert freeze(tmp_path) == first
    assert (first / "mixmask" / "engine" / "provenance.py").read_bytes() == Path(provenance.__file__).read_bytes()
    assert not list(first.rglob("__pycache__"))
    monkeypatch.setattr(snapshot, "code", lambda: provenance.Code("abc+changes", b"diff"))
    changed = freeze(tmp_path)
    assert changed != first
    assert (changed / "COMMIT").read_text() == "abc+changes\n"
    assert (changed / "changes.patch").read_bytes() == b"diff"
    assert sorted(tmp_path.iterdir()) == sorted([first, changed])


def test_tables_name_what_is_missing(job: CellJob, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "suites" / "s" / "launches" / "1"
    cells = []
    for name, parent in (("a", None), ("b", "transfer/a"), ("c", None), ("d", None)):
        run = tmp_path / "runs" / "transfer" / name
        cells.append(
            manifest.LaunchedCell(
                id=f"transfer/{name}", stage="transfer", name=name, protocol="knn", dataset="d", seed=0,
                run=run, done=(run / "record.json",), parent=parent,
            )
        )  # fmt: skip
    place = Place("slurm", "5", 0, None)
    jobs.Attempts(cells[2].run / "attempts.jsonl").write(place, "started")
    jobs.Attempts(cells[3].run / "attempts.jsonl").write(place, "failed", "error: x\nmore")
    from datetime import datetime, timezone

    launch = manifest.Launch(
        suite="s", created=datetime.now(timezone.utc), cluster="slurm", folder=folder, commit=None, snapshot=None,
        cells=tuple(cells),
    )  # fmt: skip
    launch.write()
    text = finishing.write_results(tmp_path / "runs", "s")
    for line in (
        "0 of 4 cells are finished",
        "- transfer/a: never started",
        "- transfer/b: its backbone transfer/a is not finished",
        "- transfer/c: job 5 ended without a word, as if killed",
        "- transfer/d: error: x\n",
    ):
        assert line in text
    assert (tmp_path / "runs" / "suites" / "s" / "tables.csv").is_file()
