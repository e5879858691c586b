"""From cells to job arrays: which cells go together, and what each array waits for.

With SLURM's ``aftercorr``, task i of an array starts when task i of its parent array has succeeded. So pretraining
cells whose children are of the same kinds (stage and resources) form one array. Their children form arrays of the same
length and order: the k-th child of a kind goes into the k-th array of that kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mixmask.launch.slurm.profile import Resources
from mixmask.launch.suite.cells import Cell


@dataclass(frozen=True)
class Array:
    """Cells that are submitted with one ``sbatch``.

    Attributes:
        name: Shown in the queue, unique in a launch.
        resources: Resources of each task.
        cells: The cells in the order of the tasks.
        after: Parent array: task i waits for its task i.
        after_jobs: Ids of earlier jobs that all tasks wait for.
    """

    name: str
    resources: Resources
    cells: tuple[Cell, ...]
    after: Array | None = None
    after_jobs: tuple[str, ...] = field(default=())

    def dependency(self, job_ids: Mapping[str, str]) -> str | None:
        """The dependency in sbatch's syntax, or None; ``job_ids`` holds the ids of earlier arrays by name."""
        if self.after is not None:
            # A single cell is submitted as a plain job, which has no task numbers to match.
            kind = "aftercorr" if len(self.cells) > 1 else "afterok"
            return f"{kind}:{job_ids[self.after.name]}"
        return f"afterok:{':'.join(self.after_jobs)}" if self.after_jobs else None


def plan_arrays(cells: Sequence[Cell], queued: Mapping[str, str], limit: int) -> tuple[Array, ...]:
    """Group cells into arrays, parents first.

    Args:
        cells: What is to be submitted.
        queued: Job ids of cells that are submitted already, by cell id; their children wait for these jobs.
        limit: Largest number of tasks in an array.
    """
    names: dict[str, int] = defaultdict(int)

    def name(chunk: Sequence[Cell]) -> str:
        protocols = {cell.protocol for cell in chunk}
        stage = chunk[0].stage
        base = protocols.pop() if len(protocols) == 1 and stage == "transfer" else stage
        names[base] += 1
        return base if names[base] == 1 else f"{base}-{names[base]}"

    ids = {cell.id for cell in cells}
    children: dict[str, list[Cell]] = defaultdict(list)
    free: dict[tuple[str, Resources, tuple[str, ...]], list[Cell]] = defaultdict(list)
    parents: dict[tuple[Resources, tuple[_Kind, ...]], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.parent is not None and cell.parent in ids:
            children[cell.parent].append(cell)
        elif cell.stage != "pretrain":
            waits: tuple[str, ...] = (queued[cell.parent],) if cell.parent is not None and cell.parent in queued else ()
            free[cell.stage, cell.resources, waits].append(cell)
    for cell in cells:
        if cell.stage == "pretrain":
            kinds = tuple(sorted((_kind(child) for child in children[cell.id]), key=str))
            parents[cell.resources, kinds].append(cell)
    arrays = []
    for (resources, _), members in parents.items():
        for chunk in _chunks(members, limit):
            parent = Array(name(chunk), resources, chunk)
            arrays.append(parent)
            waiting: dict[tuple[_Kind, int], list[Cell]] = defaultdict(list)
            for cell in chunk:
                counts: dict[_Kind, int] = defaultdict(int)
                for child in children[cell.id]:
                    kind = _kind(child)
                    waiting[kind, counts[kind]].append(child)
                    counts[kind] += 1
            for row in waiting.values():
                assert len(row) == len(chunk)
                arrays.append(Array(name(row), row[0].resources, tuple(row), after=parent))
    for (_, resources, jobs), members in free.items():
        arrays += [Array(name(chunk), resources, chunk, after_jobs=jobs) for chunk in _chunks(members, limit)]
    return tuple(arrays)


_Kind = tuple[str, Resources]


def _kind(cell: Cell) -> _Kind:
    return cell.stage, cell.resources


def _chunks(cells: Sequence[Cell], limit: int) -> list[tuple[Cell, ...]]:
    return [tuple(cells[start : start + limit]) for start in range(0, len(cells), limit)]
