"""How far a run is: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.wording import printable_lines

PLAIN_EVERY_SECONDS = 15.0

T = TypeVar("T")

_stderr = Console(stderr=True, highlight=False)


def quieten(quiet: bool) -> None:
    """Say and show nothing from now on: of several processes, one speaks."""
    _stderr.quiet = quiet


def say(message: str) -> None:
    """Print one line for the user on standard error (standard output is for results).

    Nobody may be listening any more (``mixmask launch … 2>&1 | head``): that ends nothing.
    """
    if _stderr.quiet:
        return
    message = printable_lines(message)
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():  # a progress bar may stand there
            _stderr.print(message, soft_wrap=True, markup=False)
        else:
            print(message, file=sys.stderr, flush=True)


class StepProgress:
    """Progress of a run in steps, with images per second and the time left.

    Args:
        title: What is running.
        total: Number of steps.
        first: Step the run starts from.
        images_per_step: Images in one step.
        announce_end: Print a plain line for the last step even if the run was short.
    """

    shown = False  # a terminal has room for one bar: a pass inside another one's step stays silent

    def __init__(self, title: str, total: int, first: int, images_per_step: int, announce_end: bool = True) -> None:
        self.announce_end = announce_end
        self.title, self.total, self.first, self.images_per_step = title, total, first, images_per_step
        self.done = first
        self.idle = 0.0
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.silent = StepProgress.shown
        if sys.stderr.isatty() and not self.silent and not _stderr.quiet:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=_stderr,
            )
            self.task = self.bar.add_task(title, total=total, completed=first, rate="", status="")

    def __enter__(self) -> StepProgress:
        if self.bar is not None:
            StepProgress.shown = True
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            StepProgress.shown = False
            self.bar.stop()

    @property
    def seconds(self) -> float:
        """Time spent on steps by this process: pauses do not count."""
        return time.monotonic() - self.started - self.idle

    @property
    def images_per_second(self) -> float:
        """Mean over the steps of this process."""
        return (self.done - self.first) * self.images_per_step / max(self.seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is no step (an evaluation): it does not count in the rate or the time left."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.idle += time.monotonic() - before

    def advance(self, status: str = "") -> None:
        """One more step is done."""
        self.done += 1
        rate = f"{self.images_per_second:,.{0 if self.images_per_second >= 10 else 2}f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, rate=rate, status=status)
            return
        if self.silent:
            return
        now = time.monotonic()
        if now - self.last_line >= PLAIN_EVERY_SECONDS or (self.announce_end and self.done == self.total):
            left = (self.total - self.done) * self.seconds / max(self.done - self.first, 1)
            shown = f"{status}, " if status else ""
            say(f"{self.title}: step {self.done}/{self.total}, {shown}{rate}, {left:,.0f} s left")
            self.last_line = now


def track(title: str, batches: Iterable[T], total: int, images_per_batch: int) -> Iterator[T]:
    """Pass batches on and show how far they are; for passes over data that train nothing."""
    with StepProgress(title, total, 0, images_per_batch, announce_end=False) as progress:
        for batch in batches:
            yield batch
            progress.advance()
