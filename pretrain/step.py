"""One step's losses: the term of the two clean views, and a term for every mixture."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mixmask.engine.augment import Photometric
from mixmask.engine.distributed import gather, gather_with_gradient, world
from mixmask.engine.job import Part
from mixmask.engine.loader import Batch
from mixmask.engine.randomness import generator, python_generator
from mixmask.pretrain.diagnostics import diagnose
from mixmask.pretrain.framework import Clean, Framework
from mixmask.pretrain.mixture import MixtureRecipe, Rows
from mixmask.pretrain.recipe import PretrainRecipe


@dataclass(frozen=True)
class Term:
    """One term of a step's loss.

    Attributes:
        name: In the log.
        loss: A scalar, not weighted.
        weight: In the sum that is minimised.
        clean: What the clean views gave, with the term that comes from them.
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
) -> Iterator[Term]:
    """Yield the terms of L = L(q, k) + Σ over mixtures of λ L(q_mix, k) + (1 - λ) L(q_mix[p⁻¹], k) (equations 4-6).

    A term's gradients can be computed before the next one is asked for, so that memory for one forward pass is enough. Where
    the keys have a gradient themselves, the terms must be summed first.

    Args:
        framework: The framework.
        mix: The mixture.
        views: (N, 3, H, W) each, augmented and normalised: two full views of the same images, then those of
            `MixtureRecipe.extra_views`.
        rng: Masks and permutations; in the same state on every process.
        shuffle: What the framework draws itself; equal on all processes.
        rows: Which rows these are of those that all processes compute at once; all of them by default.
    """
    x1, x2 = views[0], views[1]

    # Equation 4: L(q, k). Clean and mixed queries go through the encoder apart, so that batch statistics do not mix them.
    queries = mix.hide((x1, x2), framework.asks_with_both_views, rng, rows)
    clean = framework.forward_views(queries, (x1, x2), shuffle)
    yield Term(mix.clean_name, clean.losses.mean(), mix.clean_weight, clean)

    # Only queries are mixed, never keys: "only one additional view per image" (section 1), also for symmetric losses.
    for mixture in mix.draw(views, rng, rows):
        q_mix = framework.query(mixture.images)
        loss = torch.zeros((), device=q_mix.device)
        for k in clean.keys:
            # Equation 6, first part: what the image itself contributes, by its area λ.
            loss = loss + framework.mixed_loss(q_mix, k, mixture.lam)
            if mixture.switch:
                # Second part. The mean over the batch is taken in the order of the mixtures: mixture i against the key of
                # the other image that it shows, p(i), is the pair that the equation calls mixture p⁻¹(j) against key j.
                others = _everyones(k) if mixture.across else k
                loss = loss + framework.mixed_loss(q_mix, others[mixture.perm], 1 - mixture.lam)
        yield Term(mixture.name, loss, mixture.weight)


def _everyones(key: Tensor) -> Tensor:
    return gather_with_gradient(key) if key.requires_grad else gather(key)


def batch_parts(
    framework: Framework, recipe: PretrainRecipe, batch: Batch, step: int, diagnosed: bool = False
) -> list[Part]:
    """The parts of a step's loss on this process's rows of a batch, to be called one after another.

    A sample's photometric augmentation, mask and partner depend on its row of the step's whole batch (of one part of it,
    where gradients are accumulated over parts), whichever process has it.

    Args:
        framework: The framework.
        recipe: The run's recipe.
        batch: This process's rows.
        step: The step, from which everything is drawn.
        diagnosed: Add `pretrain.diagnostics` to what is logged.
    """

    def logged(number: int) -> Iterator[dict[str, Tensor]]:
        rows = batch.part(number, recipe.accumulate)
        views = [
            Photometric(view)(images, generator(recipe.seed, "photometric", step, place), rows.rows, rows.total)
            for place, (view, images) in enumerate(zip(recipe.views, rows.views, strict=True))
        ]
        each = batch.total // (recipe.accumulate * world().size)
        terms = step_terms(
            framework,
            recipe.mix,
            views,
            python_generator(recipe.seed, "mask", step, 0, number),  # the same draws on every process
            generator(recipe.seed, "shuffle", step, number),
            Rows(world().rank * each, each, each * world().size),
        )
        for term in terms:
            yield _logged(term, 1 / recipe.accumulate, diagnosed)

    parts: list[Part] = []
    for number in range(recipe.accumulate):
        terms = logged(number)
        if framework.keys_have_gradient:
            parts.append(partial(sum_of, terms))
        else:
            parts += [partial(next, terms)] * (1 + recipe.mix.num_mixtures)
    return parts


def _logged(term: Term, share: float, diagnosed: bool) -> dict[str, Tensor]:
    """What is minimised (``loss``) and what is logged of a term; ``share`` is that of one accumulated part."""
    values = {"loss": term.loss * term.weight * share, term.name: term.loss.detach() * share}
    if term.clean is not None:
        clean = term.clean
        more = diagnose(clean.query.detach(), clean.keys[0].detach()) if diagnosed else {}
        values |= {metric: value * share for metric, value in {**clean.metrics, **more}.items()}
    return values


def sum_of(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All parts as one: the sum of every term."""
    terms: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            terms[name] = terms[name] + value if name in terms else value
    return terms
