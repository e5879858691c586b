"""The network and the loss of MoCo v1 and v2 (arXiv:1911.05722, arXiv:2003.04297)."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, replace_batch_norm, width_of
from mixmask.engine.collectives import gather
from mixmask.engine.distributed import world
from mixmask.engine.heads import mlp
from mixmask.engine.host_values import from_host
from mixmask.pretrain.frameworks.moco import MomentumContrastRecipe
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, move_average, unit
from mixmask.pretrain.split_batch_norm import SplitBatchNorm2d, fold_statistics, split_layers, spread_statistics


class MoCo(Framework):
    """Query encoder, momentum encoder for the keys, and the queue of negative keys."""

    queue: Tensor
    queue_position: Tensor

    recordable = True

    def __init__(self, recipe: MomentumContrastRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.asks_with_both_views = recipe.symmetric
        trunk = build_trunk(backbone)
        # Each rank has batch statistics of its own already, so the groups are shared out among the ranks.
        groups = max(recipe.bn_splits // world().size, 1)
        if groups > 1:
            replace_batch_norm(trunk, partial(SplitBatchNorm2d, num_splits=groups))
        width = width_of(trunk)
        head = mlp([width, recipe.dim] if recipe.kind == "moco" else [width, width, recipe.dim], norm=False)
        self.query_encoder = Encoder(trunk, head)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.split, self.folded = split_layers(self), list[SplitBatchNorm2d]()
        self.register_buffer("queue", self.first_negatives())
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))
        self.position: int | None = None  # host copy of queue_position: reading the buffer would wait for the GPU
        self.register_load_state_dict_post_hook(_forget_position)  # type: ignore[no-untyped-call]

    def first_negatives(self) -> Tensor:
        """(K, dim) random unit vectors, the negatives until real keys have replaced them."""
        return unit(torch.randn(self.recipe.queue_size, self.recipe.dim))

    @property
    @override
    def fast(self) -> Encoder:
        return self.query_encoder

    @property
    @override
    def slow(self) -> Encoder:
        return self.key_encoder

    @override
    def query(self, images: Tensor) -> Tensor:
        return unit(self.query_encoder(images))

    @torch.no_grad()
    def key(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Encode the keys with shuffled BatchNorm over all ranks (arXiv:1911.05722, section 3.3).

        The shuffle gives a key and its query batch statistics of different images, on another rank or in another group
        of `SplitBatchNorm2d`, so that the statistics do not reveal which key belongs to which query.

        Returns:
            (N, dim) unit vectors, in the order of ``images``, without gradient.
        """
        everyone = gather(images)
        num = len(everyone)

        def orders() -> Tensor:
            # `rng` is in the same state on every rank, so all ranks draw the same permutation without exchanging it.
            order = torch.randperm(num, generator=rng)
            return torch.stack([order, torch.argsort(order)])[:, world().share(num)]

        order, inverse = from_host(orders, images.device)
        embedding = gather(self.answer(everyone[order].contiguous(memory_format=torch.channels_last)))
        # The inverse permutation puts the keys back into the order of their queries.
        return embedding[inverse]

    def answer(self, images: Tensor) -> Tensor:
        """The keys of images, in their order: (N, dim) unit vectors."""
        return unit(self.key_encoder(images))

    def negative(self, key: Tensor) -> Tensor:
        """What of keys enters the queue: (N, dim)."""
        return key

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """InfoNCE of each query against its key and the queue (arXiv:1911.05722, equation 1)."""
        return self.contrast(query, key)[0]

    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) InfoNCE losses, and (N,) bool: whether the positive is more similar to the query than every negative."""
        return info_nce(query, key, self.queue, self.recipe.temperature)

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The first view is the query and the second the key; with ``symmetric`` also the other way round."""
        query = self.query(queries[0])
        answers = [self.key(keys[1], rng)]
        losses, first = self.contrast(query, answers[0])
        if self.recipe.symmetric:
            answers.append(self.key(keys[0], rng))
            losses = losses + self.loss(self.query(queries[1]), answers[1])
        if self.training:
            # They enter the queue in `after_step`: the backward pass needs the queue unchanged, and a mixture of this
            # step must not meet its own image's key as a negative. Those of the first view come first, as in Un-Mix's
            # code.
            self.fresh += [gather(self.negative(key)) for key in reversed(answers)]
        return Clean(losses, query, tuple(answers), {"contrast_accuracy": 100 * first.float().mean()})

    @override
    def settle(self) -> None:
        fold_statistics(self.split)

    @override
    def forget(self) -> None:
        super().forget()
        for layer in self.split:
            layer.apart = None

    @override
    def before_step(self) -> None:
        self.folded = fold_statistics(self.split)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Write this step's keys over the oldest ones in the queue, and update the momentum encoder.

        The paper's algorithm 1 has this order. MoCo's code updates the momentum encoder before it computes the keys,
        which gives the same keys: its extra update in the first step changes nothing, because both encoders start
        equal.
        """
        if self.position is None:
            self.position = int(self.queue_position)
        for key in self.fresh:
            self.queue[self.position : self.position + len(key)] = key
            self.position = (self.position + len(key)) % self.recipe.queue_size
            self.queue_position.fill_(self.position)
        self.fresh.clear()
        move_average(self.key_encoder, self.query_encoder, self.recipe.momentum)
        spread_statistics(self.folded)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of queries against their keys and the negatives of a queue (arXiv:1911.05722, equation 1).

    Args:
        query: (N, dim) unit vectors.
        key: (N, dim) unit vectors.
        queue: (K, dim) unit vectors.
        temperature: τ.

    Returns:
        (N,) losses, and (N,) bool: whether the positive is more similar to the query than every negative.
    """
    # In fp32: the division by a small temperature would enlarge the rounding errors of half precision.
    with torch.autocast(query.device.type, enabled=False):
        positive = (query * key).sum(dim=1) / temperature  # (N,)
        negative = query @ queue.T / temperature  # (N, K)
        # Joining them into one row of logits first would copy the largest tensor of the loss, and its gradient.
        losses = torch.logaddexp(positive, torch.logsumexp(negative, dim=1)) - positive
        return losses, positive.detach() > negative.detach().amax(dim=1)


def _forget_position(module: nn.Module, incompatible: object) -> None:
    assert isinstance(module, MoCo)
    # After a checkpoint is loaded, the host copy of queue_position is out of date.
    module.position = None
