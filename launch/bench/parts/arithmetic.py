"""Matrix products, and bare networks: the bounds of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.flops import forward_flops
from mixmask.engine.precision import Precision, autocast
from mixmask.launch.bench.machine import Machine
from mixmask.launch.bench.part import LeftOut, Part, Row
from mixmask.launch.bench.setups import SETUPS, Setup


class Arithmetic(Part):
    """Peak rates of matrix products, and images/s of the bare trunk: forward, and forward with backward."""

    name = "arithmetic"
    title = "Arithmetic: the bounds"
    place = 0
    share = 0.1

    @override
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        side = 8192 if machine.is_gpu else 2048
        formats: dict[str, Precision] = {machine.precision: machine.precision, "fp32": "fp32"}
        for label, precision in formats.items():
            yield _product(machine, side, label, precision)
        if machine.is_gpu:
            before_tf32 = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            yield _product(machine, side, "tf32", "fp32")
            torch.backends.cuda.matmul.allow_tf32 = before_tf32
        for setup in SETUPS:
            for precision in formats.values():
                yield _bare(machine, setup, precision)


def _product(machine: Machine, side: int, label: str, precision: Precision) -> Row:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    one, other = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
    timing = machine.time(lambda: one @ other)
    return Row(f"{side} × {side} matrices, {label}", 2 * side**3 / timing.seconds / 1e12, "TFLOP/s")


def _bare(machine: Machine, setup: Setup, precision: Precision) -> Row:
    batch = setup.batch(machine)
    forward, both = (
        machine.time(call).seconds for call in passes(machine, setup.backbone, setup.crop, batch, precision)
    )
    work = 3 * forward_flops(setup.backbone, setup.crop) * batch  # the backward pass does twice the forward's
    return Row(
        f"{setup.title}, forward and backward, {precision}, batch {batch}",
        batch / both,
        "images/s",
        limit=f"{work / both / 1e12:,.2f} TFLOP/s",
        more={
            "forward_s_per_image": forward / batch,
            "both_s_per_image": both / batch,
            "flop_per_s": work / both,
            "crop": setup.crop,
            "half": float(precision != "fp32"),
        },
    )


def passes(
    machine: Machine, backbone: BackboneRecipe, crop: int, batch: int, precision: Precision
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass without gradient, and a forward and a backward pass."""
    trunk: nn.Module = build_trunk(backbone).to(machine.device).to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, crop, crop, device=machine.device).contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.no_grad(), autocast(machine.device, precision):
            trunk(images)

    def both() -> None:
        trunk.zero_grad(set_to_none=True)
        with autocast(machine.device, precision):
            loss = trunk(images).float().square().mean()
        loss.backward()

    return forward, both
