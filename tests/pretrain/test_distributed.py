"""Two real processes with gloo on this machine, started as torchrun starts them."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from mixmask.engine.backbones import load_backbone
from mixmask.engine.config import load_recipe
from mixmask.engine.distributed import read_launch
from mixmask.engine.errors import ConfigError
from mixmask.engine.records import Record
from mixmask.pretrain import stage
from mixmask.pretrain.recipe import PretrainRecipe
from tests.processes import finish, processes, python

CONFIG = """
name: tiny
device: cpu
data: {name: shapes, root: ROOT, train: train, test: val, storage: STORAGE, num_workers: 1}
backbone: {arch: resnet18, stem: standard}
framework: {kind: mocov2, dim: 16, queue_size: 32, momentum: 0.9, temperature: 0.2, bn_splits: 2}
mix: {kind: none}
augment: {crop: 32, scale: [0.3, 1.0]}
optimizer: {kind: sgd, lr: 0.03, weight_decay: 1e-4}
epochs: 1
max_steps: 4
batch_size: 16
monitor: {every_epochs: 1, k: 5}
log_every: 1
checkpoint_every: 2
"""


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("ROOT", str(shapes)).replace("STORAGE", "resident"))
    return path


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["mix.kind=mixmask", "mix.grid=4"]])  # `test_elastic` has the others
def test_two_processes_compute_what_one_does(config: Path, tmp_path: Path, overrides: list[str]) -> None:
    """Keys are shuffled over both processes and each has one of the two groups of batch statistics: the same computation.

    One step is equal up to rounding; over several, batch statistics of few images blow rounding up, so losses are compared
    more loosely.
    """
    zero = load_recipe(PretrainRecipe, config, [*overrides, "epochs=0", "optimizer.lr=0.001"])
    start, _ = load_backbone(stage.run(stage.plan(zero, tmp_path, tmp_path / "zero")))
    for steps, loss_tolerance in ((1, 1e-5), (3, 5e-3)):
        base = ["pretrain", str(config), *overrides, f"max_steps={steps}", "optimizer.lr=0.001"]
        runs = tmp_path / str(steps)
        done = finish(processes(2, *base, "--run-dir", str(runs / "two")))
        assert [code for code, _, _ in done] == [0, 0], done
        assert done[0][1].strip().endswith("backbone.safetensors")
        assert done[1][1:] == ("", "")  # one process speaks
        one = stage.plan(load_recipe(PretrainRecipe, config, base[2:]), tmp_path, runs / "one")
        stage.run(one)
        record = Record.read(runs / "two" / "record.json")
        assert record.fingerprint == one.fingerprint
        assert (record.environment["world_size"], record.environment["backend"]) == (2, "gloo")
        assert losses(runs / "two") == pytest.approx(losses(runs / "one"), abs=loss_tolerance)
        if steps == 1:
            ours, _ = load_backbone(runs / "one" / "backbone.safetensors")
            theirs, _ = load_backbone(runs / "two" / "backbone.safetensors")
            moves = [
                torch.cat(
                    [(state[name] - start[name]).flatten() for name in start if name.endswith(("weight", "bias"))]
                )
                for state in (ours, theirs)
            ]
            assert (moves[0] - moves[1]).norm() < 0.02 * moves[0].norm()


GATHERED = """
import sys, torch
import torch.nn.functional as F
from mixmask.engine import distributed
from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe
from mixmask.pretrain.frameworks.mocov3 import MoCoV3Recipe
from mixmask.pretrain.frameworks.simclr import SimCLRRecipe
from mixmask.pretrain.frameworks.swav import SwAVRecipe
from mixmask.pretrain.frameworks.vicreg import VICRegRecipe

def of_simclr(framework, first, second, lam):
    return (framework.loss(first, second) + framework.loss(second, first)).mean() / 2

def of_batch(framework, first, second, lam):
    return framework.mixed_loss(first, second, lam)

def of_keys(framework, first, second, lam):
    return framework.mixed_loss(first, second.detach(), lam)

def of_codes(framework, first, second, lam):
    framework.prototypes.double()
    codes = framework._codes([first.detach(), second.detach()])
    return framework.mixed_loss(framework._similarity(first), codes[1], lam)

KINDS = {
    "simclr": (SimCLRRecipe(), of_simclr),
    "barlowtwins": (BarlowTwinsRecipe(dim=4, projector_width=8), of_batch),
    "vicreg": (VICRegRecipe(dim=4, projector_width=8), of_batch),
    "mocov3": (MoCoV3Recipe(dim=4, projector_width=8), of_keys),
    "swav": (SwAVRecipe(dim=4, projector_width=8, prototypes=6), of_codes),
}

