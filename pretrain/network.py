"""The interface of a framework's network: an encoder, and the loss of one query against its key."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.engine.heads import Head

Views = tuple[Tensor, ...]


@dataclass(frozen=True)
class Clean:
    """Output of `Framework.forward_views` for the two clean views of a batch.

    Attributes:
        losses: (N,) loss of each image.
        query: (N, dim) queries of the first view, used for diagnostics only.
        keys: Keys, each (N, ·), of the form that the framework's `loss` takes. Every mixture of the first view is compared
            with each of them. The first entry is the key of the second view.
        metrics: Further scalars for the log.
        partner: (N, dim) embeddings of the second view, which diagnostics compare with ``query``; the first key by default.
    """

    losses: Tensor
    query: Tensor
    keys: tuple[Tensor, ...]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    partner: Tensor | None = None


class Framework(nn.Module, ABC):
    """A network and its loss of a query against a key.

    A training step calls `forward_views` with the views of the batch, then `query` and `mixed_loss` for each mixture,
    `before_step` and `after_step` before and after the optimizer step. Only queries are mixed, so a mixture works with
    every framework.
    """

    keys_have_gradient = False  # whether the loss also trains through the keys, as in SimCLR
    asks_with_both_views = True  # whether both views serve as queries, or only the first
    progress = 0.0  # share of the run before the present step; the training sets it
    # Whether a step starts the same operations as the one before it, with the same numbers of the host but for those from
    # `engine.host_values.from_host`, so that ``compile: true`` may record it. After a change of `phase` it is recorded anew.
    # It is not inherited: a derived class must say so itself.
    recordable: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[Tensor] = []  # what the forward passes of a step leave for `after_step`

    @property
    def phase(self) -> Hashable:
        """What decides which operations a step starts, if it changes during a run."""
        return None

    @property
    def fast(self) -> Encoder:
        """The encoder that is trained; ``self.encoder`` unless a framework calls it otherwise."""
        encoder = self.get_submodule("encoder")
        assert isinstance(encoder, Encoder)
        return encoder

    @property
    def trunk(self) -> nn.Module:
        """The encoder without its heads: the part that is kept for transfer."""
        return self.fast.trunk

    @property
    def head(self) -> Head:
        """The projector on top of the trunk; it is saved in the same file."""
        return self.fast.projector

    @property
    def slow(self) -> Encoder | None:
        """The momentum encoder (teacher), if there is one that may be kept for transfer instead."""
        return None

    @abstractmethod
    def query(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images to queries for `loss`: (N, ·), with gradient."""

    @abstractmethod
    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """(N,) losses of (N, dim) queries against (N, dim) keys of the same images, on the scale of the clean loss."""

    def mixed_loss(self, query: Tensor, key: Tensor, lam: Tensor) -> Tensor:
        """The loss of mixed queries, weighted by area: the mean of λ · L(q, k) over the batch (a term of equation 6).

        Override it if the framework's loss is not a mean over single images.

        Args:
            query: (N, dim) queries of mixed images.
            key: (N, dim) keys; mixture i shows the image of key i with the area share ``lam[i]``.
            lam: (N,) λ, in [0, 1].

        Returns:
            A scalar.
        """
        return (lam * self.loss(query, key)).mean()

    @abstractmethod
    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The framework's loss on a batch.

        Args:
            queries: Two views (N, 3, H, W) for the query side; only the first is used unless `asks_with_both_views`. Then
                the small views, if the recipe has any.
            keys: The two views for the key side: the same tensors, unless a mixture erases parts of the queries.
            rng: For the framework's own draws; in the same state on every rank.
        """

    def settle(self) -> None:
        """Write what the forward passes keep in memory of their own into the buffers; called around recorded passes."""

    def forget(self) -> None:
        """Drop what a step left that was broken off."""
        self.zero_grad(set_to_none=True)
        self.fresh.clear()

    def before_step(self) -> None:
        """Change gradients before the optimizer step."""

    def after_step(self, progress: float) -> None:
        """Update momentum encoder and queue after the optimizer step; ``progress`` is the finished share, in (0, 1]."""

    def fixed_rate_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters whose learning rate the schedule leaves constant, such as SimSiam's predictor."""
        return ()

    def encoders(self) -> Iterable[nn.Module]:
        """The modules that `torch.compile` is applied to: every trunk that images pass through."""
        return (self.trunk,) if self.slow is None else (self.trunk, self.slow.trunk)


# --- shared by several frameworks ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A trunk and its projector; images (N, 3, H, W) to embeddings (N, dim) in fp32, not normalised."""

    def __init__(self, trunk: nn.Module, projector: Head) -> None:
        super().__init__()
        self.trunk = trunk
        self.projector: Head = projector

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images to (N, dim) embeddings."""
        embedding: Tensor = self.projector(self.trunk(images))
        # Under autocast the projector returns half precision, which is too coarse for the losses.
        return embedding.float()


@torch.no_grad()
def move_average(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow ← momentum · slow + (1 - momentum) · fast, over the parameters."""
    # Buffers are left out: the slow network collects batch statistics of its own.
    torch._foreach_lerp_([*slow.parameters()], [*fast.parameters()], 1 - momentum)


def cosine_momentum(base: float, progress: float) -> float:
    """BYOL's schedule (arXiv:2006.07733, section 3.3): from ``base`` at progress 0 to 1 at 1, along half a cosine."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


def unit(embedding: Tensor) -> Tensor:
    """(N, dim) rows scaled to unit L2 norm."""
    return F.normalize(embedding, dim=1)
