"""The loss of one training step: a term for the two clean views and a term for each mixture."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mixmask.engine.augment import Photometric
from mixmask.engine.collectives import gather
from mixmask.engine.differentiable import gather_with_gradient
from mixmask.engine.distributed import world
from mixmask.engine.job import Part
from mixmask.engine.loader import Batch
from mixmask.engine.randomness import generator, python_generator
from mixmask.pretrain.diagnostics import diagnose
from mixmask.pretrain.mixture import Mixture, MixtureRecipe, Rows
from mixmask.pretrain.network import Clean, Framework, Views
from mixmask.pretrain.recipe import PretrainRecipe


@dataclass(frozen=True)
class Prepared:
    """What the networks see in a step, or in one of its accumulated parts.

    Attributes:
        queries: The two full views of the query side, then the small ones.
        keys: The two full views of the key side: the same tensors, unless the mixture hides something.
        mixtures: Drawn when they are asked for, so that they take no memory before; a list in recorded steps.
    """

    queries: Views
    keys: Views
    mixtures: Iterable[Mixture]


@dataclass(frozen=True)
class Term:
    """One term of a step's loss.

    Attributes:
        name: Key in the log.
        loss: Scalar, before weighting.
        weight: Factor of ``loss`` in the sum that is minimised.
        clean: Output of `Framework.forward_views`; set for the clean term only.
    """

    name: str
    loss: Tensor
    weight: float
    clean: Clean | None = None


def step_terms(
    framework: Framework,
    mix: MixtureRecipe,
    views: Sequence[Tensor],
    rng: random.Random,
    shuffle: torch.Generator,
    rows: Rows | None = None,
    num_small: int = 0,
) -> Iterator[Term]:
    """Yield the terms of L = L(q, k) + Σ over mixtures of λ L(q_mix, k) + (1 - λ) L(q_mix[p⁻¹], k) (equations 4-6).

    Call backward on a term before you ask for the next one, and memory for one forward pass is enough. If the keys have
    a gradient (`Framework.keys_have_gradient`), the terms share a graph: sum them before the backward pass.

    Args:
        framework: The framework.
        mix: The mixture.
        views: (N, 3, H, W) each, augmented and normalised: two full views of the same images, then those of
            `FrameworkRecipe.small_views`, then those of `MixtureRecipe.extra_views`.
        rng: For masks and permutations; in the same state on every rank.
        shuffle: For the framework's own draws, such as MoCo's shuffled batches; in the same state on every rank.
        rows: Which rows these are, among the rows that all ranks compute at once; all of them by default.
        num_small: How many of the views are the framework's small ones.
    """
    return terms_of(framework, mix, prepare(framework, mix, views, rng, rows, num_small), shuffle)


def prepare(
    framework: Framework,
    mix: MixtureRecipe,
    views: Sequence[Tensor],
    rng: random.Random,
    rows: Rows | None = None,
    num_small: int = 0,
) -> Prepared:
    """Hide and mix what the networks shall see; the arguments are those of `step_terms`."""
    x1, x2 = views[0], views[1]
    small, extra = views[2 : 2 + num_small], views[2 + num_small :]
    queries = mix.hide((x1, x2), framework.asks_with_both_views, rng, rows)

    def mixtures() -> Iterator[Mixture]:
        # Only queries are mixed, never keys: "only one additional view per image" (section 1), also for symmetric losses.
        yield from mix.draw((x1, x2, *extra), rng, rows)

    return Prepared((*queries, *small), (x1, x2), mixtures())


def terms_of(framework: Framework, mix: MixtureRecipe, prepared: Prepared, shuffle: torch.Generator) -> Iterator[Term]:
    """Yield the terms of `step_terms` for what is already prepared."""
    # Equation 4: L(q, k). Clean and mixed queries are encoded in separate passes, so they do not share batch
    # statistics.
    clean = framework.forward_views(prepared.queries, prepared.keys, shuffle)
    yield Term(mix.clean_name, clean.losses.mean(), mix.clean_weight, clean)

    for mixture in prepared.mixtures:
        q_mix = framework.query(mixture.images)
        loss = torch.zeros((), device=q_mix.device)
        for k in clean.keys:
            # Equation 6, first part: the image's own key, weighted by the image's area λ.
            loss = loss + framework.mixed_loss(q_mix, k, mixture.lam)
            if mixture.switch:
                # Second part, summed in the order of the mixtures: mixture i also shows image p(i), so it meets key
                # p(i). With j = p(i) this is the equation's pair of mixture p⁻¹(j) and key j.
                others = _everyones(k) if mixture.across else k
                loss = loss + framework.mixed_loss(q_mix, others[mixture.perm], 1 - mixture.lam)
        yield Term(mixture.name, loss, mixture.weight)


def _everyones(key: Tensor) -> Tensor:
    return gather_with_gradient(key) if key.requires_grad else gather(key)


@dataclass(frozen=True)
class Shares:
    """A step of a run on this rank's rows of a batch: one share, or several with gradient accumulation.

    A sample's photometric augmentation, mask and partner depend on its row of the global batch (of one share of it, with
    gradient accumulation), not on the rank that holds the row.

    Attributes:
        framework: The framework.
        recipe: The run's recipe.
        batch: This rank's rows of the global batch.
        step: The step's number; with the recipe's seed it determines every draw.
    """

    framework: Framework
    recipe: PretrainRecipe
    batch: Batch
    step: int

    def prepared(self, number: int) -> Prepared:
        """The augmented views and mixtures of a share."""
        recipe, step = self.recipe, self.step
        rows = self.batch.part(number, recipe.accumulate)
        views = [
            Photometric(view)(images, generator(recipe.seed, "photometric", step, place), rows.rows, rows.total)
            for place, (view, images) in enumerate(zip(recipe.views, rows.views, strict=True))
        ]
        # Mixtures are drawn over the same share of all ranks; `each` is this rank's number of rows in it.
        each = self.batch.total // (recipe.accumulate * world().size)
        rng = python_generator(recipe.seed, "mask", step, 0, number)  # the same draws on every process
        own = Rows(world().rank * each, each, each * world().size)
        return prepare(self.framework, recipe.mix, views, rng, own, recipe.num_small)

    def shuffle(self, number: int) -> torch.Generator:
        """For the framework's own draws in a share."""
        return generator(self.recipe.seed, "shuffle", self.step, number)

    def parts(self, terms: Iterator[Term], diagnosed: bool = False) -> list[Part]:
        """The parts of the training loop that a share consists of, to be called in order.

        Args:
            terms: Of the share.
            diagnosed: Also log the metrics of `pretrain.diagnostics`.
        """
        logged = (_logged(term, 1 / self.recipe.accumulate, diagnosed) for term in terms)
        if self.framework.keys_have_gradient:
            # The first backward pass would free the graph of the keys, which all terms share: sum the terms first.
            return [partial(sum_of, logged)]
        # The same call each time: every call takes the next term from the generator.
        return [partial(next, logged)] * (1 + self.recipe.mix.num_mixtures)


