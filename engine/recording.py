"""Forward and backward passes of a step as one CUDA graph: recorded once, then started by a single launch."""

from __future__ import annotations

import gc
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
RECORDINGS = 4  # in one run; a run that needs more gains nothing by recording
PATIENCE = 20  # rehearsals of one form without enough steps of the same shapes in a row


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
        forget: Called before the passes are recorded, and after a failure: drops what earlier passes have left.
    """

    inputs: Sequence[Tensor]
    generators: Sequence[torch.Generator]
    form: Hashable
    run: Run[T]
    remember: Callable[[], Callable[[], None]]
    forget: Callable[[], None]


class Graph(Protocol):
    """Operations that were recorded with the memory that they read and write."""

    def rehearse(self, work: Callable[[], T]) -> T:
        """Run ``work`` the way it will be recorded."""

    def record(self, work: Callable[[], T]) -> T:
        """Record ``work`` without running it."""

    def replay(self) -> None:
        """Run what was recorded, on the same memory."""


class StepGraph:
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
        here = torch.cuda.current_stream()
        gc.collect()
        gc.disable()  # what is collected may wait for the device, which must not happen now
        try:
            # Threads that load images may allocate pinned memory meanwhile.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                return work()
        finally:
            gc.enable()
            torch.cuda.set_stream(here)  # if it fails, older versions of torch stay on the other stream

    def replay(self) -> None:
        """Run what was recorded, after what the present stream already has to do."""
        self.graph.replay()


@dataclass
class _Recording(Generic[T]):
    """A graph, the memory that it reads, and its result."""

    form: Hashable
    shapes: Hashable
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

    Steps of another form are recorded anew. Steps of the same form whose inputs have other shapes run as they are.

    Args:
        subject: What is recorded, for messages.
        graph: Makes an empty graph.
    """

    def __init__(self, subject: str, graph: Callable[[], Graph] = StepGraph) -> None:
        self.subject = subject
        self.new_graph = graph
        self.graph: Graph | None = None
        self.values = HostValues()
        self.last: Hashable = None  # form and shapes of the last rehearsal
        self.seen = 0  # rehearsals of these in a row
        self.rehearsed = 0
        self.recording: _Recording[T] | None = None
        self.recorded = 0
        self.stopped = False

    def __call__(self, passes: Recordable[T]) -> T:
        """Run the passes of a step."""
        shapes = tuple((one.shape, one.stride(), one.dtype) for one in passes.inputs)
        if self.recording is not None and self.recording.form != passes.form:
            self.recording, self.rehearsed = None, 0  # its memory is needed
        if self.stopped or (self.recording is not None and self.recording.shapes != shapes):
            return passes.run(passes.inputs, passes.generators)
        if self.recording is not None:
            return self.recording.replay(passes)
        if self.recorded == RECORDINGS:
            return self._stop(passes, f"its form has changed {RECORDINGS} times")
        if self.rehearsed == PATIENCE:
            return self._stop(passes, "its images change their shape too often")
        self.seen = self.seen + 1 if self.last == (passes.form, shapes) else 1
        self.last = passes.form, shapes
        if self.seen > REHEARSALS:
            return self._record(passes, shapes)
        self.rehearsed += 1
        self.graph = self.graph or self.new_graph()
        with self.values.noted():
            return self.graph.rehearse(lambda: passes.run(passes.inputs, passes.generators))

    def _record(self, passes: Recordable[T], shapes: Hashable) -> T:
        graph, values = self.graph, self.values
        assert graph is not None
        passes.forget()  # before anything is recorded: the memory of the last step's gradients is free for others
        inputs = [one.clone() for one in passes.inputs]
        why = ""
        try:
            with values.recorded():
                result = graph.record(lambda: passes.run(inputs, passes.generators))
        except RuntimeError as error:  # CUDA's errors and those of memory are such ones, too
            why = _cause(error)
        self.graph, self.values, self.seen = None, HostValues(), 0
        if why:
            # Not in the handler: there the error would keep alive what was recorded so far, and its memory.
            del graph, values, inputs
            passes.forget()
            return self._stop(passes, why)
        self.recording = _Recording(
            passes.form, shapes, graph, inputs, passes.generators, values, result, passes.remember()
        )
        self.recorded += 1
        return self.recording.replay(passes)

    def _stop(self, passes: Recordable[T], why: str) -> T:
        self.stopped, self.graph, self.recording = True, None, None
        say(f"{self.subject} is not recorded as a CUDA graph ({why}), so it runs operator by operator")
        return passes.run(passes.inputs, passes.generators)


def _cause(error: BaseException) -> str:
    """The first line of the error that came first: CUDA reports another one at the end of a recording that failed."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
