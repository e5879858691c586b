"""What a self-supervised framework is to the pretraining stage: an encoder, and the loss of one query against its key."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import Recipe
from mixmask.engine.heads import Head

Views = tuple[Tensor, Tensor]

MAX_WIDTH = 2**17  # of an embedding or a hidden layer: what is wider fits no machine


class FrameworkRecipe(Recipe, ABC):
    """Base of the frameworks' recipes; ``kind`` names the framework in configs, records and tables."""

    kind: str

    @abstractmethod
    def build(self, backbone: BackboneRecipe) -> Framework:
        """The framework with fresh weights from torch's global generator."""

    def check_batch(self, batch_size: int, accumulate: int, processes: int) -> None:
        """Refuse a batch that the framework cannot use.

        Args:
            batch_size: Images per step.
            accumulate: In how many parts each process computes a step.
            processes: How many processes share a step.

        Raises:
            ValueError: With what would be valid.
        """

    def remarks(self, num_images: int) -> list[str]:
        """What is odd about it and no error, for so many training images; said before the run starts."""
        return []


@dataclass(frozen=True)
class Clean:
    """What the two clean views of a batch give.

    Attributes:
        losses: (N,) the framework's loss of each image.
        query: (N, dim) embeddings of the first query view, for watching.
        keys: (N, dim) embeddings of key views, unit vectors: what mixtures of the first view are compared with, each of
            them with every one. The first is that of the second view.
        metrics: Further scalars for the log.
    """

    losses: Tensor
    query: Tensor
    keys: tuple[Tensor, ...]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Framework(nn.Module, ABC):
    """An encoder and its similarity.

    A step calls `forward_views` with two views of the batch, `query` and `mixed_loss` for every mixture, and after
    the optimizer's step `after_step`. Mixing the query side alone thus works the same way for every framework.
    """

    not_shared: tuple[str, ...] = ()  # buffers that several processes keep equal themselves
    keys_have_gradient = False
    asks_with_both_views = True

    @property
    @abstractmethod
    def trunk(self) -> nn.Module:
        """The part that is kept after pretraining."""

    @property
    @abstractmethod
    def head(self) -> Head:
        """The projection head behind the trunk, which is exported beside it."""

    @abstractmethod
    def query(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to what `loss` takes as its query, (N, dim) unit vectors, with gradient."""

    @abstractmethod
    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """(N, dim) queries and (N, dim) keys, row i of both from image i, to (N,) losses on the scale of the clean loss."""

    def mixed_loss(self, query: Tensor, key: Tensor, lam: Tensor) -> Tensor:
        """A mixed query's loss, weighed by area: the mean of λ · L(q, k) over the batch (a term of equation 6).

        A framework whose loss is not one of single images overrides this.

        Args:
            query: (N, dim) embeddings of mixed images.
            key: (N, dim) embeddings of the images that they show with the shares ``lam``.
            lam: (N,) λ, in [0, 1].

        Returns:
            A scalar.
        """
        return (lam * self.loss(query, key)).mean()

    @abstractmethod
    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The framework's loss on a batch.

        Args:
            queries: Two views (N, 3, H, W) for the query side; only the first is looked at unless `asks_with_both_views`.
            keys: The same two views for the key side; the same tensors, unless the query side is erased.
            rng: For what the framework draws itself; equal on all processes.
        """

    def after_step(self, progress: float) -> None:
        """What moves after the optimizer's step; ``progress`` is the share of the run that is done, in (0, 1]."""

    def fixed_rate_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters whose learning rate the schedule does not change."""
        return ()

    def encoders(self) -> Iterable[nn.Module]:
        """The modules that images go through, for `torch.compile`."""
        return (self.trunk,)


# --- shared by several frameworks ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A trunk and its projector; images (N, 3, H, W) to embeddings (N, dim) in fp32, not normalised."""

    def __init__(self, trunk: nn.Module, projector: Head) -> None:
        super().__init__()
        self.trunk = trunk
        self.projector: Head = projector

    def forward(self, images: Tensor) -> Tensor:
        """Embed."""
        embedding: Tensor = self.projector(self.trunk(images))
        return embedding.float()


@torch.no_grad()
def move_average(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow ← momentum · slow + (1 - momentum) · fast, over the parameters."""
    torch._foreach_lerp_([*slow.parameters()], [*fast.parameters()], 1 - momentum)


def cosine_momentum(base: float, progress: float) -> float:
    """BYOL's schedule (arXiv:2006.07733, section 3.3): from ``base`` at progress 0 to 1 at 1, along half a cosine."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


def unit(embedding: Tensor) -> Tensor:
    """L2-normalised rows."""
    return F.normalize(embedding, dim=1)
