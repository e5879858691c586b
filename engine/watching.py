"""Optional destinations for a run's log besides ``log.jsonl``: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mixmask.engine.config import Recipe, operational
from mixmask.engine.errors import ConfigError
from mixmask.engine.storage import RunDirectory


class WatchRecipe(Recipe):
    """Optional destinations of the log: TensorBoard files in the run directory, or a Weights & Biases project."""

    tensorboard: bool = operational(False)
    wandb_project: str | None = operational(None)


class Sink(Protocol):
    """A destination for the log."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of the log: named values at a step."""
        ...

    def close(self) -> None:
        """Write what is still buffered, and close the destination."""
        ...


class _TensorBoard:
    def __init__(self, run: RunDirectory, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run logs its steps again, so hide the events after its checkpoint.
        self.writer = SummaryWriter(log_dir=str(run.path / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run: RunDirectory, project: str, title: str, fingerprint: str, settings: dict[str, Any]) -> None:
        import wandb

        # With the fingerprint as id, a resumed run continues its own curves on W&B.
        self.session = wandb.init(
            project=project, name=title, id=fingerprint, dir=str(run.path), config=settings, resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.session.log(dict(values), step=step)

    def close(self) -> None:
        self.session.finish()


def check_watch(recipe: WatchRecipe) -> None:
    """Check that the packages of the chosen destinations can be imported.

    Raises:
        ConfigError: If one cannot; with the command that installs it.
    """
    for wanted, key, package in (
        (recipe.tensorboard, "watch.tensorboard", "tensorboard"),
        (recipe.wandb_project is not None, "watch.wandb_project", "wandb"),
    ):
        if wanted:
            try:
                __import__(package)
            except ImportError as error:
                raise ConfigError(
                    f"{key} is set, but {package} cannot be imported ({error}): pip install 'mixmask[{package}]', "
                    f"or leave the key out"
                ) from None


def open_sinks(
    recipe: WatchRecipe, run: RunDirectory, title: str, fingerprint: str, settings: dict[str, Any], first_step: int
) -> list[Sink]:
    """Open the destinations that the recipe asks for; ``first_step`` is the step from which a resumed run continues.

    Raises:
        ConfigError: If wandb cannot start.
    """
    sinks: list[Sink] = []
    if recipe.tensorboard:
        sinks.append(_TensorBoard(run, first_step))
    if recipe.wandb_project is not None:
        try:
            sinks.append(_WandB(run, recipe.wandb_project, title, fingerprint, settings))
        except Exception as error:  # no login, no network, no such project: wandb has an error of its own for each
            raise ConfigError(
                f"watch.wandb_project={recipe.wandb_project}: wandb does not start ({error}); run `wandb login`, set "
                f"WANDB_MODE=offline, or leave the key out"
            ) from None
    return sinks
