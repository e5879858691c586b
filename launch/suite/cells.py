"""Expand a suite into its cells, and check their data and sizes."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.builtin_configs import config_file
from mixmask.engine.config import fingerprint_of, load_recipe, read_key
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe, OpenImages
from mixmask.engine.errors import ConfigError, listed
from mixmask.engine.images import ImageSet
from mixmask.engine.progress import say
from mixmask.engine.storage import RunDirectory, locate_run
from mixmask.launch.slurm.profile import Profile, Resources
from mixmask.launch.suite.manifest import LaunchedCell, Stage
from mixmask.launch.suite.suite import CheckpointEntry, ConvertEntry, Entry, Grid, Suite
from mixmask.pretrain.inputs import check_inputs
from mixmask.pretrain.recipe import BACKBONE_FILE, PretrainRecipe, locate
from mixmask.transfer import stage as transfer_stage
from mixmask.transfer.checkpoints.export import SUFFIXES, Target, require_known_network
from mixmask.transfer.checkpoints.source import Source, read_source
from mixmask.transfer.protocol import LABELS, TransferRecipe
from mixmask.transfer.recipe import load_transfer_recipe, protocol_of
from mixmask.transfer.zoo.references import ZOO, Located, is_reference, locate_checkpoint

ORIGIN = "the suite"  # the source of a cell's overrides, for error messages


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        stage: Kind of work.
        name: Readable name with varied values and seeds.
        fingerprint: Identity of the work.
        run: Its run directory.
        resources: Resources of its job, with the cluster's defaults.
        protocol: As in records; for conversions the target.
        dataset: Name of the data set; empty for conversions.
        seed: Seed of the run.
        recipe: Recipe of pretraining or transfer; None for conversions.
        source: File of the backbone to convert; None otherwise.
        target: Format to convert to; None otherwise.
        parent: Id of the pretraining cell whose backbone it needs, if that cell is part of this suite.
    """

    stage: Stage
    name: str
    fingerprint: str
    run: Path
    resources: Resources
    protocol: str
    dataset: str
    seed: int
    recipe: PretrainRecipe | TransferRecipe | None = None
    source: Path | None = None
    target: Target | None = None
    parent: str | None = None

    @property
    def id(self) -> str:
        """Names the cell on the command line: ``transfer/cifar100-moco-knn-1a2b3c4d5e6f``."""
        return f"{self.stage}/{self.run.name}"

    @property
    def done(self) -> tuple[Path, ...]:
        """The files that exist once the work is done."""
        if self.target is not None:
            return (self.run / f"backbone{SUFFIXES[self.target][0]}",)
        record = RunDirectory(self.run).record_file
        return (record, self.run / BACKBONE_FILE) if self.stage == "pretrain" else (record,)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return all(file.is_file() for file in self.done)

    def launched(self) -> LaunchedCell:
        """The cell as it is stored in the launch's file."""
        return LaunchedCell(
            id=self.id,
            stage=self.stage,
            name=self.name,
            protocol=self.protocol,
            dataset=self.dataset,
            seed=self.seed,
            run=self.run,
            done=self.done,
            parent=self.parent,
        )


def expand(suite: Suite, folder: Path, profile: Profile, runs: Path, download: bool = False) -> tuple[Cell, ...]:
    """The cells of a suite; a pretraining cell comes before the cells that need its backbone.

    Args:
        suite: What to run.
        folder: What its paths are relative to.
        profile: Gives default resources and the folders of data sets.
        runs: Folder of all runs.
        download: Whether checkpoints that are named as ``zoo:…`` or ``hf:…`` may be downloaded.

    Raises:
        UserError: If a recipe or checkpoint cannot be read, a data set's name is unknown, or two cells are the same work.
    """
    grower = _Expansion(suite, folder, profile, runs, download)
    cells = [cell for grid in suite.grids for cell in grower.grid(grid)]
    unknown = sorted(set(suite.data) - grower.datasets)
    if unknown:
        raise ConfigError(
            f"data: no recipe of suite '{suite.name}' has the data set {', '.join(unknown)}; "
            f"there are: {', '.join(sorted(grower.datasets))}"
        )
    found: dict[tuple[str, str], Cell] = {}
    doubled = []
    for cell in cells:
        first = found.setdefault((cell.stage, cell.fingerprint), cell)
        if first is not cell:
            doubled.append(f"{first.stage}: {first.name} and {cell.name}, seed {cell.seed}")
    if doubled:
        raise ConfigError(
            f"suite '{suite.name}' contains duplicate cells; remove one of each pair:",
            *listed(doubled),
        )
    named = Counter((cell.stage, cell.name) for cell in cells)
    for (stage, name), count in named.items():
        if count > 1:
            say(
                f"warning: {count} cells of {stage} are called {name}; give each entry of suite {suite.name} a `name:` of "
                f"its own, beside `config:`, so that tables and status tell them apart"
            )
    return tuple(cells)


