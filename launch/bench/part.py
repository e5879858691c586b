"""What a part of the benchmark gives: rows of a table. A module in ``launch/bench/parts/`` is found by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from mixmask.engine.registry import Registry
from mixmask.launch.bench.machine import Machine


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Attributes:
        name: What was measured.
        value: How much.
        unit: Of what; larger is better unless it is ``s`` or ``ms``.
        share: Of the bound that the bare arithmetic sets, from 0 to 1, if there is one.
        limit: What limits it, in words.
        more: Further numbers, for the JSON file.
    """

    name: str
    value: float
    unit: str
    share: float | None = None
    limit: str = ""
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """Something that was not measured, and why."""

    what: str
    why: str


class Part(ABC):
    """A part of the benchmark.

    Attributes:
        name: Its key in the JSON file, and what ``--only`` takes.
        title: Its heading.
        place: Parts run in the order of these numbers.
        share: Of the time limit.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str]
    place: ClassVar[int]
    share: ClassVar[float]

    @abstractmethod
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        """Measure one thing after another, until `Machine.left` is used up.

        Args:
            machine: What is measured.
            before: The rows of the parts that ran before, by the part's name.
        """


PARTS: Registry[Part] = Registry(
    Part, "mixmask.launch.bench.parts", "mixmask.bench", "part of the benchmark", lambda part: filter(None, [part.name])
)
