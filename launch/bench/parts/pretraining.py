"""Whole pretraining steps of every framework with every mixture."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from typing_extensions import override

from mixmask.engine.errors import UserError
from mixmask.launch.bench.machine import Machine
from mixmask.launch.bench.part import LeftOut, Part, Row
from mixmask.launch.bench.parts.arithmetic import passes
from mixmask.launch.bench.setups import SETUPS, Setup
from mixmask.launch.bench.training_step import Passes, TrainingStep, busy_shares, recipe_of
from mixmask.pretrain.mixtures import MIXTURES

IDLE = 0.85  # a device that is busy for less of the time waits for the host
LARGE = 0.15  # a share of the step that is worth a word


class Pretraining(Part):
    """Images/s of a step, its share of the bound, and what limits it.

    The bound is the time of the step's passes through bare trunks, measured around the step: forward passes, or forward and
    backward passes, of as many pixels as the step sends through its trunks.
    """

    name = "pretraining"
    title = "Pretraining: images/s of whole steps, without the loader"
    place = 1
    share = 0.5

    @override
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        first = ["none", "mixmask", "mixmask+unmix"]  # the others may find no time
        mixtures = [*first, *(kind for kind in MIXTURES.by_name() if kind not in first)]
        wanted = [
            (setup, framework, config, mixture)
            for mixture in mixtures
            for setup in SETUPS
            for framework, config in setup.recipes().items()
        ]
        bounds = {setup.title: Bound(machine, setup) for setup in SETUPS}
        for number, (setup, framework, config, mixture) in enumerate(wanted):
            if machine.left <= 0:
                yield LeftOut(f"{len(wanted) - number} of {len(wanted)} pretraining steps", "the time was up")
                return
            label = f"{setup.title}: {framework}" + f" + {mixture}" * (mixture != "none")
            try:
                recipe = recipe_of(setup, config, mixture, machine)
            except UserError as error:
                yield LeftOut(label, str(error).split("the command line: ")[-1].strip())
                continue
            try:
                yield _row(label, TrainingStep(machine, recipe), bounds[setup.title])
            except torch.OutOfMemoryError:
                yield LeftOut(label, f"not enough memory for a batch of {recipe.batch_size}")
            finally:
                if machine.is_gpu:
                    torch.cuda.empty_cache()


class Bound:
    """The bare trunk of a setup: what a step cannot beat."""

    def __init__(self, machine: Machine, setup: Setup) -> None:
        self.machine, self.batch = machine, setup.batch(machine)
        self.forward, self.both = passes(machine, setup.backbone, setup.crop, self.batch, machine.precision)

    def seconds(self, passed: Passes) -> float:
        """Of the passes of a step, now: other work on the machine slows both down alike."""
        forward, both = (
            self.machine.time(call, most=2, seconds=1.0, least=2).seconds for call in (self.forward, self.both)
        )
        return passed.with_gradient * both + passed.without * forward


def _row(label: str, step: TrainingStep, bound: Bound) -> Row:
    machine, batch = step.machine, step.recipe.batch_size
    step()  # the first one compiles, chooses and allocates
    with step.counted() as passed:
        step()
    before = bound.seconds(passed)
    timing = machine.time(step, most=10, seconds=3.0)
    share = (before + bound.seconds(passed)) / 2 / timing.seconds
    augmentation = machine.time(step.augment, most=5, seconds=1.0).seconds / timing.seconds
    more = {
        "step_s": timing.seconds,
        "fastest_s": timing.fastest,
        "slowest_s": timing.slowest,
        "repeats": timing.repeats,
        "batch": batch,
        "crop": step.recipe.augment.crop,
        "passes_with_gradient": passed.with_gradient,
        "passes_without": passed.without,
        "augmentation_share": augmentation,
    }
    limits = []
    if machine.is_gpu:
        host, device = busy_shares(machine, step)
        more |= {"host_busy": host} | ({} if device is None else {"device_busy": device})
        if device is None:
            limits.append("not known: the profiler sees no kernels")
        elif device < IDLE:
            limits.append(f"the host: the device idles {1 - device:.0%} of the time")
    if augmentation > LARGE:
        limits.append(f"augmentation ({augmentation:.0%})")
    if not limits:
        limits.append("arithmetic" if share > IDLE else "what is not the trunk: projector, losses, optimizer")
    return Row(label, batch / timing.seconds, "images/s", share, "; ".join(limits), more)
