"""What was launched: one file per launch, with every cell of the suite, its job and its log."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mixmask.engine.errors import UserError
from mixmask.engine.storage import write_text

Stage = Literal["pretrain", "convert", "transfer"]
Cluster = Literal["slurm", "local", "inline"]
SEED = re.compile(r"_seed-([0-9]+)")  # added to a cell's name if its entry has several seeds


class LaunchedCell(BaseModel):
    """A cell as it was launched.

    ``done`` lists the files that exist once the cell is finished. ``job`` is its SLURM job (``12_3``) or the process
    that `--cluster local` started; None without either, for example if the cell was finished before the launch.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    stage: Stage
    name: str
    protocol: str
    dataset: str
    seed: int
    run: Path
    done: tuple[Path, ...]
    parent: str | None
    job: str | None = None
    log: Path | None = None

    @property
    def recipe(self) -> str:
        """The name that all seeds of a recipe share, such as ``transfer/cifar100-moco-knn``."""
        return f"{self.stage}/{SEED.sub('', self.name)}"

    @property
    def seeds(self) -> str:
        """The seed, such as ``0``, or ``0/1`` if backbone and cell both have several; empty with a single seed."""
        return "/".join(SEED.findall(self.name))

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return all(file.is_file() for file in self.done)


class Launch(BaseModel):
    """One ``mixmask launch``."""

    model_config = ConfigDict(extra="forbid")

    suite: str
    created: datetime
    cluster: Cluster
    folder: Path
    commit: str | None
    snapshot: Path | None
    cells: tuple[LaunchedCell, ...]
    jobs: tuple[str, ...] = ()
    finish_job: str | None = None

    @property
    def file(self) -> Path:
        """Path of the launch's file."""
        return self.folder / "launch.json"

    def write(self) -> None:
        """Write the file whole or not at all."""
        write_text(self.file, self.model_dump_json(indent=1) + "\n")


def suite_folder(runs: Path, suite: str) -> Path:
    """The folder of a suite: its launches, code snapshots and tables."""
    return runs / "suites" / suite


def new_launch_folder(runs: Path, suite: str) -> tuple[Path, datetime]:
    """The path of a new launch's folder and the present time; the folder's name sorts by time."""
    now = datetime.now(timezone.utc)
    stamp = now.strftime("%Y%m%d-%H%M%S-%f")
    return suite_folder(runs, suite) / "launches" / f"{stamp}-{secrets.token_hex(2)}", now


def launches(runs: Path, suite: str | None = None) -> Iterator[Launch]:
    """The launches of a suite, or of all suites, oldest first.

    Raises:
        UserError: If a file is damaged.
    """
    found = (runs / "suites").glob(f"{suite or '*'}/launches/*/launch.json")
    for file in sorted(found, key=lambda file: file.parent.name):
        try:
            yield Launch.model_validate_json(file.read_text(encoding="utf-8"))
        except (ValidationError, json.JSONDecodeError) as error:
            raise UserError(
                f"{file}: damaged ({str(error).splitlines()[0]}); delete it to forget that launch"
            ) from None


def latest(runs: Path, suite: str) -> Launch:
    """The newest launch of a suite.

    Raises:
        UserError: If there is none; the suites that have been launched are named.
    """
    found = list(launches(runs, suite))
    if not found:
        known = sorted({path.parent.name for path in (runs / "suites").glob("*/launches")})
        raise UserError(
            f"{runs}: suite '{suite}' has not been launched from this folder of runs. "
            + (f"Launched suites: {', '.join(known)}" if known else "No suite has; see mixmask launch --help")
        )
    return found[-1]
