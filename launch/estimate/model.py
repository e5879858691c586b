"""The model of time: arithmetic, exchange of gradients, and loading; ``docs/scaling.md`` explains it."""

from __future__ import annotations

from dataclasses import dataclass

from mixmask.engine.workload import Workload
from mixmask.launch.estimate.speeds import Speed

GPUS_PER_NODE = 8
WITHIN_NODE = 200e9  # bytes/s that each GPU sends and receives within a node (NVLink; PCIe has about a tenth)
BETWEEN_NODES = 20e9  # bytes/s of each GPU between nodes
HIDDEN = 0.7  # share of the exchange that overlaps with the backward pass
VIEWS = 2  # views per image of the measured loader


@dataclass(frozen=True)
class Cost:
    """What one run takes on some GPUs.

    Attributes:
        gpus: How many work on it.
        arithmetic: Seconds, if nothing else bounded it.
        exchange: Seconds of exchanging gradients that are not hidden.
        loading: Seconds that the loader needs with its cores.
        images_per_second: That the loader has to deliver, so that it does not bound the run; 0 if it has nothing to do.
        cores: Loader cores for that, of all its GPUs.
        bytes_per_second: That storage has to deliver for it; 0 if the size of the images is not known.
    """

    gpus: int
    arithmetic: float
    exchange: float
    loading: float
    images_per_second: float
    cores: float
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        """Wall time: the loader works beside the device, so the slower of the two counts."""
        return max(self.arithmetic + self.exchange, self.loading)

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours."""
        return self.gpus * self.seconds / 3600

    @property
    def bound(self) -> str:
        """What bounds it, in a word."""
        if self.loading > self.arithmetic + self.exchange:
            return "loader cores"
        return "exchange" if self.exchange > self.arithmetic else "arithmetic"


def cost(work: Workload, speed: Speed, gpus: int, cores_per_gpu: float, bytes_per_image: float = 0.0) -> Cost:
    """What a run takes on ``gpus`` GPUs.

    Args:
        work: What it computes.
        speed: Of one GPU.
        gpus: How many share its batches.
        cores_per_gpu: Loader cores beside each GPU.
        bytes_per_image: Mean size of its files.
    """
    arithmetic = speed.seconds(work) / gpus
    exchange = work.steps * exchange_seconds(4.0 * work.parameters, gpus) * (1 - HIDDEN)
    per_core = speed.per_core * VIEWS / max(work.views, 1.0)
    wanted = work.loaded / (arithmetic + exchange) if work.loaded else 0.0
    return Cost(
        gpus,
        arithmetic,
        exchange,
        work.loaded / (per_core * cores_per_gpu * gpus) if work.loaded else 0.0,
        wanted,
        wanted / per_core,
        wanted * bytes_per_image,
    )


def exchange_seconds(num_bytes: float, gpus: int) -> float:
    """Seconds of averaging a gradient over GPUs with a ring: every GPU sends 2 (n - 1) / n of it."""
    if gpus == 1:
        return 0.0
    bandwidth = WITHIN_NODE if gpus <= GPUS_PER_NODE else BETWEEN_NODES
    return 2 * (gpus - 1) / gpus * num_bytes / bandwidth
