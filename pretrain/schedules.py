"""How the learning rate of a pretraining run changes over its steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mixmask.engine.config import Recipe
from mixmask.engine.schedule import cosine_factor

Epochs = Annotated[int, Field(ge=1)]


class CosineRecipe(Recipe):
    """Half a cosine to 0, after a linear warm-up of ``warmup_epochs``."""

    kind: Literal["cosine"] = "cosine"

    def factor(self, step: int, num_steps: int, steps_per_epoch: int, warmup_steps: int) -> float:
        """Of the base rate, at ``step`` of ``num_steps``."""
        return cosine_factor(step, num_steps, warmup_steps)

    def warmup(self, warmup_steps: int) -> int:
        """Length of the warm-up in steps, given that of ``warmup_epochs``."""
        return warmup_steps


class StepsRecipe(Recipe):
    """Constant, with drops near the end: the schedule of W-MSE's code (arXiv:2007.06346, `htdt/self-supervised`).

    The rate is multiplied by ``gamma`` when so many epochs are left as ``epochs_before_end`` says, each time. It rises
    linearly over the first ``warmup_steps``, to the full rate at the last of them.
    """

    kind: Literal["steps"] = "steps"
    epochs_before_end: tuple[Epochs, ...] = (50, 25)
    gamma: float = Field(0.2, gt=0, le=1)
    warmup_steps: int = Field(500, ge=0)

    def factor(self, step: int, num_steps: int, steps_per_epoch: int, warmup_steps: int) -> float:
        """Of the base rate, at ``step`` of ``num_steps``."""
        warmup = self.warmup(warmup_steps)
        if step < warmup:
            return (step + 1) / warmup
        left = -(-num_steps // steps_per_epoch) - step // steps_per_epoch
        return float(self.gamma ** sum(left <= drop for drop in self.epochs_before_end))

    def warmup(self, warmup_steps: int) -> int:
        """Length of the warm-up in steps: ``warmup_epochs``, where the recipe has them, come before ``warmup_steps``."""
        return warmup_steps or self.warmup_steps


AnySchedule = Annotated[CosineRecipe | StepsRecipe, Field(discriminator="kind")]
