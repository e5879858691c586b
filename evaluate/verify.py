"""Check which finished runs reproduce the scores that their configs expect."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mixmask.engine.errors import UserError
from mixmask.engine.expected import Expectation
from mixmask.evaluate.collect import Collection, Run
from mixmask.evaluate.reference import departures, in_words, stated
from mixmask.evaluate.results import Result, of_backbone


@dataclass(frozen=True)
class Check:
    """An expected score, and the run that is checked against it.

    Attributes:
        expectation: From the recipe of ``origin``.
        origin: The run that expects it.
        run: The run that is checked: the origin, or a transfer run of its backbone; None if there is none yet.
        otherwise: How that run's protocol departs from the paper's; if not empty, nothing is concluded.
    """

    expectation: Expectation
    origin: Run
    run: Run | None
    otherwise: str = ""

    @property
    def value(self) -> float | None:
        """The measured metric; None without a run."""
        return None if self.run is None else self.run.record.metrics[self.expectation.metric]

    @property
    def reproduced(self) -> bool | None:
        """Whether the value lies within the tolerance, on either side; None without a value or with ``otherwise``."""
        if self.value is None or self.otherwise:
            return None
        return abs(self.value - self.expectation.value) <= self.expectation.tolerance + 1e-9  # decimal fractions round

    def words(self) -> str:
        """The check as one line of text."""
        wanted = self.expectation.describe()
        if self.run is None or self.value is None:
            return f"not measured yet  {self.origin.record.name}: {wanted}"
        if self.otherwise:
            return (
                f"measured otherwise  {self.run.record.name}: {self.value:.2f}, but {self.otherwise}; expected {wanted}"
            )
        verdict = "reproduced" if self.reproduced else "NOT REPRODUCED"
        gap = self.value - self.expectation.value
        return f"{verdict}  {self.run.record.name}: {self.value:.2f} ({gap:+.2f}); expected {wanted}  {self.run.path}"


def verify(collection: Collection) -> list[Check]:
    """Check every expectation of every finished run.

    A pretraining run's expectation is checked on the transfer runs of its backbone that have the metric (and the
    protocol and the data set, if it names them). If there are none, it is checked on the pretraining run's own metric.

    Raises:
        UserError: If no run expects anything.
    """
    checks = expectations(collection)
    if not checks:
        raise UserError(
            f"{collection.folder}: none of {len(collection.runs)} finished runs expects anything. A config carries it as "
            "expected: {metric: linear/top1, value: 69.2, tolerance: 0.5, source: …}; changed keys void it"
        )
    return checks


def expectations(collection: Collection) -> list[Check]:
    """As `verify`; empty if no run expects anything."""
    checks: list[Check] = []
    on: dict[str, list[Run]] = defaultdict(list)
    for run in collection.distinct:
        if run.record.parent is not None:
            on[run.record.parent].append(run)
    for origin in collection.distinct:
        transfers = on.get(origin.record.fingerprint, []) if origin.record.stage == "pretrain" else []
        for expectation in origin.record.expected:
            measured = [run for run in (origin, *transfers) if _concerns(expectation, run)]
            # Transfer runs count more than what the pretraining run measured itself.
            if len(measured) > 1 and origin in measured:
                measured.remove(origin)
            found = [Check(expectation, origin, run, _otherwise(expectation, origin, run)) for run in measured]
            checks += found or [Check(expectation, origin, None)]
    return checks


def _otherwise(expectation: Expectation, origin: Run, run: Run) -> str:
    """How a transfer run departs from the paper's protocol; empty for a run's expectation of itself."""
    if run is origin:
        return ""
    result = Result(run, expectation.metric)
    return in_words([text for key, text in departures(result, stated(result.dims)).items() if not of_backbone(key)])


def _concerns(expectation: Expectation, run: Run) -> bool:
    record = run.record
    return (
        expectation.metric in record.metrics
        and expectation.protocol in (None, record.protocol)
        and expectation.dataset in (None, record.dataset)
    )
