"""The base class of frameworks' recipes: their options, and what they ask of a run (`network` has the rest)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import Recipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework

MAX_WIDTH = 2**17  # of an embedding or a hidden layer: a wider one does not fit into any machine's memory


class FrameworkRecipe(Recipe, ABC):
    """Base of the frameworks' recipes; ``kind`` names the framework in configs, records and tables."""

    kind: str

    compiles: ClassVar[bool] = True  # whether it calls the trunks as a whole, so that torch.compile has an effect
    shuffles_batches: ClassVar[bool] = False  # so that queries and keys have other batch statistics

    @abstractmethod
    def build(self, backbone: BackboneRecipe) -> Framework:
        """Build the framework; its initial weights are drawn from torch's global generator."""

    def check_batch(self, batch_size: int, accumulate: int, processes: int) -> None:
        """Refuse a batch that the framework cannot use.

        Args:
            batch_size: Images per step.
            accumulate: Gradient accumulation parts per step.
            processes: World size.

        Raises:
            ValueError: If the batch does not fit; the message says what would.
        """

    def elastic(self, processes: int) -> bool:
        """Whether batch statistics over each process's own images are those that one process would take."""
        return processes == 1

    def small_views(self, augment: AugmentRecipe) -> list[AugmentRecipe]:
        """The augmentations of the views besides the two full ones (multi-crop); ``augment`` is that of the first view."""
        return []

    def full_passes(self, hidden: bool) -> tuple[int, int]:
        """How many full views pass the trunks in a step besides the mixtures' queries: with a gradient, and without.

        Args:
            hidden: Whether the mixture shows the queries other views than the keys (`MixtureRecipe.hide`).
        """
        return 2, 0

    def remarks(self, num_images: int) -> list[str]:
        """Warnings about unusual but valid settings, for ``num_images`` training images; shown before the run."""
        return []
