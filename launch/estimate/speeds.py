"""How fast devices are: from a measured ``bench.json``, or assumed from a GPU's peak."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask.engine.errors import ConfigError
from mixmask.engine.wording import closest_first, printable
from mixmask.engine.workload import Workload

# Dense matrix products in TFLOP/s, from the makers' data sheets: bf16, or fp16 of GPUs without bf16.
PEAKS = {
    "v100": 125.0,
    "t4": 65.0,
    "a10": 125.0,
    "a40": 150.0,
    "a100": 312.0,
    "l4": 121.0,
    "l40s": 362.0,
    "rtx3090": 71.0,
    "rtx4090": 165.0,
    "rtx6000ada": 364.0,
    "h100": 989.0,
    "h200": 989.0,
    "b200": 2250.0,
}
ASSUMED_EFFICIENCY = 0.15  # of the peak that a ConvNet's training reaches; convolutions wait for memory
ASSUMED_SHARE = 0.85  # of the bare network's speed that a whole step reaches
ASSUMED_PER_CORE = 650.0  # images/s of a loader core with two views of 224 pixels (benchmarks/results/data_kinds.json)
SMALL = 64  # up to this side in pixels, the measured small network is the better comparison
FORMAT = 1


@dataclass(frozen=True)
class Speed:
    """How fast one device is.

    Attributes:
        name: Of the device.
        source: Where the figures come from, in words.
        rates: Floating-point operations per second in training, by the side of the images of the measured network.
        shares: Share of that rate that whole steps reach, by that side, framework and mixture; empty if assumed.
        per_core: Images/s of a loader core, with two views of 224 pixels.
        measured: Whether anything was measured.
    """

    name: str
    source: str
    rates: dict[int, float]
    shares: dict[tuple[int, str, str], float] = field(default_factory=dict)
    per_core: float = ASSUMED_PER_CORE
    measured: bool = False

    def seconds(self, work: Workload) -> float:
        """Of the arithmetic of a run on one device."""
        return work.operations / (self.rates[self._nearest(work)] * self.share(work))

    def share(self, work: Workload) -> float:
        """The share of the bare network's speed that this work reaches."""
        side = self._nearest(work)
        exactly = self.shares.get((side, work.kind, work.mixture))
        if exactly is not None:
            return exactly
        if work.kind == "frozen":
            return 1.0
        alike = [share for (of, *_), share in self.shares.items() if of == side]
        return statistics.median(alike) if alike else ASSUMED_SHARE

    def _nearest(self, work: Workload) -> int:
        small, large = min(self.rates), max(self.rates)
        return small if work.side <= SMALL else large


def assumed(gpu: str) -> Speed:
    """The speed of a GPU by its peak and a stated efficiency.

    Raises:
        ConfigError: If the GPU is not known; lists those that are.
    """
    name = gpu.lower().replace(" ", "").replace("-", "").replace("_", "")
    if name not in PEAKS:
        raise ConfigError(
            f"--gpu {printable(gpu)}: its speed is not known here; known: {', '.join(closest_first(name, PEAKS))}. Or "
            f"measure it: `mixmask bench OUT` on a machine with one, then --bench OUT/bench.json"
        )
    rate = PEAKS[name] * 1e12 * ASSUMED_EFFICIENCY
    said = f"{PEAKS[name]:g} TFLOP/s of its data sheet × {ASSUMED_EFFICIENCY:.0%} (assumed, not measured)"
    return Speed(name, said, {224: rate})


def measured(file: Path) -> Speed:
    """The speed that `mixmask bench` has measured.

    Raises:
        ConfigError: If the file cannot be read, is not such a file, or lacks the part ``arithmetic``.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(f"{file}: is of format {document['format']!r}; this version reads format {FORMAT}")
        rows: Mapping[str, list[dict[str, Any]]] = document["rows"]
        bare = [row["more"] for row in rows.get("arithmetic", ()) if row["more"]]
        rates = {int(one["crop"]): float(one["flop_per_s"]) for one in bare}
        shares = {}
        for row in rows.get("pretraining", ()):
            kind, _, mixture = row["name"].rpartition(": ")[2].partition(" + ")
            if row["share"] is not None:
                shares[int(row["more"]["crop"]), kind, mixture or "none"] = float(row["share"])
        cores = [float(row["more"]["per_core"]) for row in rows.get("loader", ()) if "per_core" in row["more"]]
        name = str(document["machine"])
    except OSError as error:
        raise ConfigError(f"--bench {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--bench {file}: is not a bench.json of `mixmask bench` ({type(error).__name__}: {error})"
        ) from None
    if not rates or min(rates.values()) <= 0:
        raise ConfigError(f"--bench {file}: lacks the part 'arithmetic'; run `mixmask bench` with it")
    per_core = statistics.median(cores) if cores else ASSUMED_PER_CORE
    return Speed(name, f"measured: {file}", rates, shares, per_core, measured=True)
