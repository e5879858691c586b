"""Suites on a real SLURM: arrays, dependencies, preemption, time limits, kills, relaunches. Skipped where there is none."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import to_yaml
from engine.errors import RunFailure, UserError
from engine.records import Record
from launch import ledger, queue
from launch import slurm as submission
from launch.cells import expand
from launch.jobs import Attempts
from launch.suite import load_suite
from tests.launch.slurm import Slurm, wait_for
from tests.launch.small import (
    found,
    launch,
    profile,
    steps,
    undisturbed,
    wait_until_over,
    write_suite,
)
from tests.processes import ROOT, finish, processes

pytestmark = pytest.mark.slow

MIXMASK = {"demo": "pretrain", "name": "mixmask"}
VANILLA = {"demo": "pretrain", "name": "vanilla", "set": {"mix.kind": "none"}}
RANDOM = {"demo": "pretrain", "name": "random", "set": {"epochs": 0}}
FIRST_JOB_SECONDS = 120
ONE_THREAD_HERE = {
    "OMP_NUM_THREADS": "1",
    "MASTER_ADDR": "127.0.0.1",
}  # the test's nodes have names that do not resolve


def events(run: str) -> list[str]:
    return [line["event"] for line in Attempts(Path(run) / "attempts.jsonl").read()]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def weights(run: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(run) / "backbone.safetensors")


def test_the_demo_suite_end_to_end_in_a_folder_with_spaces_and_quotes(
    slurm: Slurm, tmp_path: Path, shapes: Path
) -> None:
    folder = tmp_path / 'Ann\'s "big" suite; $HOME'
    runs = folder / "all runs"
    suite = write_suite(
        folder,
        [
            {
                "pretrain": [RANDOM, VANILLA, MIXMASK],
                "convert": {"to": ["detectron2"]},
                "transfer": [{"demo": "knn", "name": "knn", "seeds": [0, 1]}],
            }
        ],
        shapes,
    )
    assert launch(suite, runs, profile())
    newest = ledger.latest(runs.resolve(), "small")
    headers = {file.parent.name: file.read_text() for file in (newest.folder / "jobs").glob("*/*_submission.sh")}
    assert headers.keys() == {"pretrain", "convert", "knn", "knn-2", "finish"}
    assert all("--array=0-2" in headers[name] for name in ("pretrain", "convert", "knn", "knn-2"))
    assert all(f"aftercorr:{newest.jobs[0]}" in headers[name] for name in ("convert", "knn", "knn-2"))

    cells = wait_until_over(runs)
    assert {one.state for one in cells.values()} == {"done"}, cells
    assert cells["mixmask-knn_seed-1"].detail.startswith("knn/top1 ")
    tables = (runs / "suites" / "small" / "report.md").read_text()
    assert "12 of 12 cells are finished" in tables
    assert tables.partition("Every cell:")[0].count("| demo-shapes ") == 3
    assert "| mixmask-knn_seed-1 | demo-shapes | knn " in tables
    record = Record.read(Path(cells["mixmask-knn_seed-0"].run) / "record.json")
    assert record.method == "mixmask"
    assert record.parent == cells["mixmask"].run.rpartition("-")[2]
    assert newest.snapshot is not None
    assert record.environment["git_commit"] == ((newest.snapshot / "COMMIT").read_text().strip() or None)

    assert launch(suite, runs, profile())  # all is done: nothing is submitted
    assert not queue.queued().keys() - {job for job in queue.queued() if not queue.queued()[job].is_active}
    assert ledger.latest(runs.resolve(), "small").jobs == ()


SHORT = {"max_steps": 6, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Callable[[int], dict[str, torch.Tensor]]:
    """The weights that so many processes give which nobody disturbs."""

    @functools.cache
    def weights_of(count: int) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("together")
        suite = write_suite(folder, [{"pretrain": [{**MIXMASK, "set": SHORT}]}], shapes)
        recipe = expand(load_suite(suite), folder, profile(), folder)[0].recipe
        assert recipe is not None
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        ends = finish(processes(count, "pretrain", str(folder / "recipe.yaml"), "--run-dir", str(folder / "run")))
        assert [code for code, *_ in ends] == [0] * count, ends
        return weights(str(folder / "run"))

    return weights_of


def shared(tmp_path: Path, shapes: Path, nodes: int, one_task: bool) -> Path:
    """A suite of one cell on two processes of each node."""
    where = {"nodes": nodes, "tasks_per_node": 2, "one_task_per_node": one_task}
    return write_suite(tmp_path, [{"pretrain": [{**MIXMASK, "set": SHORT, "resources": where}]}], shapes)


def test_two_nodes_of_two_processes_as_tasks_or_started_by_one_task(
    slurm: Slurm, tmp_path: Path, shapes: Path, together: Callable[[int], dict[str, torch.Tensor]]
) -> None:
    folders = {4: tmp_path / "tasks", 2: tmp_path / "one task per node"}
    for tasks, folder in folders.items():
        suite = shared(folder, shapes, 2, one_task=tasks == 2)
        assert launch(suite, folder / "runs", profile(environment=ONE_THREAD_HERE))
    for tasks, folder in folders.items():
        one = wait_until_over(folder / "runs")["mixmask"]
        assert one.state == "done", Path(str(one.log)).read_text()
        job = slurm.run("scontrol", "show", "job", str(one.job))
        assert "NumNodes=2" in job
        assert f"NumTasks={tasks}" in job
        environment = Record.read(Path(one.run) / "record.json").environment
        assert (environment["world_size"], environment["backend"]) == (4, "gloo")
        assert_same(weights(one.run), together(4))


def test_a_rank_that_is_killed_ends_the_job_and_a_relaunch_goes_on(
    slurm: Slurm, tmp_path: Path, shapes: Path, together: Callable[[int], dict[str, torch.Tensor]]
) -> None:
    suite = shared(tmp_path, shapes, 1, one_task=False)
    runs = tmp_path / "runs"
    assert launch(suite, runs, profile())
    one = found(runs)["mixmask"]
    wait_for(lambda: len(steps(one.run)) > 1, "the first steps", FIRST_JOB_SECONDS)
    kill_a_rank(str(one.job), "1")
    cells = wait_until_over(runs)
    assert cells["mixmask"].state == "failed"
    assert len(steps(one.run)) < 6

    assert launch(suite, runs, profile())  # the same command goes on with what is half done
    cells = wait_until_over(runs)
    assert cells["mixmask"].state == "done"
    assert "resuming at step" in Path(str(cells["mixmask"].log)).read_text()
    assert steps(one.run) == [1, 2, 3, 4, 5, 6]
    assert_same(weights(one.run), together(2))


def test_processes_of_either_kind_stop_together_and_the_first_queues_again(
    slurm: Slurm, tmp_path: Path, shapes: Path, together: Callable[[int], dict[str, torch.Tensor]]
) -> None:
    folders = [tmp_path / "tasks", tmp_path / "one task"]
    for folder in folders:
        assert launch(shared(folder, shapes, 1, folder == folders[1]), folder / "runs", profile())
    for folder in folders:
        one = found(folder / "runs")["mixmask"]
        wait_for(functools.partial(steps, one.run), "the first steps", FIRST_JOB_SECONDS)
        slurm.run("scancel", "--signal=USR2", str(one.job))
    for folder in folders:
        one = wait_until_over(folder / "runs")["mixmask"]
        assert one.state == "done", Path(str(one.log)).read_text()
        assert events(one.run) == ["started", "stopped", "started", "done"]
        assert_same(weights(one.run), together(2))


def kill_a_rank(job: str, rank: str) -> None:
    """SIGKILL one process of a job, as the kernel does when memory is out."""
    main, _, task = job.partition("_")
    array = {f"SLURM_ARRAY_JOB_ID={main}", f"SLURM_ARRAY_TASK_ID={task}"}
    wanted = {f"SLURM_PROCID={rank}"} | (array if task else {f"SLURM_JOB_ID={main}"})
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_bytes().decode(errors="replace").split("\0"))
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if wanted <= environment and b"submitit" in command and b"srun" not in command:
            pids.append(int(process.name))
    assert pids
    os.kill(min(pids), signal.SIGKILL)


def test_preempted_and_told_to_stop_it_ends_with_the_weights_of_an_undisturbed_run(
    slurm: Slurm, tmp_path: Path, shapes: Path
) -> None:
    cell = {**MIXMASK, "set": {"max_steps": 24, "epochs": 4}}
    suite = write_suite(tmp_path, [{"pretrain": [cell]}], shapes)
    runs = tmp_path / "runs"
    assert launch(suite, runs, profile(partition="low"))
    one = found(runs)["mixmask"]

    wait_for(lambda: len(steps(one.run)) > 2, "the first steps", FIRST_JOB_SECONDS)
    slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: events(one.run) == ["started", "stopped"], "it has been preempted")
    before = steps(one.run)[-1]
    assert before < 24
    assert (Path(one.run) / "checkpoint.pt").exists()

    wait_for(lambda: steps(one.run)[-1] > before, "it goes on", FIRST_JOB_SECONDS)
    slurm.run("scancel", "--signal=USR2", str(one.job))  # as SLURM does before the time limit
    wait_for(lambda: events(one.run)[2:] == ["started", "stopped"], "it has been told to stop")
    assert steps(one.run)[-1] < 24
    cells = wait_until_over(runs)
    assert cells["mixmask"].state == "done"
    assert cells["mixmask"].requeues == 2
    assert events(one.run) == ["started", "stopped", "started", "stopped", "started", "done"]
    assert steps(one.run) == list(range(1, 25))
    assert_same(weights(one.run), undisturbed(one, tmp_path / "here"))


def test_at_its_time_limit_a_job_is_queued_again_so_often_and_no_oftener(
    slurm: Slurm, tmp_path: Path, shapes: Path
) -> None:
    endless = {**MIXMASK, "set": {"max_steps": None, "epochs": 100000}, "resources": {"time_min": 1}}
    suite = write_suite(tmp_path, [{"pretrain": [endless]}], shapes)
    runs = tmp_path / "runs"
    assert launch(suite, runs, profile(signal_delay_s=15, max_timeouts=1))
    one = found(runs)["mixmask"]
    wait_for(lambda: events(one.run) == ["started", "stopped"], "the time limit", 120)
    reached = steps(one.run)[-1]
    wait_for(lambda: found(runs)["mixmask"].requeues == 1, "it is queued again")
    wait_for(lambda: steps(one.run)[-1] > reached, "it goes on", FIRST_JOB_SECONDS)
    assert steps(one.run)[: reached + 1] == list(range(1, reached + 2))
    slurm.run("scancel", "--signal=USR2", str(one.job))  # the second time
    cells = wait_until_over(runs)
    assert cells["mixmask"].state == "failed"
    assert "timed-out too many times" in cells["mixmask"].detail


def test_a_failure_cancels_its_dependents_and_nothing_else_and_a_relaunch_does_the_rest(
    slurm: Slurm, tmp_path: Path, shapes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    broken = {**VANILLA, "set": {"mix.kind": "none", "data.root": str(elsewhere)}}
    knn = {"demo": "knn", "name": "knn"}
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, broken], "transfer": [knn]}], shapes)
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
    newest = ledger.latest(runs.resolve(), "small")
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
        newest = ledger.latest(runs.resolve(), "small")
        assert len(newest.jobs) == 2
        waiting = found(runs)
        assert len(waiting) == 300
        assert {one.state for one in waiting.values()} == {"pending"}
        assert len({one.job for one in waiting.values()}) == 300
        cancelled = {f"{newest.jobs[0]}_{number}" for number in range(20, 280)}
        for cell in newest.cells[:-1]:  # somebody else has done them in the meantime, except the last
            if cell.job not in cancelled:
                for file in cell.done:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text("{}")
        slurm.run("scancel", f"{newest.jobs[0]}_[20-279]")  # starting Python so often is all that they would do
    finally:
        slurm.run("scontrol", "update", "PartitionName=low", "State=UP")
    cells = wait_until_over(runs, 240)
    assert Counter(one.state for one in cells.values()) == {"done": 40, "cancelled": 260}
    assert len(list((newest.folder / "started").iterdir())) == 40
    assert Record.read(Path(cells["random_seed-299"].run) / "record.json").seed == 299
    assert "40 of 300 cells are finished" in (runs / "suites" / "small" / "report.md").read_text()


def test_two_launches_at_once_submit_every_cell_once(slurm: Slurm, tmp_path: Path, shapes: Path) -> None:
    knn = {"demo": "knn", "name": "knn"}
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, MIXMASK], "transfer": [knn]}], shapes)
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
    newest = ledger.latest(runs.resolve(), "small")
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
    knn = {"demo": "knn", "name": "knn"}
    greedy = {"demo": "knn", "name": "greedy", "set": {"k": 3}, "resources": {"gpus_per_node": 3}}
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, MIXMASK], "transfer": [knn, greedy]}], shapes)
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
    long = {**MIXMASK, "set": {"max_steps": 1000}, "seeds": [0, 1]}
    suite = write_suite(tmp_path, [{"pretrain": [long]}], shapes)
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
        wait_for(lambda: not queue.queued(), "the queue has forgotten them", 90)
        assert "FAILED" in slurm.run("sacct", "-n", "-X", "-j", str(killed.job), "-o", "State")
        known = queue.accounted([str(killed.job), str(cancelled.job)])
        assert [known[str(job)].state for job in (killed.job, cancelled.job)] == ["FAILED", "CANCELLED"]
        cells = found(runs)
    assert cells["mixmask_seed-0"].state == "failed"
    assert "killed" in cells["mixmask_seed-0"].detail.lower()
    assert cells["mixmask_seed-1"].state == "cancelled"


def test_cancel_and_logs(slurm: Slurm, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import app

    long = {**MIXMASK, "set": {"max_steps": 1000}}
    suite = write_suite(tmp_path, [{"pretrain": [long], "transfer": [{"demo": "knn", "name": "knn"}]}], shapes)
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
