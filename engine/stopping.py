"""The signals that ask a run to stop: what the loop does on them, and why its workers do not die of them."""

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
    """Turns the signals that ask a process to stop into a question that the loop asks after every step.

    With several processes all get the same answer, whichever of them was signalled. A second Ctrl-C is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.previous: dict[int, Any] = {}
        self.urgent = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
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
                    os.write(2, PATIENCE)
        if self.urgent:
            raise StopNow

    def asked(self) -> signal.Signals | None:
        """The signal that asked for a stop, or None. Every process must ask."""
        if distributed.any_of(bool(self.received)):
            return signal.Signals(self.received[0] if self.received else signal.SIGTERM)
        return None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Do not wait for the end of what runs in here, which changes no state.

        One process alone leaves with `StopNow`. Several cannot agree in the middle of it: the handlers of whoever runs them
        (a cluster's requeue) are put back for the time.
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
    """Where the first of several processes finds that the run is no longer its own, let all find it at the next checkpoint.

    The heart has signalled the process, so a checkpoint is due after this step; raising here would leave the others waiting.
    """
    try:
        yield
    except OwnershipLost:
        if distributed.world().size == 1:
            raise


def stopped(title: str, step: int, num_steps: int, number: signal.Signals, checkpoint: Path) -> Interrupted:
    """How a run ends that was asked to stop and has written its checkpoint."""
    return Interrupted(
        f"{title}: stopped at step {step} of {num_steps} by {number.name}; the same command resumes from {checkpoint}",
        number,
    )


def outlive_stop_signals(worker: int) -> None:
    """Let a worker process live through the signals that ask the run to stop, unless its own parent sends them.

    Launchers signal whole groups of processes; a worker that died of it would take the run down before its checkpoint is
    written. The parent ends its workers with SIGTERM, too, so the sender decides.
    """
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=wait, daemon=True).start()
