"""What only a GPU can show: no step waits, the kernels' numbers, resume to the bit, NCCL, graphs. Skipped without one."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

pytest.importorskip("triton", reason="triton comes with torch's builds for GPUs")

from mixmask.engine import photometric_kernels
from mixmask.engine.augment import AugmentRecipe, Photometric, apply_photometric, draw_photometric
from mixmask.engine.determinism import deterministic_kernels
from mixmask.engine.job import Backward, Part, Values
from mixmask.engine.loader import Batch
from mixmask.engine.normalization import as_float, normalize
from mixmask.engine.precision import autocast
from mixmask.engine.randomness import generator
from mixmask.engine.recording import REHEARSALS, StepGraph
from mixmask.pretrain import compiling, stage
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.optimizers import build_optimizer
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.recorded_step import RecordedSteps
from mixmask.pretrain.split_batch_norm import SplitBatchNorm2d
from mixmask.pretrain.step import batch_parts
from tests.pretrain.small_runs import BOTH, SMALL_FRAMEWORKS, interrupt_at, plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")
ON_GPU = "device=cuda"


def steps(recipe: PretrainRecipe, num: int) -> None:
    """Whole steps, as the training loop takes them."""
    torch.manual_seed(0)
    model = recipe.framework.build(recipe.backbone).to(DEVICE).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optimizer, model, recipe.batch_size)
    rows = recipe.batch_size
    views = [torch.randint(0, 256, (rows, 3, view.crop, view.crop), dtype=torch.uint8) for view in recipe.views]
    batch = Batch([view.to(DEVICE) for view in views], torch.zeros(rows, device=DEVICE).long(), 0, [*range(rows)], rows)
    for step in range(num):
        # The first step compiles kernels, chooses algorithms and allocates; from the second on nothing may wait.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.zero_grad(set_to_none=True)
            for part in batch_parts(model, recipe, batch, step):
                with autocast(DEVICE, recipe.precision):
                    terms = part()
                terms["loss"].backward()
            model.before_step()
            optimizer.step()
            model.after_step(0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL_FRAMEWORKS)
def test_no_step_waits(config: Path, tmp_path: Path, name: str, precision: str) -> None:
    recipe = plan(config, tmp_path, ON_GPU, SMALL_FRAMEWORKS[name], BOTH, f"precision={precision}").recipe
    steps(recipe, 3)


def test_kernels_do_what_the_operators_do() -> None:
    assert photometric_kernels.usable(DEVICE)
    recipe = AugmentRecipe(crop=224, solarize_probability=0.3)
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8, generator=generator(0))
    found = Photometric(recipe)(images.to(DEVICE), generator(1), slice(0, 64), 64)
    draws = draw_photometric(recipe, 64, generator(1))
    expected = normalize(apply_photometric(as_float(images), draws), recipe.normalization)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_together_are_groups_one_by_one(channels_last: bool) -> None:
    torch.manual_seed(0)
    one, other = SplitBatchNorm2d(64, 8).to(DEVICE), SplitBatchNorm2d(64, 8).to(DEVICE)
    images = torch.randn(64, 64, 16, 16, device=DEVICE) + 1
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        torch.testing.assert_close(one.one_by_one(images), other.together(images), atol=1e-4, rtol=1e-4)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["moco", "byol", "dino"])
def test_a_deterministic_run_resumes_to_the_same_bits(config: Path, tmp_path: Path, name: str) -> None:
    keys = [ON_GPU, "deterministic=true", "precision=bf16", SMALL_FRAMEWORKS[name], BOTH]
    whole, broken = (plan(config, tmp_path / where, *keys) for where in ("whole", "broken"))
    stage.run(whole)
    interrupt_at(5, broken)
    stage.run(broken)
    ours, theirs = load_file(whole.backbone_file), load_file(broken.backbone_file)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


NCCL = """
import torch
import torch.distributed as dist
from mixmask.engine import distributed

device = torch.device("cuda", 0)
dist.init_process_group("nccl", init_method="tcp://127.0.0.1:PORT", world_size=1, rank=0, device_id=device)
numbers = torch.arange(6.0, device=device).view(3, 2)
dist.all_reduce(numbers)
gathered = torch.empty_like(numbers)
dist.all_gather_into_tensor(gathered, numbers)
assert torch.equal(gathered, numbers)
layer = torch.nn.Linear(2, 2).to(device)
wrapped = torch.nn.parallel.DistributedDataParallel(layer, device_ids=[0])
wrapped(numbers).sum().backward()
assert layer.weight.grad is not None
dist.destroy_process_group()
print("fine")
"""


def test_nccl_works_with_one_process() -> None:
    """What `engine.distributed` builds on; whole runs need two GPUs."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", NCCL.replace("PORT", str(port))], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU, and another one")