@dataclass(frozen=True)
class _Backbone:
    name: str
    network: BackboneRecipe
    file: Path
    fingerprint: str
    cell: Cell | None
    labels: dict[str, str]
    located: Located | None = None

    @property
    def reference(self) -> str:
        """What transfer recipes call it."""
        entry = None if self.located is None else self.located.entry
        return str(self.file.resolve()) if entry is None else f"{ZOO}{entry.name}"


class _Expansion:
    def __init__(self, suite: Suite, folder: Path, profile: Profile, runs: Path, download: bool) -> None:
        self.suite, self.folder, self.profile, self.runs, self.download = suite, folder, profile, runs, download
        self.datasets: set[str] = set()
        self.sources: dict[Path, Source] = {}

    def grid(self, grid: Grid) -> Iterator[Cell]:
        backbones = []
        for entry in grid.pretrain:
            for name, overrides, seed in self._variants(entry, self.suite.set.pretrain, self.suite.force.pretrain):
                cell = self._pretrain(entry, name, overrides, seed)
                yield cell
                file = cell.run / BACKBONE_FILE
                assert isinstance(cell.recipe, PretrainRecipe)
                backbones.append(_Backbone(cell.name, cell.recipe.backbone, file, cell.fingerprint, cell, {}))
        backbones += [self._checkpoint(entry) for entry in grid.checkpoints]
        for target in grid.convert.to if grid.convert is not None else ():
            assert grid.convert is not None
            for backbone in backbones:
                yield self._convert(grid.convert, backbone, target)
        for entry in grid.transfer:
            config = self._config(entry, "transfer")
            kind = protocol_of(config)
            if len(entry.seeds) > 1 and not kind.depends_on_seed:
                say(f"warning: {config}: the seed does not change its result; leave its `seeds` out")
            protocol = read_key(config, (), "protocol")
            common = {**self.suite.set.transfer, **self.suite.set.of(protocol)}
            forced = {**self.suite.force.transfer, **self.suite.force.of(protocol)}
            for name, overrides, seed in self._variants(entry, common, forced):
                for backbone in backbones:
                    yield self._transfer(entry, backbone, name, overrides, seed)

    def _variants(
        self, entry: Entry, common: Mapping[str, Any], forced: Mapping[str, Any]
    ) -> Iterator[tuple[str, list[str], int]]:
        """Yield (name suffix, overrides, seed) for every combination of varied values and seeds."""
        # Later overrides win: keys of the suite, of the entry, varied values, then keys from the command line.
        fixed = [_override(key, value) for key, value in {**common, **entry.set}.items()]
        last = [_override(key, value) for key, value in forced.items()]
        for values in itertools.product(*entry.vary.values()):
            chosen = dict(zip(entry.vary, values))
            suffix = "".join(f"_{key.split('.')[-1]}-{_readable(value)}" for key, value in chosen.items())
            varied = [_override(key, value) for key, value in chosen.items()]
            for seed in entry.seeds:
                which = f"_seed-{seed}" if len(entry.seeds) > 1 else ""
                yield suffix + which, [*fixed, *varied, *last, f"seed={seed}"], seed

    def _config(self, entry: Entry, kind: str) -> Path:
        """Path of a recipe's config: a file relative to the suite's, or a config of the project by its name."""
        beside = self.folder / entry.config
        given = Path(entry.config)
        return beside if beside.exists() or len(given.parts) > 1 else config_file(given, kind)

    def _data(self, name: str, entry: Entry) -> list[str]:
        """The override of ``data.root`` from suite or profile; empty if they have none or the entry sets it itself."""
        self.datasets.add(name)
        place = {**self.profile.data, **self.suite.data}.get(name)
        said = "data.root" in entry.set or "root" in (entry.set.get("data") or {})
        return [] if place is None or said else [_override("data.root", place)]

    def _monitor_data(self, recipe: PretrainRecipe) -> list[str]:
        """The override of ``monitor.data.root``, if suite or profile have a place for the monitor's own data."""
        data = None if recipe.monitor is None else recipe.monitor.data
        if data is None:
            return []
        self.datasets.add(data.name)
        place = {**self.profile.data, **self.suite.data}.get(data.name)
        return [] if place is None else [_override("monitor.data.root", place)]

    def _resources(self, stage: Stage, own: Resources) -> Resources:
        common: Resources = getattr(self.suite.resources, stage)
        return self.profile.resolve(own.over(common))

    def _pretrain(self, entry: Entry, suffix: str, overrides: list[str], seed: int) -> Cell:
        # Read twice: the data set and name of the first recipe decide on further overrides of the second.
        config = self._config(entry, "pretrain")
        recipe = load_recipe(PretrainRecipe, config, overrides, ORIGIN)
        overrides = [
            *overrides,
            *self._data(recipe.data.name, entry),
            *self._monitor_data(recipe),
            _override("name", (entry.name or recipe.name) + suffix),
        ]
        recipe = load_recipe(PretrainRecipe, config, overrides, ORIGIN)
        fingerprint, run = locate(recipe, self.runs)
        resources = self._resources("pretrain", entry.resources)
        return Cell(
            "pretrain",
            recipe.name,
            fingerprint,
            run.path,
            resources,
            "pretrain",
            recipe.data.name,
            seed,
            recipe=recipe,
        )

    def _checkpoint(self, entry: CheckpointEntry) -> _Backbone:
        located = self._located(entry.path)
        path = located.path
        if path not in self.sources:
            self.sources[path] = read_source(path, located.reading)
        known = located.entry.labels if located.entry is not None else {}
        labels = {key: getattr(entry, key) or known.get(key) for key in LABELS}
        given = {key: value for key, value in labels.items() if value is not None}
        transfer_stage.check_labels(given, self.sources[path])
        info = self.sources[path].info
        return _Backbone(entry.name, info.recipe, path, info.fingerprint, None, given, located)

    def _located(self, given: str) -> Located:
        """A checkpoint's file: one of the zoo or the Hub, or a path relative to the suite's file."""
        if is_reference(given):
            return locate_checkpoint(given, self.download)
        named = Path(given).expanduser()
        path = (self.folder / named).resolve()
        if not path.exists() and named.exists():  # from the command line
            path = named.resolve()
        return Located(path)

    def _convert(self, entry: ConvertEntry, backbone: _Backbone, target: Target) -> Cell:
        require_known_network(backbone.network, target, f"convert: {backbone.name}")
        fingerprint = fingerprint_of({"stage": "convert", "to": target}, parent=backbone.fingerprint)
        run = locate_run(self.runs, "convert", f"{backbone.name}-{target}", fingerprint)
        return Cell(
            "convert",
            f"{backbone.name}-{target}",
            fingerprint,
            run.path,
            self._resources("convert", entry.resources),
            target,
            "",
            0,
            source=backbone.file,
            target=target,
            parent=None if backbone.cell is None else backbone.cell.id,
        )

    def _transfer(self, entry: Entry, backbone: _Backbone, suffix: str, overrides: list[str], seed: int) -> Cell:
        config = self._config(entry, "transfer")
        overrides = [*overrides, _override("backbone", backbone.reference)]
        overrides += [_override(key, value) for key, value in backbone.labels.items()]
        recipe = load_transfer_recipe(config, overrides, ORIGIN)
        name = f"{backbone.name}-{entry.name or recipe.name}{suffix}"
        recipe = load_transfer_recipe(
            config, [*overrides, *self._data(recipe.data.name, entry), _override("name", name)], ORIGIN
        )
        if backbone.located is not None:
            recipe = backbone.located.known(recipe)
        fingerprint, run = transfer_stage.locate(recipe, backbone.fingerprint, self.runs)
        resources = self._resources("transfer", entry.resources)
        return Cell(
            "transfer",
            name,
            fingerprint,
            run.path,
            resources.over(Resources(one_task_per_node=True)) if recipe.one_task_per_node() else resources,
            recipe.record_name,
            recipe.data.name,
            seed,
            recipe=recipe,
            parent=None if backbone.cell is None else backbone.cell.id,
        )


