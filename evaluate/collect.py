"""Finding the records of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import DataError
from engine.records import Record


@dataclass(frozen=True)
class Collection:
    """What lies in a folder of runs.

    Attributes:
        records: Of finished runs, ordered by path.
        damaged: Files that should be records and are not, with the reason.
        unfinished: Run directories without a record.
    """

    records: tuple[Record, ...]
    damaged: tuple[tuple[Path, str], ...]
    unfinished: tuple[Path, ...]


def collect(runs: Path) -> Collection:
    """Read every ``record.json`` below a folder.

    Raises:
        DataError: If the folder is missing, or holds no finished run (the unfinished and damaged ones are named).
    """
    if not runs.is_dir():
        raise DataError(f"{runs}: no such folder of runs")
    records, damaged = [], []
    for path in sorted(runs.rglob("record.json")):
        try:
            records.append(Record.read(path))
        except (ValueError, OSError) as error:
            damaged.append((path, str(error).splitlines()[0]))
    unfinished = tuple(
        path.parent for path in sorted(runs.rglob("recipe.yaml")) if not (path.parent / "record.json").exists()
    )
    if not records:
        detail = "".join(f"\n  unfinished: {path}" for path in unfinished)
        detail += "".join(f"\n  damaged: {path} ({reason})" for path, reason in damaged)
        raise DataError(f"{runs}: no finished run{':' + detail if detail else ''}")
    return Collection(tuple(records), tuple(damaged), unfinished)