def test_two_gpus_compute_what_one_does(config: Path, tmp_path: Path) -> None:
    keys = [ON_GPU, "deterministic=true", "max_steps=4", SMALL_FRAMEWORKS["simsiam"], "sync_bn=true"]
    alone = plan(config, tmp_path / "alone", *keys)
    stage.run(alone)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mixmask"]
    done = subprocess.run(
        [*command, "pretrain", str(config), *keys, "--runs", str(tmp_path / "nccl")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = load_file(alone.backbone_file), load_file(next((tmp_path / "nccl").rglob("backbone.safetensors")))
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-3, rtol=1e-3)


def test_compiled_encoders_train_the_same_network(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = [ON_GPU, "max_steps=6", "optimizer.lr=0.3", "monitor={every_epochs: 1, batch_size: 16}"]
    start, eager, compiled = (
        plan(config, tmp_path / name, *keys, *more)
        for name, more in (("start", ["epochs=0"]), ("eager", []), ("compiled", ["compile=true"]))
    )
    torch.compiler.reset()
    counters.clear()
    for one in (start, eager, compiled):
        stage.run(one)
    # Code for each encoder, with a gradient and without; none for evaluations.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    assert "is not recorded" not in capfd.readouterr().err
    before, ours, theirs = (load_file(one.backbone_file) for one in (start, eager, compiled))
    for key in ours:
        if ours[key].is_floating_point() and "running" not in key:
            one, other = (change.flatten() - before[key].flatten() for change in (ours[key], theirs[key]))
            assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98, key


RECORDED = {
    **{name: [framework, BOTH] for name, framework in SMALL_FRAMEWORKS.items() if name != "densecl"},
    "clipped fp16": ["precision=fp16", "clip_norm=1"],
    "evaluated between": ["monitor={every_epochs: 1, batch_size: 16}"],
    "dropped paths": ["backbone.arch=timm/test_efficientnet"],
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_are_steps_to_the_bit(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """The same on a GPU as `test_recorded_step` shows on an emulated graph; inductor's code would round otherwise."""
    monkeypatch.setattr(stage, "compile_encoders", lambda *_: None)
    replays: list[StepGraph] = []
    original = StepGraph.replay
    monkeypatch.setattr(StepGraph, "replay", lambda graph: (replays.append(graph), original(graph)))
    keys = [ON_GPU, "deterministic=true", "max_steps=12", "epochs=5", "precision=bf16", *RECORDED[name]]
    plain, recorded = (plan(config, tmp_path / str(value), *keys, f"compile={value}") for value in ("false", "true"))
    stage.run(plain)
    stage.run(recorded)
    assert "is not recorded" not in capfd.readouterr().err
    assert len(replays) >= 4
    ours, theirs = load_file(recorded.backbone_file), load_file(plain.backbone_file)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_compiled_run_resumes(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "compile_encoders", lambda *_: None)
    keys = [ON_GPU, "deterministic=true", "compile=true", "max_steps=12", "epochs=5", BOTH]
    whole, broken = (plan(config, tmp_path / where, *keys) for where in ("whole", "broken"))
    stage.run(whole)
    original = RecordedSteps.__call__

    def failing(steps: RecordedSteps, backward: Backward, batch: Batch, step: int, diagnosed: bool) -> Values:
        if step == 7:
            raise KeyboardInterrupt
        return original(steps, backward, batch, step, diagnosed)

    with monkeypatch.context() as patch:
        patch.setattr(RecordedSteps, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            stage.run(broken)
    stage.run(broken)
    ours, theirs = load_file(whole.backbone_file), load_file(broken.backbone_file)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_recording_that_fails_leaves_a_run_that_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "compile_encoders", lambda *_: None)
    original = MoCo.loss

    def waits(model: MoCo, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            query.sum().item()
        return original(model, query, key)

    monkeypatch.setattr(MoCo, "loss", waits)
    keys = [ON_GPU, "deterministic=true", "max_steps=8", "epochs=5", BOTH]
    plain, recorded = (plan(config, tmp_path / str(value), *keys, f"compile={value}") for value in ("false", "true"))
    stage.run(plain)
    stage.run(recorded)
    assert "the step is not recorded as a CUDA graph" in capfd.readouterr().err
    ours, theirs = load_file(recorded.backbone_file), load_file(plain.backbone_file)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_replayed_step_does_not_wait(config: Path, tmp_path: Path) -> None:
    recipe = plan(config, tmp_path, ON_GPU, "precision=bf16", BOTH).recipe
    torch.manual_seed(0)
    model = recipe.framework.build(recipe.backbone).to(DEVICE).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optimizer, model, recipe.batch_size)
    recorded = compiling.recorded_steps(model, recipe, DEVICE)
    assert recorded is not None
    rows = recipe.batch_size
    views = [torch.randint(0, 256, (rows, 3, view.crop, view.crop), dtype=torch.uint8) for view in recipe.views]
    batch = Batch([view.to(DEVICE) for view in views], torch.zeros(rows, device=DEVICE).long(), 0, [*range(rows)], rows)

    def backward(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            with autocast(DEVICE, recipe.precision):
                terms = part()
            terms["loss"].backward()
        return terms

    for step in range(REHEARSALS + 4):
        torch.cuda.set_sync_debug_mode("error" if step > REHEARSALS + 1 else "default")
        try:
            recorded(backward, batch, step, diagnosed=False)
            model.before_step()
            optimizer.step()
            model.after_step(0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert recorded.recorder.recording is not None


def test_deterministic_kernels_cover_every_framework(config: Path, tmp_path: Path) -> None:
    for name in SMALL_FRAMEWORKS:
        recipe = plan(config, tmp_path / name, ON_GPU, SMALL_FRAMEWORKS[name], BOTH).recipe
        with deterministic_kernels(True):
            steps(recipe, 1)
