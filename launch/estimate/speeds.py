"""How fast devices are: from a measured ``bench.json``, or assumed from a GPU's peak."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask.engine.errors import ConfigError
from mixmask.engine.wording import closest_first, printable
from mixmask.engine.workload import Workload

# Dense matrix products in TFLOP/s, from the makers' data sheets: in bf16 (fp16 of GPUs without it), and in fp32. The latter
# is TF32's where the GPU has it, because torch's convolutions take it.
PEAKS = {
    "v100": (125.0, 15.7),
    "t4": (65.0, 8.1),
    "a10": (125.0, 62.5),
    "a40": (150.0, 75.0),
    "a100": (312.0, 156.0),
    "l4": (121.0, 60.0),
    "l40s": (362.0, 183.0),
    "rtx3090": (71.0, 35.6),
    "rtx4090": (165.0, 82.6),
    "rtx6000ada": (364.0, 182.0),
    "h100": (989.0, 494.0),
    "h200": (989.0, 494.0),
    "b200": (2250.0, 1125.0),
}
WITHOUT_TF32 = ("v100", "t4")
ASSUMED_EFFICIENCY = 0.15  # of the peak of tensor cores that a ConvNet's training reaches; convolutions wait for memory
EFFICIENCY_WITHOUT = 0.5  # of the peak of fp32 without tensor cores, which is so low that memory is seldom waited for
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
        rates: Floating-point operations per second in training, by the side of the measured network's images, and by whether
            it computed in half precision.
        shares: Share of that rate that whole steps reach, by that side, framework and mixture; empty if assumed.
        per_core: Images/s of a loader core, with two views of 224 pixels.
        measured: Whether anything was measured.
    """

    name: str
    source: str
    rates: dict[tuple[int, bool], float]
    shares: dict[tuple[int, str, str], float] = field(default_factory=dict)
    per_core: float = ASSUMED_PER_CORE
    measured: bool = False

    def seconds(self, work: Workload) -> float:
        """Of the arithmetic of a run on one device."""
        side = self._nearest(work)
        rate = self.rates.get((side, work.half), self.rates.get((side, not work.half), 0.0))
        return work.operations / (rate * self.share(work))

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
        sides = [side for side, _ in self.rates]
        small, large = min(sides), max(sides)
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
    half, single = PEAKS[name]
    of_single = EFFICIENCY_WITHOUT if name in WITHOUT_TF32 else ASSUMED_EFFICIENCY
    said = (
        f"{ASSUMED_EFFICIENCY:.0%} of {half:g} TFLOP/s in bf16, {of_single:.0%} of {single:g} in fp32 "
        f"(of the data sheet's peak; assumed, not measured)"
    )
    return Speed(name, said, {(224, True): half * 1e12 * ASSUMED_EFFICIENCY, (224, False): single * 1e12 * of_single})


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
        rates = {(int(one["crop"]), bool(one["half"])): float(one["flop_per_s"]) for one in bare}
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
    if not rates:
        raise ConfigError(f"--bench {file}: lacks the part 'arithmetic'; run `mixmask bench` with it")
    if not all(0 < value < math.inf for value in (*rates.values(), *shares.values(), *cores)):
        raise ConfigError(f"--bench {file}: holds a speed that is not above 0; measure again")
    per_core = statistics.median(cores) if cores else ASSUMED_PER_CORE
    return Speed(name, f"measured: {file}", rates, shares, per_core, measured=True)
