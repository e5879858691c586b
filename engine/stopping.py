"""Stop signals: how the training loop reacts to them, and how its data loader workers survive them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from mixmask.engine import distributed
from mixmask.engine.errors import Interrupted, OwnershipLost

# What a cluster sends before it takes a machine away, and what a terminal sends on Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
PATIENCE = b"\nstopping after this step, with a checkpoint; Ctrl-C again quits at once\n"


class StopNow(BaseException):
    """Raised inside an evaluation by a stop signal."""


class StopSignals:
    """Records stop signals, so that the loop can ask after every step whether to stop (`asked`).

    All ranks get the same answer, whichever of them was signalled. A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.previous: dict[int, Any] = {}
        self.urgent = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other thread
            # A signal that is ignored stays ignored: scripts start background jobs with SIGINT ignored.
            asked = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.previous = {number: signal.signal(number, self._note) for number in asked}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one ends everything at once
            if not self.urgent and distributed.world().is_writer:
                with contextlib.suppress(OSError):
                    # Not print(): the signal may have interrupted a print, which cannot be entered twice.
                    os.write(2, PATIENCE)
        if self.urgent:
            raise StopNow

    def asked(self) -> signal.Signals | None:
        """The signal that asked for a stop, or None. A collective operation: every rank must call it."""
        if distributed.any_of(bool(self.received)):
            # Ranks exchange only whether a signal came, so a rank that got none itself assumes SIGTERM.
            return signal.Signals(self.received[0] if self.received else signal.SIGTERM)
        return None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this context, stop at once, not after the step; for work that changes no state (an evaluation).

        A single process raises `StopNow`. Several ranks cannot agree on a stop in the middle of the work, so the
        handlers that were installed before (a cluster's requeue) are put back for its duration.
        """
        if distributed.world().size > 1:
            theirs = {number: handler for number, handler in self.previous.items() if callable(handler)}
            for number, handler in theirs.items():
                signal.signal(number, handler)
            try:
                yield
            finally:
                for number in theirs:
                    signal.signal(number, self._note)
            return
        if self.received:
            raise StopNow
        self.urgent = True
        try:
            yield
        finally:
            self.urgent = False


@contextlib.contextmanager
def lost_on_one_of_several() -> Iterator[None]:
    """Ignore `OwnershipLost` on rank 0 of several: all ranks meet it together at the next checkpoint.

    Raising it here, on one rank only, would leave the others waiting in their next collective operation.
    """
    try:
        yield
    except OwnershipLost:
        if distributed.world().size == 1:
            raise


def stopped(title: str, step: int, num_steps: int, number: signal.Signals, checkpoint: Path) -> Interrupted:
    """The error that ends a run which was asked to stop and has written its checkpoint."""
    return Interrupted(
        f"{title}: stopped at step {step} of {num_steps} by {number.name}; the same command resumes from {checkpoint}",
        number,
    )


def outlive_stop_signals(worker: int) -> None:
    """Make a data loader worker ignore stop signals, unless its parent process sends them.

    Launchers signal whole process groups. A worker that died of such a signal would end the run before its checkpoint
    is written. But the parent also ends its workers with SIGTERM, so the sender of the signal decides.
    """
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        # sys.exit() would end this thread only.
        os._exit(0)

    # sigwaitinfo() receives blocked signals only. Threads inherit the mask, so block them before the thread starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=wait, daemon=True).start()
