"""Functions and generators without gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixmask.engine.gradients import without_gradients


@without_gradients
def doubled(values: Tensor) -> Tensor:
    """Twice the values."""
    return 2 * values


@without_gradients
def multiples(values: Tensor) -> Iterator[Tensor]:
    """Once, twice, three times the values."""
    for factor in (1, 2, 3):
        yield factor * values


def test_functions_and_every_step_of_a_generator_have_no_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not doubled(weight).requires_grad
    assert doubled.__name__ == "doubled"
    for value in multiples(weight):
        assert not value.requires_grad
        assert (2 * weight).requires_grad  # the caller's own computing keeps its gradients
