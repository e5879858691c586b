"""What is submitted to SLURM and what a refusal leaves, with its commands faked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mixmask.engine.errors import RunFailure, UserError
from mixmask.launch.commands.app import app
from mixmask.launch.slurm import slurm_cli, submission
from mixmask.launch.slurm.attempts import Attempts, Place
from mixmask.launch.suite import launching, manifest
from mixmask.launch.suite import status as states
from mixmask.launch.suite.suite import load_suite
from tests.launch.fake_slurm import FakeSlurm, fake
from tests.launch.small import KNN, MIXMASK, RANDOM, found, launch, profile, write_suite

__all__ = ["fake"]

GRID = {"pretrain": [RANDOM, MIXMASK], "transfer": [KNN]}


def header(script: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    return {name: value.strip("'") for name, value in lines}


def finish(runs: Path, names: list[str]) -> None:
    """Make cells look finished."""
    for cell in manifest.latest(runs, "small").cells:
        if cell.name in names:
            for file in cell.done:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"headlines": {"knn/top1": "kNN top-1"}, "metrics": {"knn/top1": 12.3}}))


def test_arrays_dependencies_and_what_they_start(fake: FakeSlurm, tmp_path: Path, shapes: Path) -> None:
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    assert launch(suite, runs, profile(partition="gpu", array_parallelism=1, container="enroot start x.sqsh"))
    pretrain, knn, last = fake.submitted
    assert header(pretrain)["array"] == "0-1%1"
    assert header(pretrain)["partition"] == "gpu"
    assert header(pretrain)["kill-on-invalid-dep"] == "yes"
    assert "requeue" in header(pretrain)
    assert header(knn)["dependency"] == "aftercorr:1"
    assert header(last)["dependency"] == "afterany:1:2"
    newest = manifest.latest(runs, "small")
    assert newest.snapshot is not None
    assert header(pretrain)["chdir"] == str(newest.snapshot)
    assert f"export PYTHONPATH='{newest.snapshot}'" in pretrain or f"export PYTHONPATH={newest.snapshot}" in pretrain
    assert " enroot start x.sqsh " in pretrain
    assert (newest.snapshot / "mixmask" / "launch" / "slurm" / "jobs.py").is_file()
    assert (newest.snapshot / "mixmask" / "configs" / "demo" / "knn.yaml").is_file()
    assert [cell.job for cell in newest.cells] == ["1_0", "1_1", "2_0", "2_1"]
    srun = next(line for line in pretrain.splitlines() if line.startswith("srun "))
    assert " --cpus-per-task=1 " in srun  # it forgets what sbatch was told


def test_what_is_queued_or_finished_is_not_submitted_again(fake: FakeSlurm, tmp_path: Path, shapes: Path) -> None:
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    assert launch(suite, runs, profile())
    fake.queue(_1_0="COMPLETED|None|n1|1:00", _1_1="RUNNING|None|n1|1:00", _2_1="PENDING|Dependency||0:00")
    finish(runs, ["random"])
    assert launch(suite, runs, profile())
    again = fake.submitted[3:]
    assert len(again) == 2  # the one kNN whose backbone is there, and the tables
    assert "array" not in header(again[0])
    assert "dependency" not in header(again[0])
    assert header(again[1])["dependency"] == "afterany:1_1:2_1:4"
    cells = {cell.name: cell.job for cell in manifest.latest(runs, "small").cells}
    assert cells == {"random": None, "mixmask": "1_1", "random-knn": "4", "mixmask-knn": "2_1"}

    fake.queue(_2_1="PENDING|Dependency||0:00")  # its backbone's job has died, which SLURM has not noticed yet
    assert launch(suite, runs, profile())
    assert fake.cancelled == ["2_1"]
    assert {cell.name: cell.job for cell in manifest.latest(runs, "small").cells}["mixmask"] == "6"
    fake.queue(_6="RUNNING|None|n1|1:00")  # another suite wants what is being made, and its kNN under another name
    other = write_suite(tmp_path / "other", [{"pretrain": [MIXMASK], "transfer": [{**KNN, "set": {"k": 4}}]}], shapes)
    assert launch(other, runs, profile())
    assert header(fake.submitted[-2])["dependency"] == "afterok:6"


def test_the_third_refusal_cancels_the_first_two(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    fake.refuse(3, "Invalid account or account/partition combination specified")
    with pytest.raises(RunFailure, match=r"(?s)refuses small\.finish: .*Invalid account.*#SBATCH --account=nobody"):
        launch(suite, runs, profile(account="nobody"))
    assert fake.cancelled[:2] == ["1", "2"]
    assert not list(manifest.launches(runs))
    names = [header(script)["job-name"] for script in fake.submitted]
    assert fake.cancelled[-1] == f"--name={','.join(names)}"  # one that sbatch took without saying so goes, too
    assert "cancelled what had been submitted: pretrain (job 1), knn (job 2)" in capsys.readouterr().err


def test_without_slurm_and_without_a_place_to_write(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = write_suite(tmp_path, [GRID], shapes)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder of runs cannot be written"):
        launch(suite, tmp_path / "file" / "runs", profile())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"squeue: not found.*--cluster local"):
        launch(suite, tmp_path / "runs", profile())
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_marker_that_is_not_seen(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = write_suite(tmp_path, [GRID], shapes)
    fake.queue(_1="COMPLETED|None|n4|0:01")
    monkeypatch.setattr(submission, "APPEARING_SECONDS", 1)
    with pytest.raises(UserError, match=r"completed on n4\), and the file .* is not seen here"):
        launch(suite, tmp_path / "runs", profile(shared_check_s=30))
    assert len(fake.submitted) == 1
    assert "array" not in header(fake.submitted[0])
    fake.queue(_2="PENDING|Priority||0:00")  # a full cluster: the check gives up and says so
    (fake.folder / "count").write_text("1")
    assert launch(suite, tmp_path / "runs", profile(shared_check_s=1))
    assert "2" in fake.cancelled


def test_large_arrays_are_split_where_slurm_s_limit_is(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LIMIT", "3")
    many = {"pretrain": [{**RANDOM, "seeds": list(range(5))}], "transfer": [KNN]}
    assert launch(write_suite(tmp_path, [many], shapes), tmp_path / "runs", profile())
    assert [header(script).get("array") for script in fake.submitted] == [
        "0-1%2",
        "0-1%2",
        "0-1%2",
        "0-1%2",
        None,
        None,
        None,
    ]
    assert [header(script).get("dependency") for script in fake.submitted][1::2] == [
        "aftercorr:1",
        "aftercorr:3",
        "afterok:5",
    ]


def test_a_dry_run_shows_everything_and_writes_nothing(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str], fake: FakeSlurm
) -> None:
    suite = write_suite(tmp_path, [GRID], shapes, resources={"pretrain": {"gpus_per_node": 4, "time_min": 90}})
    app(["launch", str(suite), "--dry-run", "--runs", str(tmp_path / "runs"), "set.knn.k=7"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "4 cells, 0 finished, 0 queued or running, 4 to do in 2 arrays" in shown
    assert "each after its own cell of pretrain" in shown
    assert "asked for at most 12 GPU-hours" in shown
    assert "#SBATCH --dependency='afterany:<pretrain>:<knn>'" in shown
    assert "#SBATCH --gpus-per-node=4" in shown
    assert "#SBATCH --dependency='aftercorr:<pretrain>'" in shown
    assert not (tmp_path / "runs").exists()
    assert fake.submitted == []


def test_states_with_accounting_and_without(fake: FakeSlurm, tmp_path: Path, shapes: Path) -> None:
    four = [{**MIXMASK, "seeds": [0, 1, 2, 3]}]
    suite, runs = write_suite(tmp_path, [{"pretrain": four, "transfer": [KNN]}], shapes), tmp_path / "runs"
    assert launch(suite, runs, profile())
    fake.queue(
        _1_0="RUNNING|None|n1|1-00:10:00", _1_1="PENDING|Priority||0:00", _2_0="PENDING|Dependency||0:00",
        _2_3="CANCELLED|DependencyNeverSatisfied||0:00",
    )  # fmt: skip
    cells = found(runs)
    running = Path(cells["mixmask_seed-0"].run)
    assert cells["mixmask_seed-0"].state == "running"  # for a day, and nothing of it is seen here
    assert "is that folder shared?" in cells["mixmask_seed-0"].detail
    write = Attempts(running / "attempts.jsonl").write
    write(Place("slurm", "1_0", 0, "/x/log"), "started")
    line = {"step": 300, "of": 1000, "seconds": 600.0, "images_per_second": 1240.4}
    (running / "log.jsonl").write_text(json.dumps(line) + "\n" + '{"step": 3')
    assert found(runs)["mixmask_seed-0"].detail == "30 % · 1,240 images/s · 23 min left"
    assert cells["mixmask_seed-1"].detail == "for its turn"
    assert cells["mixmask_seed-0-knn"].detail == f"for {cells['mixmask_seed-0'].cell}"
    assert cells["mixmask_seed-2"].state == "cancelled"
    assert "gone from the queue" in cells["mixmask_seed-2"].detail

    killed = Attempts(Path(cells["mixmask_seed-2"].run) / "attempts.jsonl")
    log = tmp_path / "log"
    log.write_text("step 3\nsrun: error: n1: task 0: Killed\nslurmstepd-n1: error: *** STEP FAILED ***\n")
    killed.write(Place("slurm", "1_2", 0, str(log)), "started")
    cells = found(runs)
    assert (cells["mixmask_seed-2"].state, cells["mixmask_seed-2"].detail) == (
        "failed",
        "srun: error: n1: task 0: Killed",
    )
    (fake.folder / "accounting").write_text(
        "1_2|OUT_OF_MEMORY|0:125|n1|17\n1_3|CANCELLED by 1000|0:0|None|0\n2_2|CANCELLED|0:0|None|0\n"
    )
    cells = found(runs)
    assert cells["mixmask_seed-2"].detail == "out of memory: srun: error: n1: task 0: Killed"
    assert cells["mixmask_seed-3"].state == "cancelled"
    assert cells["mixmask_seed-2-knn"].detail == f"because {cells['mixmask_seed-2'].cell} failed"

    finish(runs, ["mixmask_seed-3-knn"])
    assert found(runs)["mixmask_seed-3-knn"].detail == "knn/top1 12.30"
    killed.write(Place("slurm", "1_2", 0, str(log)), "stopped")
    fake.queue(_1_2="PENDING|BeginTime||0:00")
    assert found(runs)["mixmask_seed-2"].requeues == 1


def test_the_table_cancel_and_logs(
    fake: FakeSlurm, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    at = ["--runs", str(runs)]
    with pytest.raises(UserError, match="'small' has not been launched from this folder"):
        app(["status", "small", *at], standalone_mode=False)
    assert launch(suite, runs, profile())
    with pytest.raises(UserError, match="Launched suites: small"):
        app(["status", "smal", *at], standalone_mode=False)
    fake.queue(
        _1_0="RUNNING|None|n1|0:10",
        _1_1="PENDING|Resources||0:00",
        _3="PENDING|Dependency||0:00",
        _9="RUNNING|None|n1|0:10",
    )
    app(["status", str(suite), *at], standalone_mode=False)
    table = capsys.readouterr().out
    for state in ("1 running", "1 pending", "2 cancelled"):
        assert state in table.splitlines()[0]
    with pytest.raises(UserError, match=r"running, and there is no log yet"):
        app(["logs", "pretrain/random", *at], standalone_mode=False)
    with pytest.raises(UserError, match=r"'knn' fits several cells; name one:\ntransfer/mixmask-knn-"):
        app(["logs", "knn", *at], standalone_mode=False)
    with pytest.raises(UserError, match="no cell's id contains 'nothing'"):
        app(["logs", "nothing", *at], standalone_mode=False)
    log = manifest.latest(runs, "small").cells[0].log
    assert log is not None
    log.write_text("one\ntwo\nthree\n")
    app(["logs", "pretrain/random", "--lines", "2", *at], standalone_mode=False)
    assert capsys.readouterr().out == "two\nthree\n"
    app(["cancel", "small", *at], standalone_mode=False)
    assert fake.cancelled == ["1", "3"]  # not job 9, which is someone else's


def test_what_squeue_says_is_read(fake: FakeSlurm) -> None:
    fake.queue(_7="RUNNING|None|n[1-2]|2-03:04:05", _8_11="PENDING|(Dependency)||0:00")
    told = slurm_cli.queued()
    assert told["7"] == slurm_cli.JobState("RUNNING", "", "n[1-2]", ((2 * 24 + 3) * 60 + 4) * 60 + 5)
    assert told["8_11"].is_active
    assert slurm_cli.largest_array() == 1000
    assert slurm_cli.state_of("7") is None
    (fake.folder / "job").write_text("JobId=7 JobName=x\n   JobState=COMPLETING Reason=None\n")
    assert slurm_cli.state_of("7") == "COMPLETING"


def test_words_for_durations_and_ends(tmp_path: Path) -> None:
    assert [states.duration(s) for s in (4, 60, 7500, 200000)] == ["4 s", "1 min", "2 h 05 min", "2 days"]
    log = tmp_path / "log"
    for text, said in (
        ("a\nerror: no data\nsrun: error: n1: task 0: Exited with exit code 2\n", "error: no data"),
        ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory\nsrun: x\n", "torch.OutOfMemoryError: CUDA out of memory"),
        ("slurmstepd: Detected 1 oom-kill\nsrun: error: n1: task 0: Killed\n", "slurmstepd: Detected 1 oom-kill"),
        ("only this\n\n", "only this"),
        ("", ""),
    ):  # fmt: skip
        log.write_text(text)
        assert states.last_error(str(log)) == said
    assert states.last_error(str(tmp_path / "none")) == ""


def test_plan_of_a_finished_suite(fake: FakeSlurm, tmp_path: Path, shapes: Path) -> None:
    suite, runs = write_suite(tmp_path, [GRID], shapes), tmp_path / "runs"
    assert launch(suite, runs, profile())
    finish(runs, ["random", "mixmask", "random-knn", "mixmask-knn"])
    plan = launching.make_plan(load_suite(suite), suite.parent, profile(), "slurm", runs, True)
    assert plan.arrays == ()
    assert "GPU-hours" not in plan.describe()