def _override(key: str, value: object) -> str:
    return f"{key}={json.dumps(value)}"  # JSON is YAML


def _readable(value: object) -> str:
    """A value as part of a name."""
    text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-").lower() or "none"


def check_cells(cells: Sequence[Cell]) -> None:
    """Open each data set once, and check that the recipes' sizes fit the data and the number of processes.

    Raises:
        UserError: With the cell's name.
    """
    opened: dict[tuple[str, str], ImageSet] = {}
    seen = set()

    def open_once(data: DataRecipe, split: Literal["train", "test"]) -> ImageSet:
        key = (data.model_dump_json(), split)
        if key not in opened:
            opened[key] = open_split(data, split)
        return opened[key]

    for cell in cells:
        if cell.recipe is None:
            continue
        # Cells that differ in these keys only have the same data and sizes, so one of them is checked.
        labels = {"name", "seed"} | ({"backbone", *LABELS} if cell.stage == "transfer" else set())
        key = f"{cell.recipe.model_dump_json(exclude=labels)} {cell.resources.processes}"
        if key not in seen:
            seen.add(key)
            try:
                _check_cell(cell, open_once)
            except ConfigError as error:
                raise ConfigError(f"{cell.id}: {error.one_line()}") from None


def _check_cell(cell: Cell, open_images: OpenImages) -> None:
    processes = cell.resources.processes
    if isinstance(cell.recipe, PretrainRecipe):
        check_inputs(cell.recipe, processes, open_images)
        return
    assert cell.recipe is not None
    cell.recipe.check_processes(processes)
    cell.recipe.open(open_images)
