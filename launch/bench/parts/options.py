"""What options of pretraining cost or save."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch._dynamo.utils import counters
from typing_extensions import override

from mixmask.engine.determinism import deterministic_kernels
from mixmask.engine.recording import REHEARSALS
from mixmask.launch.bench.machine import Machine
from mixmask.launch.bench.part import LeftOut, Part, Row
from mixmask.launch.bench.setups import SETUPS, Setup
from mixmask.launch.bench.training_step import TrainingStep, recipe_of
from mixmask.pretrain.compiling import obstacle


class Options(Part):
    """MoCo with ``compile: true`` and with ``deterministic: true``, over the step without them."""

    name = "options"
    title = "Options: MoCo's step with them over the step without"
    place = 3
    share = 0.1

    @override
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        if not machine.is_gpu:
            yield LeftOut("compile and deterministic", "they are options for GPUs")
            return
        for setup in SETUPS:
            yield from _of(setup, machine)


def _of(setup: Setup, machine: Machine) -> Iterator[Row | LeftOut]:
    # The step and its graph are dropped with this call, before those of the next setup are made.
    config = next(name for kind, name in setup.recipes().items() if kind.startswith("moco"))
    step = TrainingStep(machine, recipe_of(setup, config, "none", machine))
    torch.compiler.reset()  # what was compiled for the setup before counts towards a limit
    plain = machine.time(step).seconds
    with deterministic_kernels(True):
        yield _row(setup.title, "deterministic: true", machine.time(step).seconds, plain)
    left_out = partial(LeftOut, f"{setup.title}: compile: true")
    why = obstacle(machine.device)
    if why is not None:
        yield left_out(why)
        return
    step.compile()
    for _ in range(REHEARSALS + 2):  # compiles, warms up, and records
        step()
    if step.recorded is None or step.recorded.recorder.recording is None:
        yield left_out("the step was not recorded as a CUDA graph")
        return
    before_it = counters["stats"]["unique_graphs"]
    seconds = machine.time(step).seconds
    if counters["stats"]["unique_graphs"] > before_it:
        yield left_out("it was compiled again while it was measured")
        return
    yield _row(setup.title, "compile: true", seconds, plain)


def _row(title: str, option: str, seconds: float, plain: float) -> Row:
    return Row(f"{title}: {option}", seconds / plain, "× the time", more={"step_s": seconds, "plain_step_s": plain})
