"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mixmask.engine.wording import printable_lines

PLAIN_EVERY_SECONDS = 15.0

T = TypeVar("T")

_stderr = Console(stderr=True, highlight=False)


class _Log:
    """The log file that `logged` has open, if any."""

    file: IO[str] | None = None
    path: Path | None = None


class _Copied:
    """A stream whose text is also written to the log. Everything else, such as ``isatty``, is the stream's own."""

    def __init__(self, stream: TextIO, log: IO[str]) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Write the text to both."""
        _write(self._log, text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within this context, everything printed is also appended to a log file, as plain lines without progress bars.

    It is the log of work that does not run in a process of its own. If the file cannot be opened, a warning says so,
    and no log is kept.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(path.open("a", encoding="utf-8", errors="replace"))
        except OSError as error:
            say(f"warning: no log is kept: {path}: {error.strerror or error}")
            yield
            return
        _write(log, f"--- {datetime.now(timezone.utc).isoformat(timespec='seconds')}\n")
        global _stderr
        before = _stderr
        # Made before stderr is redirected: progress bars go to the terminal, and not to the log.
        _stderr = Console(file=sys.stderr, quiet=before.quiet, highlight=False)
        _Log.file, _Log.path = log, path
        copied: list[Any] = [_Copied(sys.stdout, log), _Copied(sys.stderr, log)]
        stack.enter_context(contextlib.redirect_stdout(copied[0]))
        stack.enter_context(contextlib.redirect_stderr(copied[1]))
        try:
            yield
        finally:
            before.quiet = _stderr.quiet
            _stderr = before
            _Log.file = _Log.path = None


def log_file() -> Path | None:
    """The log file of the enclosing `logged` context; None outside of one."""
    return _Log.path


def _keep(line: str) -> None:
    """Write a line to the log directly, for output that does not go through the copied streams."""
    if _Log.file is not None:
        _write(_Log.file, line + "\n")


def _write(log: IO[str], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk must not end the work that is logged
        log.write(text)
        log.flush()


def quieten(quiet: bool) -> None:
    """Switch `say` and the progress bars off or on; with several processes, only rank 0 prints."""
    _stderr.quiet = quiet


def say(message: str) -> None:
    """Print one line for the user on standard error (standard output is for results).

    A reader that has closed the pipe (``mixmask launch … 2>&1 | head``) does not end the run.
    """
    if _stderr.quiet:
        return
    message = printable_lines(message)
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():  # a progress bar may stand there
            _stderr.print(message, soft_wrap=True, markup=False)
            _keep(message)
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

    shown = False  # one bar at a time: a pass inside another one's step shows nothing

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
        """Within this context (an evaluation), time does not count towards the rate or the time left."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.idle += time.monotonic() - before

    def advance(self, status: str = "") -> None:
        """Count one more finished step; ``status`` is shown beside the rate."""
        self.done += 1
        rate = f"{self.images_per_second:,.{0 if self.images_per_second >= 10 else 2}f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, rate=rate, status=status)
        elif self.silent:
            return
        now = time.monotonic()
        if now - self.last_line >= PLAIN_EVERY_SECONDS or (self.announce_end and self.done == self.total):
            left = (self.total - self.done) * self.seconds / max(self.done - self.first, 1)
            shown = f"{status}, " if status else ""
            line = f"{self.title}: step {self.done}/{self.total}, {shown}{rate}, {left:,.0f} s left"
            if self.bar is None:
                say(line)
            else:
                _keep(printable_lines(line))
            self.last_line = now


def track(title: str, batches: Iterable[T], total: int, images_per_batch: int) -> Iterator[T]:
    """Yield the batches and show the progress; for passes over data without training."""
    with StepProgress(title, total, 0, images_per_batch, announce_end=False) as progress:
        for batch in batches:
            yield batch
            progress.advance()
