"""Suites of seconds, for the tests of `launch`."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import load_recipe
from mixmask.launch.slurm.attempts import Attempts
from mixmask.launch.slurm.profile import Profile
from mixmask.launch.suite import launching, manifest
from mixmask.launch.suite import status as states
from mixmask.launch.suite.suite import load_suite
from tests.launch.slurm import wait_for

PRETRAIN: dict[str, Any] = {
    "backbone": {"arch": "resnet18", "stem": "standard", "zero_init_residual": False},
    "augment.crop": 32,
    "framework.queue_size": 16,
    "framework.bn_splits": 1,
    "batch_size": 16,
    "monitor": None,
    "warmup_epochs": 0,
    "log_every": 1,
    "max_steps": 2,
}
KNN_SETTINGS = {"evaluation.crop": 32, "k": 5}

# entries of a suite
RANDOM = {"demo": "pretrain", "name": "random", "set": {"epochs": 0}}
VANILLA = {"demo": "pretrain", "name": "vanilla", "set": {"mix.kind": "none"}}
MIXMASK = {"demo": "pretrain", "name": "mixmask"}
KNN = {"demo": "knn", "name": "knn"}
ENDLESS = {"demo": "pretrain", "name": "mixmask", "set": {"max_steps": None, "epochs": 100_000}}  # until it is stopped

FIRST_JOB_SECONDS = 120


def write_suite(folder: Path, grids: list[dict[str, Any]], shapes: Path, **more: Any) -> Path:
    """A suite of the demo's recipes on the tests' pictures, made small. ``config`` is a name in ``configs/demo``."""
    grids = copy.deepcopy(grids)
    for grid in grids:
        for entry in (*grid.get("pretrain", ()), *grid.get("transfer", ())):
            entry.setdefault("config", str(configs_folder() / "demo" / f"{entry.pop('demo')}.yaml"))
    tree = {
        "name": "small",
        "data": {"demo-shapes": str(shapes)},
        "set": {"pretrain": PRETRAIN, "knn": KNN_SETTINGS},
        "grids": grids,
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    return path


def profile(**keys: Any) -> Profile:
    """A cluster that saves the tests the check of the shared folder, which has a test of its own."""
    return Profile.model_validate({"shared_check_s": 0, "environment": {"OMP_NUM_THREADS": "1"}, **keys})


def launch(
    path: Path, runs: Path, given: Profile, check_data: bool = True, cluster: manifest.Cluster = "slurm"
) -> bool:
    return launching.launch(load_suite(path), path.parent, given, cluster, runs, check_data)


def found(runs: Path, suite: str = "small") -> dict[str, states.CellStatus]:
    """The state of every cell of the newest launch, by name."""
    newest = manifest.latest(runs.resolve(), suite)
    return {cell.name: one for cell, one in zip(newest.cells, states.status(newest), strict=True)}


def wait_until_over(runs: Path, seconds: float = 150) -> dict[str, states.CellStatus]:
    """Until no cell waits or runs, and the last job of every launch has ended: a launch may leave it to an earlier one."""
    last = {launch.finish_job for launch in manifest.launches(runs.resolve(), "small")}

    def over() -> bool:
        active = {job for job, state in states.slurm_cli.queued().items() if state.is_active}
        return not last & active and all(one.state not in ("pending", "running") for one in found(runs).values())

    wait_for(over, f"the suite is over: {found(runs)}", seconds)
    return found(runs)


def steps(run: str | Path) -> list[int]:
    """The steps in a run's log."""
    file = Path(run) / "log.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def undisturbed(one: states.CellStatus, folder: Path) -> dict[str, Any]:
    """The weights of a pretraining cell's recipe run here, in one go, on one thread as the jobs of `profile`."""
    from mixmask.pretrain import stage
    from mixmask.pretrain.recipe import PretrainRecipe

    recipe = load_recipe(PretrainRecipe, Path(one.run) / "recipe.yaml")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return load_file(stage.run(stage.plan(recipe, folder)))
    finally:
        torch.set_num_threads(threads)


def events(run: str) -> list[str]:
    return [line["event"] for line in Attempts(Path(run) / "attempts.jsonl").read()]


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "backbone.safetensors")


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
