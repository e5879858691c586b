"""What a suite takes: the work of its cells, by stage, on 1, 8 and 64 GPUs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.errors import ConfigError, DataError, UserError
from mixmask.engine.images import ImageSet
from mixmask.engine.progress import say
from mixmask.engine.workload import Workload
from mixmask.launch.estimate.model import Cost, cost
from mixmask.launch.estimate.speeds import Speed, assumed, measured
from mixmask.launch.slurm.profile import Profile
from mixmask.launch.suite.cells import Cell
from mixmask.launch.suite.status import duration
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.checkpoints.source import read_source
from mixmask.transfer.protocol import TransferRecipe

COUNTS = (1, 8, 64)
MOST_OF_ONE_RUN = 8  # GPUs that share the batches of one run, unless the cell asks for more
SAMPLED = 100  # files whose size is looked at
# Images of well-known data sets, for estimates before the data are there: training, test. A task may take others.
KNOWN_SIZES = {
    "imagenet": (1_281_167, 50_000),
    "imagenet100": (126_689, 5_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny_imagenet": (100_000, 10_000),
    "voc2007": (5_011, 4_952),
    "voc2007 object-detection": (16_551, 4_952),  # with VOC 2012's training images
    "voc2012": (10_582, 1_449),
    "coco2017": (117_266, 5_000),
    "coco": (117_266, 5_000),
    "cityscapes": (2_975, 500),
    "places205": (2_448_873, 20_500),
    "inaturalist2018": (437_513, 24_426),
}


@dataclass(frozen=True)
class Counted:
    """A split of which only the number of images is known."""

    num: int

    def __len__(self) -> int:
        return self.num


@dataclass(frozen=True)
class CellWork:
    """A cell, and what it computes."""

    cell: Cell
    work: Workload
    bytes_per_image: float


class _Data:
    """Sizes of the data sets: of the folders, or published ones where there is no folder."""

    def __init__(self) -> None:
        self.opened: dict[tuple[str, str], ImageSet] = {}
        self.notes: list[str] = []

    def open_once(self, data: DataRecipe, split: Literal["train", "test"]) -> ImageSet:
        key = (data.model_dump_json(), split)
        if key not in self.opened:
            self.opened[key] = open_split(data, split)
        return self.opened[key]

    def published(self, name: str, task: str, why: UserError) -> tuple[Counted, Counted]:
        key = name.lower().replace("-", "").replace("imagenet1k", "imagenet")
        sizes = KNOWN_SIZES.get(f"{key} {task}", KNOWN_SIZES.get(key))
        if sizes is None:
            raise why
        note = f"{name}: its folder is not there, so its published size is taken ({sizes[0]:,} and {sizes[1]:,} images)"
        if note not in self.notes:
            self.notes.append(note)
        return Counted(sizes[0]), Counted(sizes[1])


def jobs_of(cells: Sequence[Cell]) -> tuple[list[CellWork], list[str]]:
    """The work of every cell that is left to do, and notes about the data.

    Raises:
        UserError: If data are not there and their size is not known, or a backbone cannot be read.
    """
    data = _Data()
    by_id = {cell.id: cell for cell in cells}
    found = []
    for cell in cells:
        if cell.is_finished:
            continue
        if isinstance(cell.recipe, PretrainRecipe):
            found.append(_pretraining(cell, cell.recipe, data))
        elif isinstance(cell.recipe, TransferRecipe):
            found.append(_transfer(cell, cell.recipe, by_id, data))
        else:
            found.append(CellWork(cell, Workload(), 0.0))
    return found, data.notes


def _pretraining(cell: Cell, recipe: PretrainRecipe, data: _Data) -> CellWork:
    train: Any
    try:
        train = data.open_once(recipe.data, "train")
    except DataError as error:
        train, _ = data.published(recipe.data.name, "pretraining", error)
    return CellWork(cell, recipe.workload(len(train), _monitored(recipe, len(train))), bytes_per_image(train))


def _monitored(recipe: PretrainRecipe, num_train: int) -> int:
    monitor = recipe.monitor
    if monitor is None:
        return 0
    bank = num_train if monitor.max_bank is None else min(monitor.max_bank, num_train)
    return bank + (monitor.max_queries or num_train // 10)


def _transfer(cell: Cell, recipe: TransferRecipe, by_id: Mapping[str, Cell], data: _Data) -> CellWork:
    parent = by_id.get(cell.parent) if cell.parent is not None else None
    if parent is not None and isinstance(parent.recipe, PretrainRecipe):
        backbone = parent.recipe.backbone
    else:
        backbone = read_source(Path(recipe.backbone)).info.recipe
    train: Any
    test: Any
    try:
        train, test = recipe.open(data.open_once)
    except DataError as error:
        train, test = data.published(recipe.data.name, recipe.task, error)
        train = Counted(recipe.num_labelled(len(train)))
    return CellWork(cell, recipe.workload(backbone, train, test), bytes_per_image(train))


def bytes_per_image(images: Any) -> float:
    """The mean size of some of a split's files, spread over it; 0 if they are not files of their own."""
    paths = [*getattr(images, "paths", ())]
    sizes = []
    for path in paths[:: max(len(paths) // SAMPLED, 1)]:
        try:
            sizes.append(Path(path).stat().st_size)
        except OSError:
            return 0.0
    return sum(sizes) / len(sizes) if sizes else 0.0


def gpus_of(job: CellWork, available: int) -> int:
    """How many of the available GPUs share a run's batches: as many as its job asks for, or up to eight."""
    return min(max(job.cell.resources.gpus, min(available, MOST_OF_ONE_RUN)), available)


def wall_seconds(jobs: Sequence[CellWork], costs: Mapping[str, Cost], available: int) -> float:
    """When the last run ends, if each starts as soon as its parent has ended and enough GPUs are free.

    Args:
        jobs: Parents before their children.
        costs: By the cell's id; none needs more than ``available`` GPUs.
        available: GPUs.
    """
    ends: dict[str, float] = {}
    free = available
    now, latest = 0.0, 0.0
    running: list[tuple[float, str, int]] = []
    waiting = [*jobs]
    while waiting or running:
        ready = [job for job in waiting if job.cell.parent not in costs or job.cell.parent in ends]
        startable = next((job for job in ready if costs[job.cell.id].gpus <= free), None)
        if startable is not None:
            one = costs[startable.cell.id]
            free -= one.gpus
            heapq.heappush(running, (now + one.seconds, startable.cell.id, one.gpus))
            waiting.remove(startable)
            continue
        now, ended, gpus = heapq.heappop(running)
        ends[ended], latest, free = now, max(latest, now), free + gpus
    return latest


def cores_of(job: CellWork, given: float | None) -> float:
    """Loader cores beside each GPU of a run: what its job asks for, unless they are given."""
    return float(job.cell.resources.cpus_per_task or 1) if given is None else given


def describe(suite: str, cells: Sequence[Cell], speed: Speed, cores: float | None) -> str:
    """The estimate as text: a row for every stage and protocol, and the whole.

    Args:
        suite: Its name.
        cells: All cells of the suite.
        speed: Of a device.
        cores: Loader cores beside each GPU; None takes those that each job asks for.

    Raises:
        UserError: As `jobs_of`.
    """
    jobs, notes = jobs_of(cells)
    if not jobs:
        return f"{suite}: all {len(cells)} cells are finished"
    by_count = {
        count: {
            job.cell.id: cost(job.work, speed, gpus_of(job, count), cores_of(job, cores), job.bytes_per_image)
            for job in jobs
        }
        for count in COUNTS
    }
    rows = [*_rows(jobs, by_count)]
    whole = [f"{sum(one.gpu_hours for one in by_count[1].values()):,.1f}"]
    walls = [duration(wall_seconds(jobs, by_count[count], count)) for count in COUNTS]
    rows.append(["all", str(len(jobs)), *whole, *walls, "", "", ""])
    heads = ["", "runs", "GPU-hours", *(f"{count} GPU{'s' * (count > 1)}" for count in COUNTS)]
    heads += ["bound by (1 GPU)", "loader cores per GPU", "storage per GPU"]
    table = tabulate(
        rows,
        heads,
        tablefmt="simple",
        disable_numparse=True,
        colalign=("left", *("right",) * 5, "left", "right", "right"),
    )
    beside = ", ".join(f"{number:g}" for number in sorted({cores_of(job, cores) for job in jobs}))
    lines = [
        f"{suite}: {len(jobs)} of {len(cells)} cells are left to do, on {speed.name}: {speed.source}",
        f"{beside} loader cores beside each GPU, {speed.per_core:,.0f} images/s each"
        + ("" if speed.measured else " (measured elsewhere)"),
        "",
        table,
        "",
        *(f"note: {note}" for note in notes),
        *_in_half(jobs, speed),
    ]
    if not speed.measured:
        lines.append(
            "The speed is assumed, so expect errors of a factor of two; docs/scaling.md says how it is computed."
        )
    return "\n".join(lines).rstrip()


def _in_half(jobs: Sequence[CellWork], speed: Speed) -> list[str]:
    """A note on what precision=bf16 would save."""
    single = [job.work for job in jobs if not job.work.half and job.work.operations]
    if not single:
        return []
    now, then = (sum(speed.seconds(replace(work, half=half)) for work in single) / 3600 for half in (False, True))
    return [
        f"note: {len(single)} runs are in fp32; with precision=bf16 they take {then:,.1f} GPU-hours instead of {now:,.1f}"
    ]


def _rows(jobs: Sequence[CellWork], by_count: Mapping[int, Mapping[str, Cost]]) -> Iterator[list[str]]:
    groups: dict[str, list[CellWork]] = {}
    for job in jobs:
        dataset = f" on {job.cell.dataset}" if job.cell.dataset else ""
        groups.setdefault(f"{job.cell.protocol}{dataset}", []).append(job)
    for title, members in groups.items():
        costs = [by_count[1][job.cell.id] for job in members]
        hardest = max(costs, key=lambda one: one.cores)
        # Of this stage alone, without what it waits for.
        alone = [CellWork(replace(job.cell, parent=None), job.work, job.bytes_per_image) for job in members]
        walls = [duration(wall_seconds(alone, by_count[count], count)) for count in COUNTS]
        storage = f"{hardest.bytes_per_second / 1e6:,.0f} MB/s" if hardest.bytes_per_second else ""
        cores = f"{hardest.cores:.1f}" if hardest.cores else "none"
        yield [
            title, str(len(members)), f"{sum(one.gpu_hours for one in costs):,.1f}", *walls,
            max(costs, key=lambda one: one.seconds).bound, cores, storage,
        ]  # fmt: skip


def speed_of(profile: Profile, gpu: str | None = None, bench: Path | None = None) -> Speed:
    """The speed of a cluster's devices: measured, if there is a measurement, else assumed; an H100 if nobody says.

    Args:
        profile: Its ``bench`` and ``gpu`` hold where the other arguments are None.
        gpu: Name of a GPU.
        bench: A ``bench.json``.

    Raises:
        ConfigError: As `measured` and `assumed`, or if both are given.
    """
    if gpu is not None and bench is not None:
        raise ConfigError("--gpu and --bench: give one; a bench.json says what it was measured on")
    if bench is None and gpu is None and profile.bench is not None:
        bench = Path(profile.bench).expanduser()
    if bench is not None:
        return measured(bench)
    if gpu is None and profile.gpu is None:
        say("no GPU is named (--gpu, or gpu: in the profile), so an h100 is assumed")
    return assumed(gpu or profile.gpu or "h100")


def short_estimate(cells: Sequence[Cell], profile: Profile) -> str:
    """One line for dry runs, or why there is none."""
    if profile.gpu is None and profile.bench is None:
        return "estimate  ask `mixmask estimate SUITE --gpu …`, or name the GPU in the profile (gpu, bench)"
    try:
        speed = speed_of(profile)
        jobs, _ = jobs_of(cells)
    except UserError as error:
        return f"estimate  none: {error.one_line()}"
    total = sum(cost(job.work, speed, 1, cores_of(job, None), job.bytes_per_image).gpu_hours for job in jobs)
    how = "" if speed.measured else ", speed assumed"
    return f"estimate  about {total:,.1f} GPU-hours on one {speed.name}{how}; `mixmask estimate` shows it by stage"
