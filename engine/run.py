"""The life cycle of a run: is it finished? If not: own its directory, prepare it, do the work, write the record.

Pretraining, transfer and conversion share this life cycle and differ in the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

from typing_extensions import override

from mixmask.engine import distributed
from mixmask.engine.checkpoint import require_same_data
from mixmask.engine.determinism import deterministic_kernels
from mixmask.engine.ownership import owned
from mixmask.engine.progress import say
from mixmask.engine.records import Record, finished_record
from mixmask.engine.storage import RunDirectory

P = TypeVar("P")


class Checked(Protocol):
    """Images that can be checked before long work starts."""

    def __len__(self) -> int: ...

    def check(self) -> None:
        """Find damaged files."""


class Work(ABC, Generic[P]):
    """The work of a run, called by `carry_out`. ``P`` is the type of its result: a record, or the path of a product."""

    run: RunDirectory  # where it is kept

    @property
    def deterministic(self) -> bool:
        """Whether the work wants deterministic kernels."""
        return False

    @abstractmethod
    def finished(self) -> P | None:
        """The result of an earlier, finished run, or None. Called on every rank; all get the same answer.

        Raises:
            RunDirectoryError: If the directory belongs to other work.
        """

    def prepare(self) -> None:
        """Do the remaining checks and create the directory. Called on rank 0 only."""

    @abstractmethod
    def work(self) -> P:
        """Do the work, resuming from a checkpoint if there is one. Called on every rank."""


class RecordedWork(Work[P]):
    """Work that ends with a record."""

    recipe: Any  # what to do; it has a ``name``, and ``deterministic``
    fingerprint: str  # identity of the recipe and of what it builds on

    @property
    @override
    def deterministic(self) -> bool:
        return bool(self.recipe.deterministic)

    @property
    @abstractmethod
    def data(self) -> dict[str, Any]:
        """Identity of the data, compared with the record's before a finished run is reused."""

    @property
    @abstractmethod
    def images(self) -> Iterable[Checked]:
        """All images that it reads."""

    @abstractmethod
    def product(self, record: Record) -> P:
        """The result of a finished run, from its record."""

    @override
    def finished(self) -> P | None:
        run = self.run
        distributed.agreed(lambda: distributed.require_same(run.is_finished, str(run.record_file)))
        if not run.is_finished:
            return None
        record = finished_record(run)
        require_same_data(run, record.data, self.data)
        product = self.product(record)
        say(f"{self.recipe.name}: finished before, see {run.path}")
        return product

    @override
    def prepare(self) -> None:
        """Look at every image before long work starts, and make the run directory."""
        # A run that resumes has checked its images when it started.
        if not self.run.checkpoint_file.exists():
            say(f"{self.recipe.name}: checking {sum(map(len, self.images)):,} images")
            for images in self.images:
                images.check()
        self.run.create(self.recipe, self.fingerprint)

    def finish(self, record: Record) -> None:
        """Write the record, which marks the run as finished, and delete its checkpoints. Called on rank 0 only."""
        self.run.finish(record.text())
        self.run.discard_checkpoints()


def carry_out(work: Work[P]) -> P:
    """Do the work unless it is finished. Only one process (or one group of ranks) at a time owns the directory.

    Raises:
        UserError: If the directory belongs to other work, or cannot be written.
        OwnershipLost: If another process takes the directory over.
    """
    product = work.finished()
    if product is not None:
        return product
    with owned(work.run):
        product = work.finished()  # another process may have finished it while this one waited
        if product is None:
            distributed.on_rank0(work.prepare)
            with deterministic_kernels(work.deterministic):
                product = work.work()
    return product
