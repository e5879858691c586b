"""Learning-rate schedules as pure functions: a step in, a factor of the base learning rate out."""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_factor(step: int, warmup_steps: int, start_factor: float = 0.0) -> float:
    """Linear warm-up.

    Args:
        step: The step about to be taken, from 0.
        warmup_steps: Length of the warm-up; 0 means none.
        start_factor: Factor at step 0, in [0, 1].

    Returns:
        A factor that rises linearly from ``start_factor`` at step 0 to 1 at ``warmup_steps`` and stays there.
    """
    if step >= warmup_steps:
        return 1.0
    alpha = step / warmup_steps
    return start_factor * (1 - alpha) + alpha


def cosine_factor(step: int, num_steps: int, warmup_steps: int = 0) -> float:
    """Half a cosine from 1 to 0 (SGDR without restarts), after a linear warm-up from 0.

    Args:
        step: The step about to be taken, in [0, num_steps].
        num_steps: Length of the run, at least 1.
        warmup_steps: Length of the warm-up, below ``num_steps``.

    Raises:
        ValueError: If the warm-up does not leave a step, or ``step`` lies outside the run.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(f"warmup_steps must lie in [0, {num_steps}), got {warmup_steps}")
    if not 0 <= step <= num_steps:
        raise ValueError(f"step must lie in [0, {num_steps}], got {step}")
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def step_factor(step: int, milestones: Sequence[int], gamma: float) -> float:
    """Piecewise constant: ``gamma`` to the power of the number of milestones already reached.

    Args:
        step: The step about to be taken, from 0.
        milestones: Steps at which the rate is multiplied by ``gamma``.
        gamma: The factor, usually 0.1.
    """
    reached = sum(1 for milestone in milestones if step >= milestone)
    return float(gamma**reached)
