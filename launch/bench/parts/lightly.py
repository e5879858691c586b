"""lightly's MoCo step in the same run, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from mixmask.engine.backbones import build_trunk, width_of
from mixmask.engine.precision import autocast
from mixmask.launch.bench.machine import Machine
from mixmask.launch.bench.part import LeftOut, Part, Row
from mixmask.launch.bench.parts.pretraining import Bound
from mixmask.launch.bench.setups import SETUPS, Setup
from mixmask.launch.bench.training_step import Passes


class Lightly(Part):
    """The step of lightly's MoCo example on the same trunk: with its defaults (fp32), and in our number format."""

    name = "lightly"
    title = "lightly's MoCo step: the same trunk and batch, without augmentation"
    place = 2
    share = 0.1

    @override
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        try:
            import lightly.loss
            import lightly.models.modules
        except ImportError as error:
            yield LeftOut("lightly's step", f"lightly cannot be imported ({error}); pip install lightly")
            return
        bounds = {setup.title: Bound(machine, setup) for setup in SETUPS}
        for setup in SETUPS:
            for precision in dict.fromkeys(("fp32", machine.precision)):
                if machine.left <= 0:
                    yield LeftOut(f"lightly, {setup.title}, {precision}", "the time was up")
                    continue
                batch = setup.batch(machine)
                timing = machine.time(_step(machine, setup, batch, precision, lightly), most=8, seconds=3.0)
                least = bounds[setup.title].seconds(Passes(1.0, 1.0))
                yield Row(
                    f"{setup.title}, {precision}, batch {batch}", batch / timing.seconds, "images/s",
                    share=least / timing.seconds, limit="one forward and backward pass and one forward pass",
                )  # fmt: skip


def _step(machine: Machine, setup: Setup, batch: int, precision: Any, lightly: Any) -> Callable[[], None]:
    trunk = build_trunk(setup.backbone).to(machine.device)
    head = lightly.models.modules.MoCoProjectionHead(width_of(trunk), width_of(trunk), 128).to(machine.device)
    fast = nn.Sequential(trunk, head)
    slow = copy.deepcopy(fast).requires_grad_(False)
    criterion = lightly.loss.NTXentLoss(memory_bank_size=(4096, 128)).to(machine.device)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.06)
    first, second = (torch.randn(batch, 3, setup.crop, setup.crop, device=machine.device) for _ in range(2))

    def step() -> None:
        lightly.models.utils.update_momentum(fast, slow, m=0.99)
        with autocast(machine.device, precision):
            query = fast(first)
            with torch.no_grad():
                key = slow(second)
            loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
