"""How the benchmarks measure: A and B interleaved in one process, medians and the range, versions and hardware."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixmask.engine.records import environment
from mixmask.engine.storage import write_text
from mixmask.launch.bench.machine import processor

Call = Callable[[], object]


def seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: Mapping[str, Call], repeats: int, reference: str) -> dict[str, dict[str, Any]]:
    """Seconds of every call, one after another ``repeats`` times after a warm-up, and their ratio to the reference's."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    result = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[reference])]
        result[name] = {
            "seconds": statistics.median(values),
            "seconds_range": [min(values), max(values)],
            f"over_{reference}": statistics.median(ratios),
            f"over_{reference}_range": [min(ratios), max(ratios)],
        }
    return result


def report(name: str, command: str, answers: list[dict[str, Any]], out: Path) -> None:
    """Print the answers and write them with versions and hardware to ``out/name.json``."""
    for answer in answers:
        print(f"\n{answer['question']}")
        for key, value in answer.items():
            if key != "question":
                print(f"  {key}: {json.dumps(value, default=str)}")
    content = {"command": command, "environment": {**environment(), "processor": processor()}, "answers": answers}
    write_text(out / f"{name}.json", json.dumps(content, indent=2) + "\n")
    print(f"\n{out / f'{name}.json'}")


def parser(documentation: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return made
