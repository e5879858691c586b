"""What a cell does: a stage, or a conversion. Nothing here imports torch before it must."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixmask.engine.storage import RunDirectory

if TYPE_CHECKING:
    from mixmask.transfer.checkpoints.export import Target


@dataclass(frozen=True)
class StageWork:
    """Pretraining or transfer, on all ranks of the job.

    Attributes:
        stage: ``pretrain`` or ``transfer``.
        recipe: The resolved recipe as a file.
        run: The run directory.
    """

    stage: str
    recipe: Path
    run: Path

    def __call__(self) -> None:
        """Run the stage, from its checkpoint if there is one."""
        from mixmask.engine.config import load_recipe
        from mixmask.engine.distributed import agreed, session
        from mixmask.engine.progress import say
        from mixmask.pretrain import stage as pretrain_stage
        from mixmask.pretrain.recipe import PretrainRecipe
        from mixmask.transfer import stage as transfer_stage
        from mixmask.transfer.recipe import load_transfer_recipe

        # A run directory is <runs>/<stage>/<name>-<fingerprint>.
        recipe, runs = self.recipe, self.run.parents[1]
        with session():
            if self.stage == "pretrain":
                plan = agreed(lambda: pretrain_stage.plan(load_recipe(PretrainRecipe, recipe), runs, self.run))
                say(plan.describe())
                pretrain_stage.run(plan)
            else:
                chosen = agreed(lambda: transfer_stage.plan(load_transfer_recipe(recipe), runs, self.run))
                say(chosen.describe())
                transfer_stage.run(chosen)


@dataclass(frozen=True)
class ConversionWork:
    """Conversion of a backbone to another format, verified by reading it back with the library it is for.

    Attributes:
        run: The run directory.
        source: The backbone's file.
        out: The file to write.
        target: The format.
    """

    run: Path
    source: Path
    out: Path
    target: Target

    def __call__(self) -> None:
        """Convert and verify."""
        from mixmask.engine.run import carry_out
        from mixmask.transfer.checkpoints.conversion import Conversion

        carry_out(Conversion(RunDirectory(self.run), self.source, self.out, self.target))
