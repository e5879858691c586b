"""The logs of training runs, as far as they can be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmask.engine.errors import DataError
from mixmask.engine.texts import read_run_file

MAX_LOG = 1 << 28  # bytes
LARGEST = 1e12  # a larger value is taken for damage


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``log.jsonl`` that are whole and have a ``step``; an empty list if the file cannot be read."""
    entries = []
    try:
        lines = read_run_file(path, MAX_LOG).decode(errors="replace").splitlines()
    except DataError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and number_of(entry, "step") is not None:
            entries.append(entry)
    return entries


def number_of(entry: Mapping[str, Any], key: str) -> float | None:
    """The value of a key, if it is a finite number that can be plotted; else None."""
    value = entry.get(key)
    plottable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if plottable and value is not None else None
