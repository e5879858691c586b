"""Forward and backward passes of a step as one CUDA graph: recorded once, then started by a single launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mixmask.engine.host_values import HostValues
from mixmask.engine.progress import say

T = TypeVar("T")
Run = Callable[[Sequence[Tensor], Sequence[torch.Generator]], T]

REHEARSALS = 3  # steps before one is recorded: libraries choose their algorithms, compilers compile, and memory settles
RECORDINGS = 4  # in one run; whose form changes more often has no use of them


@dataclass(frozen=True)
class Recordable(Generic[T]):
    """The passes of one step, so written that they can be recorded.

    Attributes:
        inputs: Tensors on the device that are others in every step.
        generators: Of the host, in the state that this step draws from.
        form: What else must be the same for a recording to be valid, besides the shapes of ``inputs``.
        run: Given inputs and generators, runs the passes. Other numbers of the host come through
            `engine.host_values.from_host`. Tensors in the result are overwritten by the next step.
        remember: Called after the passes have been recorded; returns what puts the tensors, to which a replay writes, back
            where the passes left them, such as gradients.
    """

    inputs: Sequence[Tensor]
    generators: Sequence[torch.Generator]
    form: Hashable
    run: Run[T]
    remember: Callable[[], Callable[[], None]]


class Graph(Protocol):
    """Operations that were recorded with the memory that they read and write."""

    def rehearse(self, work: Callable[[], T]) -> T:
        """Run ``work`` the way it will be recorded."""

    def record(self, work: Callable[[], T]) -> T:
        """Record ``work`` without running it."""

    def replay(self) -> None:
        """Run what was recorded, on the same memory."""


class CUDAGraph:
    """A CUDA graph. Whatever it allocates is its own until it is dropped."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the default stream cannot be recorded
        self.graph = torch.cuda.CUDAGraph()

    def rehearse(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the stream that it will be recorded on."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            found = work()
        here.wait_stream(self.stream)
        return found

    def record(self, work: Callable[[], T]) -> T:
        """Record ``work`` without running it."""
        # Threads that load images may allocate pinned memory meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """Run what was recorded, after what the present stream already has to do."""
        self.graph.replay()


@dataclass
class _Recording(Generic[T]):
    """A graph, the memory that it reads, and its result."""

    form: Hashable
    graph: Graph
    inputs: list[Tensor]
    generators: Sequence[torch.Generator]
    values: HostValues
    result: T
    restore: Callable[[], None]

    def replay(self, passes: Recordable[T]) -> T:
        if self.inputs:
            torch._foreach_copy_(self.inputs, list(passes.inputs), non_blocking=True)
        for own, given in zip(self.generators, passes.generators, strict=True):
            own.set_state(given.get_state())
        self.values.refresh()
        self.graph.replay()
        self.restore()
        return self.result


class Recorder(Generic[T]):
    """Runs the passes of every step: the first ones as they are, the others as a recording, while their form is the same.

    Args:
        subject: What is recorded, for messages.
        graph: Makes an empty graph.
    """

    def __init__(self, subject: str, graph: Callable[[], Graph] = CUDAGraph) -> None:
        self.subject = subject
        self.new_graph = graph
        self.graph: Graph | None = None
        self.values = HostValues()
        self.form: Hashable = None
        self.seen = 0  # steps of this form since another one
        self.recording: _Recording[T] | None = None
        self.recorded = 0
        self.stopped = False

    def __call__(self, passes: Recordable[T]) -> T:
        """Run the passes of a step."""
        form = passes.form, tuple((one.shape, one.stride(), one.dtype) for one in passes.inputs)
        if self.recording is not None and self.recording.form == form:
            return self.recording.replay(passes)
        if self.stopped:
            return passes.run(passes.inputs, passes.generators)
        self.seen = self.seen + 1 if form == self.form else 1
        self.form = form
        if self.seen <= REHEARSALS:
            self.graph = self.graph or self.new_graph()
            with self.values.noted():
                return self.graph.rehearse(lambda: passes.run(passes.inputs, passes.generators))
        if self.recorded == RECORDINGS:
            return self._stop(passes, f"its form has changed {RECORDINGS} times")
        return self._record(passes, form)

    def _record(self, passes: Recordable[T], form: Hashable) -> T:
        assert self.graph is not None
        self.recording = None  # its memory is needed
        inputs = [one.clone() for one in passes.inputs]
        try:
            with self.values.recorded():
                result = self.graph.record(lambda: passes.run(inputs, passes.generators))
        except RuntimeError as error:  # CUDA's errors and those of memory are such ones, too
            return self._stop(passes, (str(error).splitlines() or [type(error).__name__])[0])
        self.recording = _Recording(form, self.graph, inputs, passes.generators, self.values, result, passes.remember())
        self.graph, self.values = None, HostValues()
        self.recorded += 1
        self.seen = 0
        return self.recording.replay(passes)

    def _stop(self, passes: Recordable[T], why: str) -> T:
        self.stopped, self.graph, self.recording = True, None, None
        say(f"{self.subject} is not recorded as a CUDA graph ({why}), so it runs operator by operator")
        return passes.run(passes.inputs, passes.generators)