with distributed.session() as world:
    draws = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 8, 4, generator=draws, dtype=torch.float64)
    lam = torch.rand(8, generator=draws, dtype=torch.float64)[world.share(8)]
    found = {}
    for name, (recipe, loss_of) in KINDS.items():
        torch.manual_seed(1)
        mine = raw[:, world.share(8)].clone().requires_grad_()
        framework = recipe.build(BackboneRecipe(arch="resnet18"))
        first, second = F.normalize(mine, dim=2)
        loss = loss_of(framework, first, second, lam)
        loss.backward()
        found[name] = {"loss": loss.detach(), "grad": mine.grad}
    torch.save(found, f"{sys.argv[1]}/{world.size}-{world.rank}.pt")
"""


@pytest.mark.slow
def test_losses_are_over_all_processes_and_their_gradients_add_up(tmp_path: Path) -> None:
    script = tmp_path / "gathered.py"
    script.write_text(GATHERED)
    for count in (1, 2):
        done = python(count, script, str(tmp_path))
        assert [code for code, _, _ in done] == [0] * count, done
    whole = torch.load(tmp_path / "1-0.pt")
    halves = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    for name in whole:
        parts = [half[name] for half in halves]
        assert float(sum(part["loss"] for part in parts)) / 2 == pytest.approx(float(whole[name]["loss"])), name
        gradient = torch.cat([part["grad"] for part in parts], dim=1) / 2  # the processes' gradients are averaged
        assert torch.allclose(gradient, whole[name]["grad"]), name


RANKS = """
import sys, torch
from pathlib import Path
from mixmask.engine import distributed
from mixmask.engine.config import load_recipe
from mixmask.engine.loader import open_source
from mixmask.pretrain import stage
from mixmask.pretrain.recipe import PretrainRecipe

