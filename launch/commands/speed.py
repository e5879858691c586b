"""Commands about time: what a machine does, and what a suite will take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mixmask.launch.commands.options import Force
from mixmask.launch.commands.terminal import show


def bench(
    out: Annotated[Path, typer.Argument(help="Folder for bench.md and bench.json.")] = Path("bench"),
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What to measure; auto takes a GPU if there is one.")
    ] = "auto",
    minutes: Annotated[
        float, typer.Option(help="Stop after this time; what is left out is said.", min=0.1, max=600)
    ] = 10,
    only: Annotated[list[str] | None, typer.Option(help="Parts to measure, one per --only; all by default.")] = None,
    force: Force = False,
) -> None:
    """Measure how fast this machine pretrains, loads and transfers, and say what limits it.

    Matrix products and bare networks first: they are the bounds. Then whole pretraining steps of every framework with every
    mixture, the loader by cores, kNN, linear probes and detection; lightly and Detectron2 beside them where they can be
    imported. `mixmask estimate` takes the bench.json.

    \b
    Examples:
      mixmask bench
      mixmask bench results/h100 --only arithmetic --only pretraining --minutes 5
    """
    from mixmask.launch.bench.benchmark import run_benchmark

    command = " ".join(["mixmask", *sys.argv[1:]])
    for file in run_benchmark(out, device, minutes, only or (), force, command):
        show(file)
