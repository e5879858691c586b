"""Suites on a real SLURM: arrays, dependencies, failures, refusals, relaunches, states. Skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mixmask.engine.errors import RunFailure, UserError
from mixmask.engine.records import Record
from mixmask.launch.slurm import slurm_cli, submission
from mixmask.launch.suite import manifest
from tests.launch.slurm import Slurm, wait_for
from tests.launch.small import (
    ENDLESS,
    FIRST_JOB_SECONDS,
    KNN,
    MIXMASK,
    RANDOM,
    VANILLA,
    events,
    found,
    kill_a_rank,
    launch,
    profile,
    steps,
    wait_until_over,
    write_suite,
)
from tests.processes import ROOT

pytestmark = pytest.mark.slow


def test_the_demo_suite_end_to_end_in_a_folder_with_spaces_and_quotes(
    slurm: Slurm, tmp_path: Path, shapes: Path
) -> None:
    folder = tmp_path / 'Ann\'s "big" suite; $HOME'
    runs = folder / "all runs"
    suite = write_suite(
        folder,
        [
            {
                "pretrain": [RANDOM, MIXMASK],
                "convert": {"to": ["detectron2"]},
                "transfer": [{"demo": "knn", "name": "knn", "seeds": [0, 1]}],
            }
        ],
        shapes,
    )
    assert launch(suite, runs, profile())
    newest = manifest.latest(runs.resolve(), "small")
    headers = {file.parent.name: file.read_text() for file in (newest.folder / "jobs").glob("*/*_submission.sh")}
    assert headers.keys() == {"pretrain", "convert", "knn", "knn-2", "finish"}
    assert all("--array=0-1" in headers[name] for name in ("pretrain", "convert", "knn", "knn-2"))
    assert all(f"aftercorr:{newest.jobs[0]}" in headers[name] for name in ("convert", "knn", "knn-2"))

    cells = wait_until_over(runs)
    assert {one.state for one in cells.values()} == {"done"}, cells
    assert cells["mixmask-knn_seed-1"].detail.startswith("knn/top1 ")
    tables = (runs / "suites" / "small" / "report.md").read_text()
    assert "8 of 8 cells are finished" in tables
    first = tables.partition("Every cell:")[0]
    assert "pretrained on demo-shapes" in first  # the same for every row, so it stands in the caption
    assert first.count("\n| MixMask ") + first.count("\n| Random ") == 2
    assert (runs / "suites" / "small" / "report" / "index.html").is_file()
    assert "| mixmask-knn_seed-1 | demo-shapes | knn " in tables
    record = Record.read(Path(cells["mixmask-knn_seed-0"].run) / "record.json")
    assert record.method == "mixmask"
    assert record.parent == cells["mixmask"].run.rpartition("-")[2]
    assert newest.snapshot is not None
    assert record.environment["git_commit"] == ((newest.snapshot / "COMMIT").read_text().strip() or None)

    assert launch(suite, runs, profile())  # all is done: nothing is submitted
    assert not slurm_cli.queued().keys() - {job for job in slurm_cli.queued() if not slurm_cli.queued()[job].is_active}
    assert manifest.latest(runs.resolve(), "small").jobs == ()


def test_a_failure_cancels_its_dependents_and_nothing_else_and_a_relaunch_does_the_rest(
    slurm: Slurm, tmp_path: Path, shapes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    broken = {**VANILLA, "set": {"mix.kind": "none", "data.root": str(elsewhere)}}
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, broken], "transfer": [KNN]}], shapes)
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match="elsewhere: no such data folder"):
        launch(suite, runs, profile())
    assert not (runs / "suites").exists()

    assert launch(suite, runs, profile(), check_data=False)
    cells = wait_until_over(runs)
    assert {name: one.state for name, one in cells.items()} == {
        "random": "done",
        "vanilla": "failed",
        "random-knn": "done",
        "vanilla-knn": "cancelled",
    }
    assert cells["vanilla"].detail.startswith(f"error: {elsewhere}: no such data folder")
    assert cells["vanilla-knn"].detail == f"because {cells['vanilla'].cell} failed"
    log = Path(str(cells["vanilla"].log)).read_text()
    assert "Traceback" not in log
    tables = (runs / "suites" / "small" / "report.md").read_text()
    assert "2 of 4 cells are finished" in tables
    assert f"- {cells['vanilla'].cell}: error: {elsewhere}: no such data folder" in tables
    assert f"- {cells['vanilla-knn'].cell}: its backbone {cells['vanilla'].cell} is not finished" in tables

    elsewhere.symlink_to(shapes)
    done = {file: file.stat().st_mtime_ns for file in runs.glob("*/*/record.json")}
    assert launch(suite, runs, profile())
    newest = manifest.latest(runs.resolve(), "small")
    assert len(newest.jobs) == 3  # pretraining, its kNN, the tables
    assert {one.state for one in wait_until_over(runs).values()} == {"done"}
    assert all(file.stat().st_mtime_ns == time for file, time in done.items())


def test_three_hundred_cells_are_one_array(slurm: Slurm, tmp_path: Path, shapes: Path) -> None:
    many = {**RANDOM, "seeds": list(range(300))}
    suite = write_suite(tmp_path, [{"pretrain": [many]}], shapes)
    runs = tmp_path / "runs"
    slurm.run("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        assert launch(suite, runs, profile())
        newest = manifest.latest(runs.resolve(), "small")
        assert len(newest.jobs) == 2
        waiting = found(runs)
        assert len(waiting) == 300
        assert {one.state for one in waiting.values()} == {"pending"}
        assert len({one.job for one in waiting.values()}) == 300
        cancelled = {f"{newest.jobs[0]}_{number}" for number in range(10, 290)}
        for cell in newest.cells[:-1]:  # somebody else has done them in the meantime, except the last
            if cell.job not in cancelled:
                for file in cell.done:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text("{}")
        slurm.run("scancel", f"{newest.jobs[0]}_[10-289]")  # starting Python so often is all that they would do
    finally:
        slurm.run("scontrol", "update", "PartitionName=low", "State=UP")
    cells = wait_until_over(runs, 240)
    assert Counter(one.state for one in cells.values()) == {"done": 20, "cancelled": 280}
    assert len(list((newest.folder / "started").iterdir())) == 20
    assert Record.read(Path(cells["random_seed-299"].run) / "record.json").seed == 299
    assert "20 of 300 cells are finished" in (runs / "suites" / "small" / "report.md").read_text()


def test_two_launches_at_once_submit_every_cell_once(slurm: Slurm, tmp_path: Path, shapes: Path) -> None:
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, MIXMASK], "transfer": [KNN]}], shapes)
    runs = tmp_path / "runs"
    program = (
        "import sys; from pathlib import Path; from tests.launch.small import launch, profile; "
        f"launch(Path({str(suite)!r}), Path({str(runs)!r}), profile())"
    )
    slurm.run("scontrol", "update", "PartitionName=low", "State=DOWN")
    both = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("4 queued or running, 0 to do" in text for text in said) == [False, True]
    names = [name.rpartition(".")[0] for name in slurm.run("squeue", "-h", "-r", "-o", "%j").split()]
    assert sorted(names) == ["small.finish"] + ["small.knn"] * 2 + ["small.pretrain"] * 2
    newest = manifest.latest(runs.resolve(), "small")
    assert newest.snapshot is not None
    (newest.snapshot / "COMMIT").write_text("frozen\n")  # what only those see who import the copy
    slurm.run("scontrol", "update", "PartitionName=low", "State=UP")
    cells = wait_until_over(runs)
    assert {one.state for one in cells.values()} == {"done"}
    for name in ("mixmask", "mixmask-knn"):
        assert Record.read(Path(cells[name].run) / "record.json").environment["git_commit"] == "frozen"
    assert all(events(one.run) == ["started", "done"] for one in cells.values())


def test_what_sbatch_refuses_leaves_nothing_submitted(
    slurm: Slurm, tmp_path: Path, shapes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    greedy = {"demo": "knn", "name": "greedy", "set": {"k": 3}, "resources": {"gpus_per_node": 3}}
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, MIXMASK], "transfer": [KNN, greedy]}], shapes)
    with pytest.raises(RunFailure, match=r"(?s)sbatch refuses small\.knn-2:.*#SBATCH --gpus-per-node=3"):
        launch(suite, tmp_path / "runs", profile())
    assert "cancelled what had been submitted: pretrain (job" in capfd.readouterr().err
    wait_for(lambda: not slurm.run("squeue", "-h"), "nothing is left in the queue", 20)
    with pytest.raises(RunFailure, match=r"(?s)invalid partition.*#SBATCH --partition=nosuch"):
        launch(suite, tmp_path / "runs", profile(partition="nosuch"))
    assert not slurm.run("squeue", "-h")


def test_a_folder_that_the_nodes_do_not_see(
    slurm: Slurm, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "APPEARING_SECONDS", 2)
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM]}], shapes)
    with pytest.raises(
        UserError, match=r"is not seen here.*--runs"
    ):  # `true` runs instead of Python and writes nothing
        launch(suite, tmp_path / "runs", profile(shared_check_s=60, container="true"))
    assert not slurm.run("squeue", "-h")
    assert launch(suite, tmp_path / "runs", profile(shared_check_s=60))
    assert wait_until_over(tmp_path / "runs")["random"].state == "done"


@pytest.mark.parametrize("accounting", [False, True])
def test_a_killed_job_is_reported_with_accounting_and_without(
    accounting: bool, request: pytest.FixtureRequest, tmp_path: Path, shapes: Path
) -> None:
    slurm: Slurm = request.getfixturevalue("slurm_with_accounting" if accounting else "slurm")
    suite = write_suite(tmp_path, [{"pretrain": [{**ENDLESS, "seeds": [0, 1]}]}], shapes)
    runs = tmp_path / "runs"
    assert launch(suite, runs, profile())
    killed, cancelled = found(runs)["mixmask_seed-0"], found(runs)["mixmask_seed-1"]
    wait_for(lambda: steps(killed.run), "the first steps", FIRST_JOB_SECONDS)
    running = found(runs)["mixmask_seed-0"]
    assert running.state == "running"
    assert " % · " in running.detail
    assert running.detail.endswith(" left")
    kill_a_rank(str(killed.job), "0")
    slurm.run("scancel", str(cancelled.job))
    cells = wait_until_over(runs)
    if accounting:
        wait_for(lambda: not slurm_cli.queued(), "the queue has forgotten them", 90)
        assert "FAILED" in slurm.run("sacct", "-n", "-X", "-j", str(killed.job), "-o", "State")
        known = slurm_cli.accounted([str(killed.job), str(cancelled.job)])
        assert [known[str(job)].state for job in (killed.job, cancelled.job)] == ["FAILED", "CANCELLED"]
        cells = found(runs)
    assert cells["mixmask_seed-0"].state == "failed"
    assert "killed" in cells["mixmask_seed-0"].detail.lower()
    assert cells["mixmask_seed-1"].state == "cancelled"


def test_cancel_and_logs(slurm: Slurm, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mixmask.launch.commands.app import app

    suite = write_suite(tmp_path, [{"pretrain": [ENDLESS], "transfer": [KNN]}], shapes)
    runs = tmp_path / "runs"
    assert launch(suite, runs, profile())
    one = found(runs)["mixmask"]
    wait_for(lambda: steps(one.run), "the first steps", FIRST_JOB_SECONDS)
    app(["logs", "pretrain/mixmask", "--runs", str(runs)], standalone_mode=False)
    assert "mocov2, mixmask, resnet18" in capsys.readouterr().out
    app(["status", "small", "--runs", str(runs), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert [cell["state"] for cell in told["cells"]] == ["running", "pending"]
    app(["cancel", str(suite), "--runs", str(runs)], standalone_mode=False)
    assert "cancelled " in capsys.readouterr().out
    wait_for(lambda: not slurm.run("squeue", "-h"), "nothing is left in the queue")
    assert {name: cell.state for name, cell in found(runs).items()} == {
        "mixmask": "cancelled",
        "mixmask-knn": "cancelled",
    }