def batch_parts(
    framework: Framework, recipe: PretrainRecipe, batch: Batch, step: int, diagnosed: bool = False
) -> list[Part]:
    """The parts of a step's loss on this rank's rows of a batch, to be called in order; the arguments are those of `Shares`.

    ``diagnosed`` also logs the metrics of `pretrain.diagnostics`.
    """
    shares = Shares(framework, recipe, batch, step)

    def terms(number: int) -> Iterator[Term]:
        # Nothing is prepared before the part is called.
        yield from terms_of(framework, recipe.mix, shares.prepared(number), shares.shuffle(number))

    return [part for number in range(recipe.accumulate) for part in shares.parts(terms(number), diagnosed)]


def _logged(term: Term, share: float, diagnosed: bool) -> dict[str, Tensor]:
    """The weighted ``loss`` to minimise and the values to log of a term, all times ``share`` (1 / accumulate)."""
    values = {"loss": term.loss * term.weight * share, term.name: term.loss.detach() * share}
    if term.clean is not None:
        more = diagnose(*compared(term.clean)) if diagnosed else {}
        values |= {metric: value * share for metric, value in {**term.clean.metrics, **more}.items()}
    return values


def compared(clean: Clean) -> tuple[Tensor, Tensor]:
    """The embeddings of the first and the second view that diagnostics look at, (N, dim) each, without gradient."""
    return clean.query.detach(), (clean.keys[0] if clean.partner is None else clean.partner).detach()


def sum_of(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge parts into one: values of the same name are added."""
    terms: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            terms[name] = terms[name] + value if name in terms else value
    return terms