with distributed.session() as world:
    recipe = load_recipe(PretrainRecipe, sys.argv[1], sys.argv[3:])
    plan = stage.plan(recipe, Path(sys.argv[2]))
    kept = {}
    build = recipe.framework.build
    object.__setattr__(recipe.framework, "build", lambda backbone: kept.setdefault("model", build(backbone)))
    source = open_source(plan.train_images, recipe.data, plan.device)
    source.labels = torch.arange(len(plan.train_images))
    seen = [batch.labels for batch in source.training(plan.batches, recipe.views, 0, 4)]
    stage.run(plan)
    torch.save({"seen": seen, "state": kept["model"].state_dict()}, f"{sys.argv[2]}/rank{world.rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["mixmask", "mixmask+unmix"])
def test_ranks_share_the_data_and_end_with_equal_weights_and_queues(config: Path, tmp_path: Path, mix: str) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    runs = tmp_path / "runs"
    runs.mkdir()
    overrides = [f"mix.kind={mix}", "mix.grid=4", "monitor=null"]
    done = python(2, script, str(config), str(runs), *overrides)
    assert [code for code, _, _ in done] == [0, 0], done
    first, second = (torch.load(runs / f"rank{rank}.pt") for rank in range(2))
    plan = stage.plan(load_recipe(PretrainRecipe, config, overrides), tmp_path)
    for step, (_, _, whole) in enumerate(plan.batches.from_step(0, 4)):
        assert [*first["seen"][step].tolist(), *second["seen"][step].tolist()] == whole
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert not torch.equal(first["state"]["queue"][:16], first["state"]["queue"][16:])


@pytest.mark.slow
def test_the_queue_of_two_processes_is_the_queue_of_one(config: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    states = []
    for count in (1, 2):
        runs = tmp_path / str(count)
        runs.mkdir()
        done = python(count, script, str(config), str(runs), "max_steps=1", "monitor=null")
        assert [code for code, _, _ in done] == [0] * count, done
        states += [torch.load(runs / f"rank{rank}.pt")["state"] for rank in range(count)]
    one, first, second = states
    assert torch.allclose(one["queue"], first["queue"], atol=1e-5)
    assert torch.equal(first["queue"], second["queue"])
    assert int(one["queue_position"]) == int(first["queue_position"]) == int(second["queue_position"]) == 16


PARTS = """
import sys, torch
from pathlib import Path
from mixmask.engine import distributed
from tests.engine.test_training import error_of, job
from mixmask.engine.training import train

with distributed.session() as world:
    one = job(Path(sys.argv[1]) / f"{world.size}", log_every=1)

    def batches(first):
        for step in range(first, 100):
            yield torch.randn(8, 4, generator=torch.Generator().manual_seed(step))[world.share(8)]

    def losses(rows, step):
        return [lambda part=part: {"loss": error_of(one.model, part) / 2} for part in rows.chunk(2)]

    train(one, batches, losses)
    torch.save(one.model.state_dict(), f"{sys.argv[1]}/{world.size}-{world.rank}.pt")
"""


@pytest.mark.slow
def test_the_gradients_of_all_parts_on_all_processes_are_averaged(tmp_path: Path) -> None:
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    for count in (1, 2):
        done = python(count, script, str(tmp_path))
        assert [code for code, _, _ in done] == [0] * count, done
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for state in two:
        for name, value in one.items():
            assert torch.allclose(state[name], value, atol=1e-6), name
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=1e-6)


@pytest.mark.slow
def test_a_failure_is_said_once(config: Path, tmp_path: Path) -> None:
    done = finish(processes(2, "pretrain", str(config), "optimizer.lr=1e30", "monitor=null", "--runs", str(tmp_path)))
    assert [code for code, _, _ in done] == [1, 1]
    assert done[0][2].count("the loss is not finite at step") == 1
    assert done[1][2] == ""


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(config: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    base = ["pretrain", str(config), "mix.kind=mixmask", "mix.grid=4", "max_steps=14", "epochs=5", "monitor=null"]
    assert [code for code, _, _ in finish(processes(2, *base, "--run-dir", str(whole)))] == [0, 0]
    started = processes(2, *base, "--run-dir", str(stopped))
    deadline = time.monotonic() + 120
    while not (stopped / "log.jsonl").exists() or len((stopped / "log.jsonl").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        assert started[0].poll() is None
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    done = finish(started)
    assert [code for code, _, _ in done] == [128 + signal.SIGTERM] * 2, done
    assert "the same command resumes" in done[0][2]
    assert (stopped / "checkpoint.pt").exists()
    assert [code for code, _, _ in finish(processes(2, *base, "--run-dir", str(stopped)))] == [0, 0]
    assert losses(whole) == losses(stopped)
    ours, _ = load_backbone(whole / "backbone.safetensors")
    theirs, _ = load_backbone(stopped / "backbone.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_mistake_is_said_once(config: Path, tmp_path: Path) -> None:
    done = finish(
        processes(2, "pretrain", str(config), "batch_size=15", "framework.kind=byol", "--runs", str(tmp_path))
    )
    assert [code for code, _, _ in done] == [2, 2]
    assert "batch_size 15 cannot be shared equally by 2 processes" in done[0][2]
    assert done[1][2] == ""
    done = finish(processes(2, "pretrain", str(config), f"data.root={tmp_path / 'absent'}", "--runs", str(tmp_path)))
    assert [code for code, _, _ in done] == [2, 2]
    assert done[0][2].count("no such data folder") == 1


def test_launchers_are_read_from_their_environment() -> None:
    assert read_launch({}) is None
    assert read_launch({"WORLD_SIZE": "1", "RANK": "0"}) is None
    torchrun = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    launch = read_launch(torchrun)
    assert launch is not None
    assert (launch.world.rank, launch.world.size, launch.world.local_rank) == (5, 8, 1)
    assert (launch.address, launch.port) == ("node1", 29500)
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    slurm = {**step, "SLURM_JOB_ID": "123456", "MASTER_ADDR": "n7"}
    launch = read_launch(slurm)
    assert launch is not None
    assert (launch.world.rank, launch.world.size, launch.world.local_rank) == (3, 4, 1)
    assert launch.address == "n7"
    assert 15000 <= launch.port < 35000
    beside = read_launch({**slurm, "SLURM_STEP_ID": "1"})
    assert beside is not None
    assert beside.port != launch.port
    assert read_launch({**slurm, "SLURM_STEP_NUM_TASKS": "1"}) is None
    inside_sbatch = {name: value for name, value in slurm.items() if not name.startswith("SLURM_STEP")}
    assert read_launch(inside_sbatch) is None
    with pytest.raises(ConfigError, match="not RANK"):
        read_launch({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"})
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two', a number"):
        read_launch({"WORLD_SIZE": "two"})
    with pytest.raises(ConfigError, match="MASTER_PORT is 'x', a number"):
        read_launch({**slurm, "MASTER_PORT": "x"})
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        read_launch({name: value for name, value in slurm.items() if name != "MASTER_ADDR"})
