"""What a launch leaves when something fails in the middle, and what status says of odd jobs; SLURM's commands are faked."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from rich.console import Console
from submitit.core.job_environment import SignalHandler

from mixmask.engine.errors import RunFailure, UserError
from mixmask.engine.progress import say
from mixmask.launch.commands.app import app
from mixmask.launch.slurm import slurm_cli, submission
from mixmask.launch.slurm.attempts import Attempts, Place
from mixmask.launch.slurm.jobs import CellJob
from mixmask.launch.slurm.profile import Profile
from mixmask.launch.suite import launching, manifest
from mixmask.launch.suite import status as states
from mixmask.launch.suite.overview import cells
from tests.launch.fake_slurm import FakeSlurm, fake
from tests.launch.small import KNN, MIXMASK, RANDOM, found, launch, profile, write_suite
from tests.launch.test_jobs import Work, events, given, in_slurm, job, start

__all__ = ["fake", "in_slurm", "job"]

GRID = {"pretrain": [RANDOM, MIXMASK], "transfer": [KNN]}


def refuse_to_cancel(fake: FakeSlurm) -> None:
    (fake.folder / "scancel").write_text("#!/bin/sh\necho 'scancel: error: slurmctld does not answer' >&2; exit 1\n")


def test_what_cannot_be_cancelled_is_not_forgotten(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    fake.refuse(3, "Invalid account")
    refuse_to_cancel(fake)
    with pytest.raises(RunFailure, match=r"refuses small\.finish"):
        launch(suite, runs, profile())
    newest = manifest.latest(runs, "small")
    assert newest.jobs == ("1", "2")
    assert "`mixmask cancel small` tries again" in capsys.readouterr().err
    fake.queue(_1_0="RUNNING|None|n1|0:10", _1_1="RUNNING|None|n1|0:10", _2_0="PENDING|Dependency||0:00",
               _2_1="PENDING|Dependency||0:00")  # fmt: skip
    assert {one.state for one in found(runs).values()} == {"running", "pending"}
    (fake.folder / "refuse").unlink()
    assert launch(suite, runs, profile())  # nothing is submitted twice: the tables' job alone is new
    assert len(fake.submitted) == 4
    (fake.folder / "scancel").write_text('#!/bin/sh\necho "$@" >> "$FAKE/cancelled"\n')
    assert states.cancel(list(manifest.launches(runs, "small"))) == ["1", "2"]


def test_an_error_after_the_last_sbatch_forgets_nothing(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(message: str) -> None:
        if message.startswith("submitted finish"):
            raise BrokenPipeError

    monkeypatch.setattr(submission, "say", broken)
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    with pytest.raises(BrokenPipeError):
        launch(suite, runs, profile())
    assert manifest.latest(runs, "small").finish_job == "3"
    assert fake.cancelled == []


@pytest.mark.slow
def test_nobody_listening_ends_nothing() -> None:
    """As in ``mixmask launch … 2>&1 | head``."""
    program = (
        "from mixmask.engine.progress import say\nfor n in range(100000): say('x' * 80)\nprint('through', flush=True)"
    )
    done = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stderr is not None
    assert done.stdout is not None
    done.stderr.readline()
    done.stderr.close()
    assert done.stdout.read() == "through\n"
    assert done.wait(30) == 0
    say("here")


NOT_CONFIGURED = (
    "squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
    "squeue: error: fetch_config: DNS SRV lookup failed\n"
    "squeue: fatal: Could not establish a configuration source"
)


def test_slurm_that_is_installed_and_not_configured_is_said(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake.folder / "squeue").write_text(f"#!/bin/sh\necho '{NOT_CONFIGURED}' >&2; exit 1\n")
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    with pytest.raises(UserError, match=r"installed here, but this machine is not set up.*--cluster local or inline"):
        launch(suite, runs, profile())
    app(["launch", str(suite), "--dry-run", "--runs", str(runs)], standalone_mode=False)
    shown = capsys.readouterr()
    assert "already queued jobs are not known" in shown.err
    assert "#SBATCH --dependency='aftercorr:<pretrain>'" in shown.out  # a dry run needs no squeue
    (fake.folder / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    with pytest.raises(RunFailure, match="Unable to contact slurm controller"):
        launch(suite, runs, profile())


def test_a_watched_table_outlives_a_silent_squeue(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    assert launch(suite, runs, profile())
    waiting = {"_1_0": "PENDING|Priority||0:00", "_1_1": "PENDING|Priority||0:00"}
    fake.queue(**waiting)
    answers = iter(["fail", "fail", "gone"])

    def sleep(seconds: float) -> None:
        if next(answers) == "fail":
            (fake.folder / "squeue").write_text("#!/bin/sh\necho 'slurmctld is busy' >&2; exit 1\n")
        else:
            (fake.folder / "squeue").write_text("#!/bin/sh\nexit 0\n")

    monkeypatch.setattr("mixmask.launch.commands.suites.time", SimpleNamespace(sleep=sleep, strftime=time.strftime))
    app(["status", "small", "--watch", "1", "--runs", str(runs)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "4 cancelled" in shown  # the last look, after two failures


def test_a_short_screen_shows_what_runs_and_what_has_failed_first(
    fake: FakeSlurm, tmp_path: Path, shapes: Path
) -> None:
    many = [{**MIXMASK, "seeds": list(range(12))}]
    suite, runs = write_suite(tmp_path, [{"pretrain": many}], shapes), tmp_path / "runs"
    assert launch(suite, runs, profile())
    fake.queue(**{f"_1_{n}": "PENDING|Priority||0:00" for n in range(9)}, _1_9="RUNNING|None|n1|0:01",
               _1_10="SUSPENDED|None|n1|0:01", _1_11="FAILED|NonZeroExitCode|n1|0:01")  # fmt: skip
    newest = manifest.latest(runs, "small")
    told = states.status(newest)
    assert {one.state for one in told} == {"pending", "running", "suspended", "failed"}
    screen = io.StringIO()
    Console(file=screen, width=160).print(cells(newest, told, rows=13, remark="not asked"))
    text = screen.getvalue()
    for word in ("running", "failed", "suspended", "… and 9 more cells", "not asked"):
        assert word in text
    assert text.count("for its turn") == 0


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("slurmstepd: error: execve(): apptainer: No such file or directory\nsrun: error: n1: task 0: Exited with code 2\n",
         "slurmstepd: error: execve(): apptainer: No such file or directory"),
        ("/opt/python: No module named submitit\nsrun: error: n1: task 0: Exited with exit code 1\n",
         "/opt/python: No module named submitit"),
        ("error: a setup line of the profile failed: module load cuda\nsrun: error: n1: tasks 0-3: Killed\n",
         "error: a setup line of the profile failed: module load cuda"),
        ("error: \x1b[31mred\x1b[0m\n", "error: \\x1b[31mred\\x1b[0m"),
    ],
)  # fmt: skip
def test_the_cause_of_an_end_is_said_not_the_launchers_noise(log: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)
    assert states.last_error(str(tmp_path / "log")) == cause


def test_a_signal_after_the_work_queues_nothing_again(
    job: CellJob, in_slurm: SignalHandler, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(None)
    job = given(job, work)
    start(job, in_slurm)
    assert events(job) == ["started", "done"]
    assert job.checkpoint() is None
    assert events(job) == ["started", "done"]
    assert not (fake.folder / "requeued").exists()


def test_a_folder_that_cannot_be_written_is_a_message(
    job: CellJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Attempts, place: Place, event: str, message: str = "") -> None:
        raise UserError(f"{self.file.parent}: cannot be written (Read-only file system)")

    monkeypatch.setattr(Attempts, "write", refuse)
    with pytest.raises(SystemExit) as end:
        job()
    assert end.value.code == 2
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["A B", "X;touch /tmp/x", "1X", "", "$(id)", "A=B", "X\nY"])
def test_a_profiles_variables_have_names_that_no_shell_carries_out(name: str) -> None:
    with pytest.raises(ValidationError, match="environment"):
        Profile.model_validate({"environment": {name: "1"}})
    assert Profile.model_validate({"environment": {"_OK_1": "a b"}}).setup_lines(Path("/s"))[0] == "export _OK_1='a b'"


def test_a_failing_setup_line_ends_the_job(tmp_path: Path) -> None:
    def run(**keys: object) -> subprocess.CompletedProcess[str]:
        lines = Profile.model_validate({"setup": ["true", "no-such-command --x", "echo after"], **keys}).setup_lines(
            tmp_path
        )
        script = "#!/bin/bash\n" + "\n".join([*lines, "echo python"])
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True)

    done = run()
    assert done.returncode == 127
    assert done.stdout == ""
    assert "error: a setup line of the profile failed: no-such-command --x" in done.stderr
    done = run(setup_may_fail=True)
    assert (done.returncode, done.stdout) == (0, "after\npython\n")
    local = Profile.model_validate({"setup": ["no-such-command"], "setup_may_fail": True})
    line = " && ".join([*local.setup_lines(tmp_path, batch_script=False), "echo python"])
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True).stdout == "python\n"


def test_states_of_the_queue_that_is_not_asked_twice() -> None:
    assert slurm_cli.JobState("SUSPENDED").is_active
    assert launching.LARGEST_ARRAY == 1000
