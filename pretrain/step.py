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
from mixmask.pretrain.mixture import MixtureRecipe, Rows
from mixmask.pretrain.network import Clean, Framework
from mixmask.pretrain.recipe import PretrainRecipe


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
    x1, x2 = views[0], views[1]
    small, extra = views[2 : 2 + num_small], views[2 + num_small :]

    # Equation 4: L(q, k). Clean and mixed queries are encoded in separate passes, so they do not share batch
    # statistics.
    queries = mix.hide((x1, x2), framework.asks_with_both_views, rng, rows)
    clean = framework.forward_views((*queries, *small), (x1, x2), shuffle)
    yield Term(mix.clean_name, clean.losses.mean(), mix.clean_weight, clean)

    # Only queries are mixed, never keys: "only one additional view per image" (section 1), also for symmetric losses.
    for mixture in mix.draw((x1, x2, *extra), rng, rows):
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


def batch_parts(
    framework: Framework, recipe: PretrainRecipe, batch: Batch, step: int, diagnosed: bool = False
) -> list[Part]:
    """Split a step's loss on this rank's rows of a batch into parts, to be called in order.

    A sample's photometric augmentation, mask and partner depend on its row of the global batch (of one part of it, with
    gradient accumulation), not on the rank that holds the row.

    Args:
        framework: The framework.
        recipe: The run's recipe.
        batch: This rank's rows of the global batch.
        step: The step's number; with the recipe's seed it determines every draw.
        diagnosed: Also log the metrics of `pretrain.diagnostics`.
    """

    def logged(number: int) -> Iterator[dict[str, Tensor]]:
        rows = batch.part(number, recipe.accumulate)
        views = [
            Photometric(view)(images, generator(recipe.seed, "photometric", step, place), rows.rows, rows.total)
            for place, (view, images) in enumerate(zip(recipe.views, rows.views, strict=True))
        ]
        # Mixtures are drawn over the same part of all ranks; `each` is this rank's number of rows in it.
        each = batch.total // (recipe.accumulate * world().size)
        terms = step_terms(
            framework,
            recipe.mix,
            views,
            python_generator(recipe.seed, "mask", step, 0, number),  # the same draws on every process
            generator(recipe.seed, "shuffle", step, number),
            Rows(world().rank * each, each, each * world().size),
            recipe.num_small,
        )
        for term in terms:
            yield _logged(term, 1 / recipe.accumulate, diagnosed)

    parts: list[Part] = []
    for number in range(recipe.accumulate):
        terms = logged(number)
        if framework.keys_have_gradient:
            # The first backward pass would free the graph of the keys, which all terms share: sum the terms first.
            parts.append(partial(sum_of, terms))
        else:
            # The same call each time: every call takes the next term from the generator.
            parts += [partial(next, terms)] * (1 + recipe.mix.num_mixtures)
    return parts


def _logged(term: Term, share: float, diagnosed: bool) -> dict[str, Tensor]:
    """The weighted ``loss`` to minimise and the values to log of a term, all times ``share`` (1 / accumulate)."""
    values = {"loss": term.loss * term.weight * share, term.name: term.loss.detach() * share}
    if term.clean is not None:
        clean = term.clean
        more = (
            diagnose(clean.query.detach(), (clean.keys[0] if clean.partner is None else clean.partner).detach())
            if diagnosed
            else {}
        )
        values |= {metric: value * share for metric, value in {**clean.metrics, **more}.items()}
    return values


def sum_of(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge parts into one: values of the same name are added."""
    terms: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            terms[name] = terms[name] + value if name in terms else value
    return terms
