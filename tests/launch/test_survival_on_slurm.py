"""Jobs on a real SLURM that are preempted, killed, stopped or out of time, alone or together. Skipped where it is absent."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixmask.engine.config import to_yaml
from mixmask.engine.ownership import read_owner
from mixmask.engine.records import Record
from mixmask.launch.suite.cells import expand
from mixmask.launch.suite.suite import load_suite
from tests.launch.slurm import Slurm, wait_for
from tests.launch.small import (
    ENDLESS,
    FIRST_JOB_SECONDS,
    MIXMASK,
    events,
    found,
    kill_a_rank,
    launch,
    profile,
    steps,
    undisturbed,
    wait_until_over,
    weights,
    write_suite,
)
from tests.processes import finish, processes

pytestmark = pytest.mark.slow

# the test's nodes have names that do not resolve
ONE_THREAD_HERE = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


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

    assert launch(suite, runs, profile())  # the same command resumes with what is half done
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
    endless = {**ENDLESS, "resources": {"time_min": 1}}
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


def test_a_node_is_lost_and_the_process_on_it_lives_on(
    slurm_that_loses_nodes: Slurm, tmp_path: Path, shapes: Path
) -> None:
    """SLURM starts the job again on another node; the two do not write one run between them."""
    slurm = slurm_that_loses_nodes
    cell = {**MIXMASK, "set": {"max_steps": 40, "epochs": 6, "checkpoint_every": 3}}
    suite = write_suite(tmp_path, [{"pretrain": [cell]}], shapes)
    runs = tmp_path / "runs"
    assert launch(suite, runs, profile())
    one = found(runs)["mixmask"]
    wait_for(lambda: len(steps(one.run)) > 2, "the first steps", FIRST_JOB_SECONDS)
    node = slurm.run("squeue", "-h", "-j", str(one.job), "-o", "%N").strip()
    owner = read_owner(Path(one.run) / "owner.json")
    assert owner is not None
    os.kill(owner["pid"], signal.SIGSTOP)  # it hangs with its node
    try:
        slurm.kill_node(node)
        wait_for(lambda: events(one.run) == ["started", "started"], "it is started again elsewhere", 150)
    finally:
        os.kill(owner["pid"], signal.SIGCONT)
    cells = wait_until_over(runs)
    assert cells["mixmask"].state == "done", Path(str(cells["mixmask"].log)).read_text()
    assert steps(one.run) == list(range(1, 41))  # no line twice, none missing
    assert_same(weights(one.run), undisturbed(one, tmp_path / "here"))
