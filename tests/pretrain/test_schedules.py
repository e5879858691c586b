from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmask.pretrain.schedules import CosineRecipe, StepsRecipe


@given(st.integers(60, 120), st.integers(1, 40))
def test_the_steps_of_wmse_epoch_by_epoch(epochs: int, per_epoch: int) -> None:
    """As its training script goes through the steps: warm-up by iteration, drops after an epoch."""
    total = epochs * per_epoch
    warmed, factor = 0, 1.0
    for epoch in range(epochs):
        for iteration in range(per_epoch):
            rate = factor
            if warmed < 500:
                warmed += 1
                rate = warmed / 500
            assert StepsRecipe().factor(epoch * per_epoch + iteration, total, per_epoch, 0) == pytest.approx(rate)
        if epoch + 1 in (epochs - 50, epochs - 25):
            factor *= 0.2


def test_warm_up_epochs_come_before_warm_up_steps() -> None:
    assert StepsRecipe().warmup(0) == 500
    assert StepsRecipe().warmup(30) == 30
    assert StepsRecipe(warmup_steps=0).factor(0, 1000, 10, 0) == 1
    assert CosineRecipe().factor(0, 10, 1, 0) == 1
    assert CosineRecipe().warmup(3) == 3
