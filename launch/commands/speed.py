"""Commands about time: what a machine does, and what a suite will take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mixmask.engine.builtin_configs import config_file
from mixmask.launch.commands.options import Force, SuiteFile, SuiteOverrides
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


def estimate(
    suite: SuiteFile,
    overrides: SuiteOverrides = None,
    profile: Annotated[
        Path | None, typer.Option(help="The cluster: cores, folders of data, and what its GPUs are (gpu, bench).")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, such as a100; its speed is assumed.")] = None,
    bench: Annotated[Path | None, typer.Option(help="A bench.json of `mixmask bench`; its speed is measured.")] = None,
    cores: Annotated[
        float | None,
        typer.Option(help="Loader cores beside each GPU; by default what jobs ask for, or 8.", min=0.1, max=1024),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs; finished cells count nothing.")] = Path("runs"),
) -> None:
    """Say what a suite will take on 1, 8 and 64 GPUs, and what bounds it: GPU-hours, time, loader cores, storage.

    Data that are not here count with their published size. docs/scaling.md explains the model.

    \b
    Examples:
      mixmask estimate table5 --gpu a100
      mixmask estimate table5 --profile my_cluster.yaml --bench bench/bench.json
    """
    from mixmask.launch.estimate.estimate import describe, speed_of
    from mixmask.launch.slurm.profile import load_profile
    from mixmask.launch.suite.cells import expand
    from mixmask.launch.suite.suite import load_suite

    suite = config_file(suite, "suites")
    chosen = load_suite(suite, overrides or ())
    given = load_profile(config_file(profile, "cluster") if profile is not None else None)
    speed = speed_of(given, gpu, bench)
    cells = expand(chosen, suite.parent, given, runs.resolve())
    beside = 8.0 if cores is None and profile is None else cores
    show(describe(chosen.name, cells, speed, beside))
