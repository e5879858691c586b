"""A whole pretraining step as the training loop takes it, without the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mixmask.engine.augment import Photometric
from mixmask.engine.builtin_configs import config_file
from mixmask.engine.config import load_recipe
from mixmask.engine.job import Part
from mixmask.engine.loader import Batch
from mixmask.engine.precision import autocast
from mixmask.engine.randomness import generator
from mixmask.launch.bench.machine import Machine
from mixmask.launch.bench.setups import Setup
from mixmask.pretrain.compiling import compile_encoders, recorded_steps
from mixmask.pretrain.network import Framework
from mixmask.pretrain.optimizers import build_optimizer
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.recorded_step import RecordedSteps
from mixmask.pretrain.step import batch_parts


@dataclass
class Passes:
    """How many images go through the trunks in a step, as multiples of one view of the batch, weighted by area."""

    with_gradient: float = 0.0
    without: float = 0.0


@dataclass
class TrainingStep:
    """A framework, a mixture, and one batch of random pictures on the device."""

    machine: Machine
    recipe: PretrainRecipe
    model: Framework = field(init=False)
    views: list[Tensor] = field(init=False)
    number: int = 0
    recorded: RecordedSteps | None = None

    def __post_init__(self) -> None:
        recipe, device = self.recipe, self.machine.device
        torch.manual_seed(0)
        self.model = recipe.framework.build(recipe.backbone).to(device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(recipe.optimizer, self.model, recipe.batch_size)
        rows = recipe.batch_size
        self.views = [
            torch.randint(0, 256, (rows, view.crop, view.crop, 3), dtype=torch.uint8).permute(0, 3, 1, 2).to(device)
            for view in recipe.views
        ]
        self.labels = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def rows(self) -> list[int]:
        """Of the batch."""
        return list(range(self.recipe.batch_size))

    def __call__(self) -> None:
        """Take a step."""
        recipe, rows = self.recipe, self.rows
        batch = Batch(self.views, self.labels, self.number, rows, len(rows))
        if self.recorded is None:
            self.backward(batch_parts(self.model, recipe, batch, self.number))
        else:
            self.recorded(self.backward, batch, self.number, diagnosed=False)
        self.model.before_step()
        self.optimizer.step()
        self.model.after_step(0.5)
        self.number += 1

    def backward(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Run the forward and backward passes of a step's parts; returns the values of the last one."""
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for part in parts:
            with autocast(self.machine.device, self.machine.precision):
                terms = part()
            torch.autograd.backward(terms["loss"])
        return {name: value.detach() for name, value in terms.items()}

    def compile(self) -> None:
        """Take further steps as ``compile: true`` does."""
        compile_encoders(self.model.encoders(), self.machine.device)
        self.recorded = recorded_steps(self.model, self.recipe, self.machine.device)

    def augment(self) -> None:
        """Only the photometric augmentation of all views."""
        rows = self.rows
        for number, (view, images) in enumerate(zip(self.recipe.views, self.views, strict=True)):
            Photometric(view)(images, generator(0, number), rows, len(rows))

    @contextmanager
    def counted(self) -> Iterator[Passes]:
        """Count the passes of the steps inside."""
        found, whole = Passes(), self.recipe.batch_size * self.recipe.augment.crop**2

        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            num = inputs[0].shape[0] * inputs[0].shape[2] * inputs[0].shape[3] / whole
            if torch.is_grad_enabled():
                found.with_gradient += num
            else:
                found.without += num

        # The first layers are counted, not the trunks: DenseCL calls a trunk's parts.
        hooks = [first_layer(trunk).register_forward_pre_hook(count) for trunk in self.model.encoders()]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def first_layer(trunk: nn.Module) -> nn.Module:
    """The first convolution of a network."""
    return next(module for module in trunk.modules() if isinstance(module, nn.Conv2d))


def recipe_of(setup: Setup, config: str, mixture: str, machine: Machine) -> PretrainRecipe:
    """A built-in recipe with another mixture, and the machine's batch and number format; its data are not opened.

    Raises:
        ConfigError: If framework and mixture do not go together.
    """
    keys = [
        f"batch_size={setup.batch(machine)}",
        f"precision={machine.precision}",
        "data.root=nowhere",
        "monitor=null",
        "accumulate=1",
        f"backbone.arch={setup.backbone.arch}",
        f"mix={{kind: {mixture}}}",
    ]
    return load_recipe(PretrainRecipe, config_file(Path(config), "pretrain"), keys)


def busy_shares(machine: Machine, call: Callable[[], object], steps: int = 3) -> tuple[float, float | None]:
    """Of steps on a GPU, the share of the time in which the host starts work, and in which the device is busy with it.

    None for the device, if the profiler cannot see what it does.
    """
    call()
    machine.wait()
    started = time.perf_counter()
    for _ in range(steps):
        call()
    launched = time.perf_counter() - started
    machine.wait()
    whole = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            call()
        machine.wait()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
    )
    return min(launched / whole, 1.0), min(covered(spans) / 1e6 / whole, 1.0) if spans else None


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals that are sorted by their start."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        if stop > end:
            total += stop - max(start, end)
            end = stop
    return total
