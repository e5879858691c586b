from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from mixmask.engine.backbones import load_backbone
from mixmask.engine.checkpoint import read_checkpoint
from mixmask.pretrain import stage
from tests import zygote
from tests.pretrain.small_runs import SMALL_FRAMEWORKS, interrupt_at, plan


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(config: Path, tmp_path: Path) -> None:
    whole = plan(config, tmp_path / "whole")
    stage.run(whole)

    interrupted = plan(config, tmp_path / "interrupted")
    process = zygote.start(
        ["-m", "mixmask", "pretrain", str(config), "--runs", str(tmp_path / "interrupted")],
        {**os.environ, "OMP_NUM_THREADS": "1"},  # as many threads as here: their number changes the rounding
    )
    deadline = time.monotonic() + 120
    log = interrupted.run.log_file
    while not (interrupted.run.checkpoint_file.exists() and len(log.read_text().splitlines()) >= 4):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not interrupted.run.is_finished
    with log.open("a") as file:
        file.write('{"step": 99')  # what a crash in the middle of a write leaves

    stage.run(interrupted)
    ours, _ = load_backbone(whole.backbone_file)
    theirs, _ = load_backbone(interrupted.backbone_file)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [
        [json.loads(line)["loss"] for line in p.run.log_file.read_text().splitlines()] for p in (whole, interrupted)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 14
    assert not interrupted.run.checkpoint_file.exists()


@pytest.mark.slow
def test_every_kind_of_state_is_restored(config: Path, tmp_path: Path) -> None:
    """Interrupted in process at every possible checkpoint, and with the data decoded once instead of streamed."""
    resident = ["data.storage=resident", "epochs=1"]
    whole = plan(config, tmp_path / "whole", *resident)
    stage.run(whole)
    expected, _ = load_backbone(whole.backbone_file)
    for stop in (1, 5):
        broken = plan(config, tmp_path / f"stop{stop}", *resident, "checkpoint_every=1")

        interrupt_at(stop, broken)
        stage.run(broken)
        state, _ = load_backbone(broken.backbone_file)
        assert all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.slow
def test_the_weight_decay_follows_its_schedule(config: Path, tmp_path: Path) -> None:
    optimizer = (
        "optimizer={kind: adamw, lr: 0.001, weight_decay: 0.1, weight_decay_end: 0.5, decay_norm_and_bias: false}"
    )
    broken = plan(config, tmp_path, optimizer, "checkpoint_every=1")
    interrupt_at(5, broken)
    groups = read_checkpoint(broken.run.checkpoint_file)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, broken.recipe.optimizer.decay(4, 14)}


@pytest.mark.slow
@pytest.mark.parametrize("framework", [name for name in SMALL_FRAMEWORKS if name != "moco"])
def test_every_framework_resumes_to_the_same_weights(framework: str, config: Path, tmp_path: Path) -> None:
    """With a mixture, views of different kinds, and the moving average kept where there is one."""
    recipe = [SMALL_FRAMEWORKS[framework], "data.storage=resident", "epochs=1", "checkpoint_every=1"]
    recipe += ["backbone.arch=timm/test_resnet"]
    recipe += ["second_view={blur_probability: 0.1, solarize_probability: 0.2}", "export=online"]
    if framework in ("byol", "mocov3", "dino", "densecl"):
        recipe[-1] = "export=momentum"
    whole = plan(config, tmp_path / "whole", *recipe)
    expected, info = load_backbone(stage.run(whole))
    assert info.framework == framework
    stop = random.Random(framework).randrange(1, 7)
    broken = plan(config, tmp_path / "broken", *recipe)
    interrupt_at(stop, broken)
    state, _ = load_backbone(stage.run(broken))
    assert all(torch.equal(expected[name], state[name]) for name in expected), stop
    logged = [json.loads(line) for line in whole.run.log_file.read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) and line["rank_me"] > 1 for line in logged)


@pytest.mark.slow
def test_an_accumulated_run_resumes_to_the_same_weights(config: Path, tmp_path: Path) -> None:
    overrides = ["accumulate=4", "framework.bn_splits=1", "max_steps=4", "data.storage=resident", "checkpoint_every=1"]
    whole = plan(config, tmp_path / "whole", *overrides)
    stage.run(whole)
    last = json.loads(whole.run.log_file.read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["clean"] + last["mixmask"], rel=1e-5)
    broken = plan(config, tmp_path / "broken", *overrides)
    interrupt_at(2, broken)
    stage.run(broken)
    ours, theirs = load_backbone(whole.backbone_file)[0], load_backbone(broken.backbone_file)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_alive_until_the_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    """Launchers signal workers, too; the run must still write its checkpoint and end as if only it had been told."""
    overrides = ["epochs=50", "data.num_workers=2", "checkpoint_every=10000"]
    stopped = plan(config, tmp_path, *overrides)
    process = zygote.start(["-m", "mixmask", "pretrain", str(config), *overrides, "--runs", str(tmp_path)])
    deadline = time.monotonic() + 120
    while not stopped.run.log_file.exists() or len(stopped.run.log_file.read_text().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGUSR2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR2, said
    assert "by SIGUSR2; the same command resumes" in said
    assert stopped.run.checkpoint_file.is_file()
