"""The config of a suite: backbones × transfer recipes × seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from mixmask.engine.config import Recipe, load_recipe
from mixmask.engine.records import Label, Method
from mixmask.engine.wording import did_you_mean
from mixmask.launch.slurm.profile import Resources
from mixmask.transfer.checkpoints.export import Target
from mixmask.transfer.protocols import PROTOCOLS

NAME = r"^[A-Za-z0-9_.+-]+$"
SUITE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"  # the name of a folder: neither hidden nor ..


class Entry(Recipe):
    """A recipe of the suite.

    ``config`` is a path relative to the suite's file, or the name of a config of the project. ``set`` replaces keys.
    The keys of ``vary`` take all combinations of the values in their lists, and each combination runs once per seed.
    """

    config: str = Field(min_length=1)
    name: str | None = Field(None, pattern=NAME, description="instead of the config's; varied values are added to it")
    set: dict[str, Any] = Field({})
    vary: dict[str, tuple[Any, ...]] = Field({})
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _has_values(self) -> Entry:
        for key, values in self.vary.items():
            if not values:
                raise ValueError(f"vary.{key} is empty, so nothing would run; list at least one value")
            if key in self.set:
                raise ValueError(f"{key} is in set and in vary; remove one of them")
        for key in ("seed", "name", "backbone"):
            if key in self.set or key in self.vary:
                remedy = {"seed": ": use seeds", "name": ": write name: beside config:"}.get(key, "")
                raise ValueError(f"{key} is the suite's to set{remedy}")
        return self


class CheckpointEntry(Recipe):
    """An existing backbone: this project's file or a checkpoint of a known layout, relative to the suite's file."""

    path: str = Field(min_length=1)
    name: str = Field(pattern=NAME)
    framework: Label | None = None
    method: Method | None = None
    pretrain_epochs: float | None = Field(None, gt=0, le=1e9, allow_inf_nan=False)
    pretrain_data: Label | None = None


class ConvertEntry(Recipe):
    """Formats that every backbone is converted to, with verification."""

    to: tuple[Target, ...] = Field(min_length=1)
    resources: Resources = Resources()


class Grid(Recipe):
    """Every backbone × every transfer recipe."""

    pretrain: tuple[Entry, ...] = ()
    checkpoints: tuple[CheckpointEntry, ...] = ()
    convert: ConvertEntry | None = None
    transfer: tuple[Entry, ...] = ()

    @model_validator(mode="after")
    def _has_cells(self) -> Grid:
        if not self.pretrain and not self.checkpoints:
            raise ValueError(
                "an empty grid: it needs pretrain recipes or checkpoints; on the command line "
                "'checkpoints=[{path: /ckpt/x.pth, name: x}]'"
            )
        if not self.pretrain and not self.transfer and self.convert is None:
            raise ValueError("an empty grid: checkpoints need transfer recipes or convert")
        return self


SMALL = Resources(nodes=1, gpus_per_node=0, tasks_per_node=1, cpus_per_task=2, mem_gb=8, time_min=60)


class StageResources(Recipe):
    """Resources by stage; ``finish`` is the last job, which writes the tables."""

    pretrain: Resources = Resources()
    convert: Resources = SMALL
    transfer: Resources = Resources()
    finish: Resources = SMALL


class Settings(Recipe):
    """Keys for all recipes of a stage or of one protocol.

    Keys of a protocol win over those of ``transfer``; an entry's own ``set`` wins over both.

    Besides ``pretrain`` and ``transfer``, the name of every protocol is a key here.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    pretrain: dict[str, Any] = Field({})
    transfer: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _protocols(self) -> Settings:
        valid = ["pretrain", "transfer", *PROTOCOLS.by_name()]
        for key, value in (self.model_extra or {}).items():
            if key not in valid:
                text = f"unknown key '{key}'. {did_you_mean(key, valid)}".rstrip()
                raise ValueError(f"{text} Valid keys here: {', '.join(valid)}")
            if not isinstance(value, dict):
                raise ValueError(f"{key}: a mapping was expected (given: {value!r})")
        return self

    def of(self, protocol: str) -> dict[str, Any]:
        """The keys of a protocol's recipes."""
        found: dict[str, Any] = (self.model_extra or {}).get(protocol, {})
        return found


class Suite(Recipe):
    """All runs for a table. ``data`` maps a ``data.name`` to its folder and wins over the cluster's profile.

    ``checkpoints`` are added to those of every grid, so that a suite can be launched for any checkpoint by an override.
    """

    name: str = Field(pattern=SUITE_NAME)
    checkpoints: tuple[CheckpointEntry, ...] = ()
    data: dict[str, str] = Field({})
    set: Settings = Settings()
    force: Settings = Field(Settings(), description="as set, but after the recipes' own: what the command line sets")
    resources: StageResources = StageResources()
    grids: tuple[Grid, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _checkpoints_of_all(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("grids"), list | tuple):
            return given
        more = given.get("checkpoints") or []
        if not isinstance(more, list | tuple):
            return given
        grids = [
            {**grid, "checkpoints": [*(grid.get("checkpoints") or []), *more]} if isinstance(grid, dict) else grid
            for grid in given["grids"]
        ]
        return {**given, "checkpoints": [], "grids": grids}


def load_suite(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite.

    Raises:
        ConfigError: As `load_recipe`, for example for a ``base:`` that leads back to itself.
    """
    # ``set`` on the command line becomes ``force``, which also wins over the ``set`` of the entries.
    forced = [f"force.{text.removeprefix('set.')}" if text.startswith("set.") else text for text in overrides]
    return load_recipe(Suite, path, forced)
