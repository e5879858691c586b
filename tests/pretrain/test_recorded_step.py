"""Recorded steps compute what plain steps compute, to the bit; the graph is emulated on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixmask.engine import host_values
from mixmask.engine.distributed import World
from mixmask.pretrain import compiling, stage
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.recorded_step import RecordedSteps, Values
from mixmask.pretrain.split_batch_norm import SplitBatchNorm2d
from tests.emulated_graph import EmulatedGraph
from tests.pretrain.small_runs import BOTH, SMALL_FRAMEWORKS, SMALL_MIXTURES, plan

CASES = {
    **{name: [framework, BOTH] for name, framework in SMALL_FRAMEWORKS.items() if name != "densecl"},
    "mocov2": ["mix={kind: mixmask, grid: 4}"],
    "unmix": ["mix={kind: unmix}"],
    **SMALL_MIXTURES,
    "erased SimSiam": [SMALL_FRAMEWORKS["simsiam"], "mix={kind: erase, grid: 4}"],
    "bf16": ["precision=bf16", "optimizer={kind: lars, lr: 0.1}", "clip_norm=1"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "compile_encoders", lambda *_: None)
    monkeypatch.setattr(compiling, "graphs_of", lambda device: EmulatedGraph)
    EmulatedGraph.made = EmulatedGraph.replays = 0


def backbone(run: stage.PretrainPlan) -> dict[str, torch.Tensor]:
    return load_file(run.backbone_file)


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_are_steps(config: Path, tmp_path: Path, name: str) -> None:
    keys = [
        "backbone.arch=timm/test_resnet",
        f"max_steps={8 if name == 'swav' else 6}",
        "epochs=5",
        "log_every=2",
        *CASES[name],
    ]
    plain, recorded = (plan(config, tmp_path / str(value), *keys, f"compile={value}") for value in ("false", "true"))
    stage.run(plain)
    stage.run(recorded)
    assert EmulatedGraph.replays >= 2
    ours, theirs = backbone(recorded), backbone(plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    mine, yours = (
        [{k: v for k, v in line.items() if "second" not in k and "wait" not in k} for line in log(run)]
        for run in (recorded, plain)
    )
    assert mine == yours  # losses and diagnostics of every logged step


def log(run: stage.PretrainPlan) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.run.log_file.read_text().splitlines()]


def test_swav_is_recorded_anew_when_its_queue_is_full(config: Path, tmp_path: Path) -> None:
    keys = ["backbone.arch=timm/test_resnet", "max_steps=14", "epochs=5", SMALL_FRAMEWORKS["swav"], "compile=true"]
    stage.run(plan(config, tmp_path, *keys, "framework.queue_starts=0.3"))
    assert EmulatedGraph.made == 2


def test_an_interrupted_run_goes_on_with_steps_that_are_recorded_again(config: Path, tmp_path: Path) -> None:
    keys = ["backbone.arch=timm/test_resnet", "max_steps=14", "epochs=5", "compile=true", BOTH]
    whole, broken = (plan(config, tmp_path / name, *keys) for name in ("whole", "broken"))
    stage.run(whole)
    original = RecordedSteps.__call__

    def failing(steps: RecordedSteps, *args: Any, **kwargs: Any) -> Values:
        if args[2] == 7:
            raise KeyboardInterrupt
        return original(steps, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedSteps, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            stage.run(broken)
    assert EmulatedGraph.made == 2
    stage.run(broken)
    assert EmulatedGraph.made == 3
    ours, theirs = backbone(broken), backbone(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_groups_of_statistics_are_recorded_as_they_pass_on_a_gpu(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SplitBatchNorm2d, "forward", groups_together)
    keys = ["max_steps=5", "epochs=5", BOTH]
    plain, recorded = (plan(config, tmp_path / str(value), *keys, f"compile={value}") for value in ("false", "true"))
    stage.run(plain)
    stage.run(recorded)
    assert EmulatedGraph.replays == 2
    ours, theirs = backbone(recorded), backbone(plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def groups_together(layer: SplitBatchNorm2d, images: torch.Tensor) -> torch.Tensor:
    """What `SplitBatchNorm2d.forward` does on a GPU."""
    if layer.training:
        return layer.together(images)
    layer.fold()
    return torch.nn.BatchNorm2d.forward(layer, images)


def test_a_recording_that_fails_leaves_nothing_behind(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SplitBatchNorm2d, "forward", groups_together)
    original = MoCo.loss

    def failing(model: MoCo, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if host_values._present is not None and host_values._present.recording:
            raise torch.OutOfMemoryError("out of memory")
        return original(model, query, key)

    monkeypatch.setattr(MoCo, "loss", failing)
    keys = ["max_steps=5", "epochs=5", BOTH]
    plain, recorded = (plan(config, tmp_path / str(value), *keys, f"compile={value}") for value in ("false", "true"))
    stage.run(plain)
    stage.run(recorded)
    assert "the step is not recorded as a CUDA graph (out of memory), so it runs" in capfd.readouterr().err
    assert (EmulatedGraph.made, EmulatedGraph.replays) == (1, 0)
    ours, theirs = backbone(recorded), backbone(plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Derived(MoCo):
    """A framework of somebody else; it may do what MoCo does not."""


def test_other_numbers_of_processes_and_frameworks_that_do_not_allow_it_are_not_recorded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = plan(config, tmp_path).recipe
    framework, device = recipe.framework.build(recipe.backbone), torch.device("cpu")
    assert compiling.recorded_steps(framework, recipe, device) is not None
    assert compiling.recorded_steps(Derived(recipe.framework, recipe.backbone), recipe, device) is None
    assert "Derived.recordable is not set: its steps may start other operations" in capfd.readouterr().err
    assert compiling.recorded_steps(framework, plan(config, tmp_path, "accumulate=2").recipe, device) is None
    assert "without CUDA graphs, because accumulate: 2 saves memory" in capfd.readouterr().err
    monkeypatch.setattr(compiling, "world", lambda: World(0, 2))
    assert compiling.recorded_steps(framework, recipe, device) is None
    assert "without CUDA graphs, because 2 processes exchange gradients" in capfd.readouterr().err
