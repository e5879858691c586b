"""The machine that is measured, and how: warm-up, repeats within a time, medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixmask.engine.precision import Precision, available_cores, fast_bf16, memory_of

Call = Callable[[], object]
BLOCK_SECONDS = 0.3  # of calls on a GPU between two synchronisations


@dataclass(frozen=True)
class Timing:
    """Seconds of a call.

    Attributes:
        seconds: The median.
        fastest: The shortest.
        slowest: The longest.
        repeats: How many were measured, after a warm-up.
    """

    seconds: float
    fastest: float
    slowest: float
    repeats: int


@dataclass
class Machine:
    """A device, the number format that suits it, and a time limit.

    Attributes:
        device: What is measured.
        ends: When the present part has to end, on `time.monotonic`'s clock.
    """

    device: torch.device
    ends: float

    @property
    def precision(self) -> Precision:
        """bf16 where the hardware has it."""
        return "bf16" if fast_bf16(self.device) else "fp32"

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The GPU's or the processor's name."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else processor()

    @property
    def memory(self) -> int:
        """In bytes."""
        return memory_of(self.device)

    @property
    def left(self) -> float:
        """Seconds until the present part has to end."""
        return self.ends - time.monotonic()

    def wait(self) -> None:
        """Until the device has done all its work."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def once(self, call: Call) -> float:
        """Seconds of one call, to the end of the device's work."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def time(self, call: Call, most: int = 15, seconds: float = 4.0, least: int = 3) -> Timing:
        """Measure a call, after warm-ups, until ``most`` repeats or ``seconds`` are reached.

        A GPU's queue stays filled in training. So a repeat on a GPU is several calls, if they are short.

        Args:
            call: What is measured.
            most: Repeats.
            seconds: Of all repeats.
            least: Repeats in any case; but a single one, if even the warm-up takes longer than ``seconds``.
        """
        warm = [self.once(call) for _ in range(3 if self.is_gpu else 1)]
        least = least if warm[-1] < seconds else 1
        calls = max(1, min(20, int(BLOCK_SECONDS / warm[-1]))) if self.is_gpu else 1
        found: list[float] = []
        while len(found) < least or (len(found) < most and sum(found) < seconds):
            found.append(self.once(lambda: [call() for _ in range(calls)]) / calls)
        return Timing(statistics.median(found), min(found), max(found), len(found))


def processor() -> str:
    """The processor's name, and how many of its cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {available_cores()} cores"
