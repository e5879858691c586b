from __future__ import annotations

import math

import pytest

from mixmask.engine.schedule import cosine_factor, step_factor, warmup_factor


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (25, 0.5 * (1 + math.cos(math.pi / 4))), (50, 0.5), (100, 0.0)]
)
def test_cosine(step: int, expected: float) -> None:
    assert cosine_factor(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (110, 0.0)])
def test_cosine_after_warmup(step: int, expected: float) -> None:
    assert cosine_factor(step, 110, warmup_steps=10) == pytest.approx(expected)


def test_cosine_refuses_steps_outside_the_run() -> None:
    with pytest.raises(ValueError, match="step must lie in"):
        cosine_factor(101, 100)
    with pytest.raises(ValueError, match="warmup_steps"):
        cosine_factor(0, 10, warmup_steps=10)


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (59, 1), (60, 0.1), (79, 0.1), (80, 0.01), (99, 0.01)])
def test_steps(step: int, expected: float) -> None:
    assert step_factor(step, (60, 80), 0.1) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.001), (50, 0.5005), (100, 1.0), (1000, 1.0)])
def test_warmup_is_detectron2s(step: int, expected: float) -> None:
    assert warmup_factor(step, 100, 0.001) == pytest.approx(expected)


def test_no_warmup() -> None:
    assert warmup_factor(0, 0) == 1.0
