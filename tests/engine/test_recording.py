"""What may be recorded, and what becomes of steps that may not; the graph is emulated on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmask.engine.host_values import from_host, to_device
from mixmask.engine.recording import PATIENCE, RECORDINGS, REHEARSALS, Recordable, Recorder
from tests.emulated_graph import EmulatedGraph

CPU = torch.device("cpu")
Run = Callable[[Sequence[Tensor], Sequence[torch.Generator]], Tensor]


@pytest.fixture(autouse=True)
def none_made() -> None:
    EmulatedGraph.made = EmulatedGraph.replays = 0


def passes(run: Run, *inputs: Tensor, seed: int = 0, form: object = None) -> Recordable[Tensor]:
    return Recordable(inputs, [torch.Generator().manual_seed(seed)], form, run, lambda: lambda: None, lambda: None)


def steps(run: Run, num: int = REHEARSALS + 3) -> list[Tensor]:
    recorder = Recorder[Tensor]("the step", EmulatedGraph)
    return [recorder(passes(run, torch.full((2,), float(step)), seed=step)).clone() for step in range(num)]


def expected(run: Run, num: int = REHEARSALS + 3) -> list[Tensor]:
    return [run([torch.full((2,), float(step))], [torch.Generator().manual_seed(step)]) for step in range(num)]


def test_a_recording_follows_its_inputs_and_generators() -> None:
    def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        drawn = from_host(lambda: torch.randn(2, generator=generators[0]), CPU)
        again = from_host(lambda: torch.randperm(2, generator=generators[0]), CPU)
        return (inputs[0] + drawn)[again]

    for ours, theirs in zip(steps(run), expected(run), strict=True):
        assert torch.equal(ours, theirs)
    assert (EmulatedGraph.made, EmulatedGraph.replays) == (1, 3)


def test_what_does_not_come_from_the_host_in_the_right_way_is_found_by_the_emulation() -> None:
    """Otherwise the tests of whole steps would prove nothing."""
    counter = iter(range(100))

    def baked(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        return inputs[0] + next(counter)

    found = [float(one[0]) for one in steps(baked)]
    assert found == [0, 2, 4, *(step + REHEARSALS for step in range(REHEARSALS, REHEARSALS + 3))]


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (lambda x: x + to_device(torch.ones(2), CPU), "numbers of the host would be recorded as they are now"),
        (lambda x: x + x.sum().item(), "operation not permitted when stream is capturing"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(
    refused: Callable[[Tensor], Tensor], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        return refused(inputs[0])

    for ours, theirs in zip(steps(run), expected(run), strict=True):
        assert torch.equal(ours, theirs)
    printed = capfd.readouterr().err
    assert printed.count(f"the step is not recorded as a CUDA graph ({said}") == 1
    assert EmulatedGraph.replays == 0


def test_another_form_is_recorded_anew_but_not_without_end(capfd: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder[Tensor]("the step", EmulatedGraph)

    def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        return 2 * inputs[0]

    def take(num: int, **keys: Any) -> None:
        images = torch.randn(num)
        assert torch.equal(recorder(passes(run, images, **keys)), 2 * images)

    for _ in range(6):
        take(3)
    for _ in range(6):  # steps of another shape run as they are, and the recording stays
        before = EmulatedGraph.replays
        take(4)
        take(3)
        assert (EmulatedGraph.made, EmulatedGraph.replays) == (1, before + 1)
    for number in range(RECORDINGS + 2):
        for _ in range(REHEARSALS + 2):
            take(3, form=number)
    assert EmulatedGraph.made == RECORDINGS
    assert (
        capfd.readouterr().err.count(f"is not recorded as a CUDA graph (its form has changed {RECORDINGS} times)") == 1
    )


def test_shapes_that_always_change_are_not_recorded(capfd: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder[Tensor]("the step", EmulatedGraph)
    for number in range(PATIENCE + 5):
        images = torch.randn(1 + number % 3)
        assert torch.equal(recorder(passes(lambda inputs, _: 2 * inputs[0], images)), 2 * images)
    assert EmulatedGraph.made == 0
    assert capfd.readouterr().err.count("(its images change their shape too often)") == 1


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_host_values_cannot_be_recorded(change: int, capfd: pytest.CaptureFixture[str]) -> None:
    numbers = iter([2] * REHEARSALS + [2 + change] + [2] * 5)

    def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        return inputs[0] + sum(from_host(lambda: torch.ones(2), CPU) for _ in range(next(numbers)))

    assert [float(one[0]) for one in steps(run)] == [step + 2 for step in range(REHEARSALS + 3)]
    assert "tensors from the host" in capfd.readouterr().err


def test_what_was_recorded_before_a_failure_is_given_back() -> None:
    """Otherwise a recording for which the memory is too small leaves no memory for the step."""
    large: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        alive.append(sum(one() is not None for one in large))
        image = 2 * inputs[0]
        large.append(weakref.ref(image))
        if len(large) == REHEARSALS + 1:
            raise torch.OutOfMemoryError("out of memory")
        return image.sum()

    steps(run)
    assert alive == [0] * len(alive)


def test_an_error_of_a_step_is_an_error() -> None:
    def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        raise ValueError("broken")

    recorder = Recorder[Tensor]("the step", EmulatedGraph)
    for _ in range(REHEARSALS + 1):
        with pytest.raises(ValueError, match="broken"):
            recorder(passes(run, torch.ones(1)))
    assert torch.equal(from_host(lambda: torch.ones(1), CPU), torch.ones(1))
