"""The way of numbers from the host to the device, in steps that are run and in steps that are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor

Make = Callable[[], "Tensor"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to the device without waiting for the work that is already queued there.

    Raises:
        RuntimeError: While a step is recorded: every replay would take the numbers of the recorded step. `from_host` is
            right there.
    """
    if _present is not None and _present.recording:
        raise RuntimeError(
            "numbers of the host would be recorded as they are now; engine.host_values.from_host takes new ones"
        )
    if device.type != "cuda":
        return tensor.to(device)
    # Only a copy from pinned memory is asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True)


def from_host(make: Make, device: torch.device) -> Tensor:
    """What ``make`` returns on the host, on the device; asked for again whenever a recorded step is replayed.

    Args:
        make: Returns a host tensor, of the same shape and type at every call. It may read what changes from step to step: a
            generator that the step was given, or attributes that are set before each step.
        device: Where it goes.
    """
    return to_device(make(), device) if _present is None else _present.take(make, device)


@dataclass
class HostValues:
    """The numbers that a step takes from the host, in the order in which it asks for them.

    First a step is run with `noted`, then it is recorded with `recorded`, and before every replay `refresh` is called.
    """

    makes: list[Make] = field(default_factory=list)
    there: list[Tensor] = field(default_factory=list)  # what the recorded step reads
    recording: bool = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Run a step, and note the shapes that it asks for."""
        self.there = []
        with self._present():
            yield

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record a step: `from_host` gives memory that keeps its place."""
        # Memory of its own, which was there before: what is recorded must not contain copies from the host.
        self.there = [one.clone() for one in self.there]
        self.makes, self.recording = [], True
        try:
            with self._present():
                yield
        finally:
            self.recording = False
        if len(self.makes) != len(self.there):
            raise RuntimeError(f"the step took {len(self.makes)} tensors from the host, and {len(self.there)} before")

    def take(self, make: Make, device: torch.device) -> Tensor:
        """What `from_host` gives."""
        if self.recording:
            self.makes.append(make)
            if len(self.makes) > len(self.there):
                raise RuntimeError(f"the step takes more tensors from the host than the {len(self.there)} before")
            return self.there[len(self.makes) - 1]
        found = to_device(make(), device)
        self.there.append(found)
        return found

    def refresh(self) -> None:
        """Bring the present step's numbers to the memory that the recorded step reads."""
        for make, there in zip(self.makes, self.there, strict=True):
            new = make()
            there.copy_(new.pin_memory() if there.is_cuda else new, non_blocking=True)

    @contextmanager
    def _present(self) -> Iterator[None]:
        global _present
        assert _present is None
        _present = self
        try:
            yield
        finally:
            _present = None


_present: HostValues | None = None
