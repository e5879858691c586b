"""Run the parts of the benchmark within a time, and write what they found as Markdown and JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from mixmask.engine.errors import RunFailure, UserError
from mixmask.engine.precision import DeviceName, resolve_device
from mixmask.engine.progress import say
from mixmask.engine.records import environment
from mixmask.engine.storage import require_output_file, write_text
from mixmask.engine.wording import printable
from mixmask.launch.bench.machine import Machine, processor
from mixmask.launch.bench.part import PARTS, LeftOut, Part, Row

FORMAT = 1  # of the JSON file


@dataclass
class Findings:
    """What a benchmark found.

    Attributes:
        machine: The device's name.
        environment: Versions and hardware.
        command: How it was run.
        seconds: How long it took.
        rows: By the part's name.
        left_out: What was not measured, by the part's name.
    """

    machine: str
    environment: dict[str, Any]
    command: str
    seconds: float = 0.0
    rows: dict[str, list[Row]] = field(default_factory=dict)
    left_out: dict[str, list[LeftOut]] = field(default_factory=dict)

    def as_json(self) -> str:
        """The text of ``bench.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def as_markdown(self, titles: dict[str, str]) -> str:
        """The text of ``bench.md``."""
        versions = self.environment
        lines = [
            f"# {self.machine}",
            "",
            f"`{self.command}`, {self.seconds:,.0f} s; torch {versions.get('torch')}, torchvision "
            f"{versions.get('torchvision')}, {versions.get('cpu')}, commit {str(versions.get('git_commit'))[:10]}.",
        ]
        for name, title in titles.items():
            rows, missing = self.rows.get(name, []), self.left_out.get(name, [])
            if not rows and not missing:
                continue
            lines += ["", f"## {title}", ""]
            if rows:
                shares = any(row.share is not None for row in rows)
                table = [
                    [row.name, _number(row.value), row.unit, *([_share(row.share)] * shares), row.limit] for row in rows
                ]
                heads = ["", "", "", *(["of the bound"] * shares), "what limits it"]
                aligned = ("left", "right", "left", *(("right",) * shares), "left")
                lines += [tabulate(table, heads, tablefmt="pipe", colalign=aligned, disable_numparse=True), ""]
            lines += [f"- not measured: {one.what}: {one.why}" for one in missing]
        return "\n".join(lines).rstrip() + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def run_benchmark(
    out: Path, device: DeviceName, minutes: float, only: Sequence[str], force: bool, command: str
) -> list[Path]:
    """Measure, and write ``bench.md`` and ``bench.json``; both are written after every row.

    Args:
        out: The folder.
        device: What to measure.
        minutes: The time limit. Parts share it, and what one does not use goes to the later ones.
        only: Names of parts; all by default.
        force: Replace an earlier benchmark.
        command: The command line, for the report.

    Raises:
        ConfigError: If there is no such part or device.
        UserError: If the files are there already, or cannot be written.
    """
    chosen = [PARTS.get(name, "--only") for name in only] if only else PARTS.classes()
    parts: list[Part] = [part() for part in sorted(dict.fromkeys(chosen), key=lambda part: part.place)]
    there = resolve_device(device)
    files = [out / "bench.md", out / "bench.json"]
    for file in files:
        require_output_file(file, force)
    started = time.monotonic()
    ends = started + 60 * minutes
    machine = Machine(there, ends)
    hardware = {**environment(), "cpu": processor()}
    findings = Findings(machine.name, hardware, command)
    titles = {part.name: part.title for part in parts}
    for number, part in enumerate(parts):
        # A part may use its share of what is left; what it leaves goes to the later ones.
        share = part.share / sum(one.share for one in parts[number:])
        machine.ends = time.monotonic() + max(ends - time.monotonic(), 0.0) * share
        say(f"{part.title} (at most {max(machine.left, 0.0):,.0f} s)")
        for _ in _measured(part, machine, findings):
            findings.seconds = round(time.monotonic() - started, 1)
            for file, text in zip(files, (findings.as_markdown(titles), findings.as_json()), strict=True):
                write_text(file, text)
    return files


def _measured(part: Part, machine: Machine, findings: Findings) -> Iterator[None]:
    """Yield after every row, so that none is lost."""
    rows = findings.rows.setdefault(part.name, [])
    missing = findings.left_out.setdefault(part.name, [])
    try:
        for one in part.measure(machine, findings.rows):
            if isinstance(one, LeftOut):
                missing.append(one)
                say(f"  not measured: {one.what}: {one.why}")
            else:
                rows.append(one)
                share = "" if one.share is None else f" ({_share(one.share)} of the bound)"
                say(f"  {one.name}: {_number(one.value)} {one.unit}{share}")
            yield
    except (RuntimeError, UserError, RunFailure) as error:  # memory, drivers, an operation that a device does not have
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing.append(LeftOut("the rest of it", why))
        say(f"  not measured: the rest of it: {printable(why)}")
        yield
    finally:
        if machine.is_gpu:
            torch.cuda.empty_cache()
