"""One step's losses: the clean term of the framework, and the terms of every mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.augment import Photometric
from engine.distributed import gather, gather_with_gradient, world
from engine.job import Part
from engine.loader import Batch
from engine.randomness import generator, python_generator
from pretrain.diagnostics import diagnose
from pretrain.framework import Clean, Framework
from pretrain.mixing import Erase, Mixture, Rows, draw_mixtures, erase, mixture_loss
from pretrain.recipe import PretrainRecipe


def batch_parts(
    framework: Framework, recipe: PretrainRecipe, batch: Batch, step: int, diagnosed: bool = False
) -> list[Part]:
    """The parts of a step's loss on this process's rows of a batch.

    A sample's photometric augmentation, mask and partner depend on its row of the step's whole batch (of one part of it,
    where gradients are accumulated over parts), whichever process has it.

    Args:
        framework: The framework.
        recipe: The run's recipe.
        batch: This process's rows.
        step: The step, from which everything is drawn.
        diagnosed: Add `pretrain.diagnostics` to what is logged.
    """

    def augmented(rows: Batch) -> list[Tensor]:
        return [
            Photometric(view)(images, generator(recipe.seed, "photometric", step, number), rows.rows, rows.total)
            for number, (view, images) in enumerate(zip(recipe.views, rows.views, strict=True))
        ]

    parts: list[Part] = []
    for number in range(recipe.accumulate):
        views = partial(augmented, batch.part(number, recipe.accumulate))
        each = batch.total // (recipe.accumulate * world().size)
        rows = Rows(world().rank * each, each, each * world().size)
        parts += StepLosses(framework, recipe, views, step, number, diagnosed, rows).parts()
    return parts


class StepLosses:
    """L = L(q, k) + Σ over mixtures of λ L(q_mix, k) + (1 - λ) L(q_mix[p⁻¹], k) (equations 4-6).

    Clean and mixed queries go through the encoder apart, so that their batch statistics do not mix; keys are never mixed.
    For a framework with a symmetric loss, too, one view is mixed ("only one additional view per image", section 1).

    The clean term and each mixture's are parts whose gradients can be computed one after another: memory for one pass is
    enough for all of them. Where the keys have a gradient themselves, they are one part.

    Args:
        framework: The framework.
        recipe: The run's recipe.
        views: Gives two (N, 3, H, W) views of the same images, augmented and normalised; small ones after them, if any.
        step: The step, from which masks, permutations and shuffles are drawn.
        number: Which part of an accumulated batch.
        diagnosed: Add the diagnostics.
        rows: Which rows these are of those that all processes compute at once; all of them by default.
    """

    def __init__(
        self,
        framework: Framework,
        recipe: PretrainRecipe,
        views: Callable[[], list[Tensor]],
        step: int,
        number: int = 0,
        diagnosed: bool = False,
        rows: Rows | None = None,
    ) -> None:
        self.rows = rows
        self.framework, self.recipe, self.make_views, self.diagnosed = framework, recipe, views, diagnosed
        self.shared = generator(recipe.seed, "shuffle", step, number)
        self.own = python_generator(recipe.seed, "mask", step, 0, number)  # the same draws on every process
        self.keys: tuple[Tensor, ...] = ()
        self.mixtures: list[Mixture] = []
        self.small: list[Tensor] = []

    def parts(self) -> list[Part]:
        """To be called in this order, each giving its share of ``loss`` and of what is logged."""
        mix = self.recipe.mix
        parts: list[Part] = [self._erased] if isinstance(mix, Erase) else [self._clean]
        parts += [self._mixture] * mix.num_mixtures
        if isinstance(mix, Erase):
            parts += [self._small] * mix.extra_crops
        if self.framework.keys_have_gradient:
            return [partial(sum_of, parts)]
        return parts

    def _logged(self, name: str, loss: Tensor, weight: float, clean: Clean | None = None) -> dict[str, Tensor]:
        share = 1 / self.recipe.accumulate
        terms = {"loss": loss * weight * share, name: loss.detach() * share}
        if clean is not None:
            more = diagnose(clean.query.detach(), clean.keys[0].detach()) if self.diagnosed else {}
            terms |= {metric: value * share for metric, value in {**clean.metrics, **more}.items()}
        return terms

    def _clean(self) -> dict[str, Tensor]:
        views = self.make_views()
        pair = (views[0], views[1])
        clean = self.framework.clean(pair, pair, self.shared)
        self.keys = clean.keys
        self.mixtures = draw_mixtures(self.recipe.mix, views[0], self.own, self.rows)
        return self._logged("clean", clean.losses.mean(), 1, clean)

    def _mixture(self) -> dict[str, Tensor]:
        mixture = self.mixtures.pop(0)
        mixed = self.framework.query(mixture.images)
        losses = []
        for key in self.keys:
            own = self.framework.loss(mixed, key)
            partners = (self._everyones(key) if mixture.across else key)[mixture.partner]
            switched = self.framework.loss(mixed, partners) if mixture.switch else None
            losses.append(mixture_loss(own, switched, mixture))
        return self._logged(mixture.name, torch.stack(losses).sum(), 1)

    def _everyones(self, key: Tensor) -> Tensor:
        return gather_with_gradient(key) if key.requires_grad else gather(key)

    def _erased(self) -> dict[str, Tensor]:
        mix = self.recipe.mix
        assert isinstance(mix, Erase)
        first, second, *small = self.make_views()
        hidden = erase(mix, first, self.own, self.rows), second
        if self.framework.asks_with_both_views:
            hidden = hidden[0], erase(mix, second, self.own, self.rows)
        clean = self.framework.clean(hidden, (first, second), self.shared)
        self.keys = clean.keys
        self.small = [erase(mix, view, self.own, self.rows) for view in small]
        return self._logged("erased", clean.losses.mean(), 1 / (1 + mix.extra_crops), clean)

    def _small(self) -> dict[str, Tensor]:
        mix = self.recipe.mix
        assert isinstance(mix, Erase)
        query = self.framework.query(self.small.pop(0))
        losses = torch.stack([self.framework.loss(query, key).mean() for key in self.keys])
        return self._logged("small", losses.sum(), 1 / (1 + mix.extra_crops))


def sum_of(parts: Sequence[Part]) -> dict[str, Tensor]:
    """All parts as one: the sum of every term."""
    terms: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part().items():
            terms[name] = terms[name] + value if name in terms else value
    return terms
