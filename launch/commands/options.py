"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace keys of the config, e.g. epochs=10 data.root=/data/mine."),
]
Config = Annotated[Path, typer.Argument(help="A YAML file, or the name of a config (see mixmask configs).")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
RunDir = Annotated[Path | None, typer.Option(help="Run directory. By default runs/<stage>/<name>-<fingerprint>.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and what would run; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]
SuiteFile = Annotated[Path, typer.Argument(help="A YAML file, or the name of a suite (see mixmask configs suites).")]
SuiteOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace keys of the suite, e.g. data.cifar100=/data/cifar100."),
]
