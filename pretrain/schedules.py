"""Learning-rate schedules of pretraining."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mixmask.engine.config import Recipe, added
from mixmask.engine.schedule import cosine_factor

Epochs = Annotated[int, Field(ge=1)]


class CosineRecipe(Recipe):
    """Half a cosine to ``final`` times the base rate, after a linear warm-up of ``warmup_epochs``."""

    kind: Literal["cosine"] = "cosine"
    final: float = added(0.0, ge=0, le=1)

    def factor(self, step: int, num_steps: int, steps_per_epoch: int, warmup_steps: int) -> float:
        """Factor of the base learning rate at ``step``, which counts from 0; in [0, 1]."""
        factor = cosine_factor(step, num_steps, warmup_steps)
        return factor if step < warmup_steps else self.final + (1 - self.final) * factor

    def warmup(self, warmup_steps: int) -> int:
        """Length of the warm-up in steps; ``warmup_steps`` is ``warmup_epochs`` in steps, used as it is."""
        return warmup_steps


class StepsRecipe(Recipe):
    """Constant, with drops near the end: the schedule of W-MSE's code (arXiv:2007.06346, `htdt/self-supervised`).

    The learning rate is multiplied by ``gamma`` each time the number of epochs left reaches an entry of
    ``epochs_before_end``. It rises linearly over the first ``warmup_steps`` and is at its full value in the last of
    them.
    """

    kind: Literal["steps"] = "steps"
    epochs_before_end: tuple[Epochs, ...] = (50, 25)
    gamma: float = Field(0.2, gt=0, le=1)
    warmup_steps: int = Field(500, ge=0)

    def factor(self, step: int, num_steps: int, steps_per_epoch: int, warmup_steps: int) -> float:
        """Factor of the base learning rate at ``step``, which counts from 0; in (0, 1]."""
        warmup = self.warmup(warmup_steps)
        if step < warmup:
            return (step + 1) / warmup
        # Epochs left, the current one included; if max_steps cuts the last epoch, it counts as a whole one.
        left = -(-num_steps // steps_per_epoch) - step // steps_per_epoch
        return float(self.gamma ** sum(left <= drop for drop in self.epochs_before_end))

    def warmup(self, warmup_steps: int) -> int:
        """Length of the warm-up in steps: the recipe's ``warmup_epochs`` if not 0, else ``self.warmup_steps``."""
        return warmup_steps or self.warmup_steps


AnySchedule = Annotated[CosineRecipe | StepsRecipe, Field(discriminator="kind")]
