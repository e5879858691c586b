"""One step's losses: the clean term of the framework, and the terms of every mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.augment import Photometric
from engine.distributed import world
from engine.loader import Batch
from engine.randomness import generator, python_generator
from pretrain.diagnostics import diagnose
from pretrain.framework import Framework
from pretrain.mixing import Erase, draw_mixtures, erase, mixture_loss

if TYPE_CHECKING:
    from pretrain.recipe import PretrainRecipe


def batch_losses(
    framework: Framework, recipe: PretrainRecipe, batch: Batch, step: int, diagnosed: bool = False
) -> dict[str, Tensor]:
    """Photometric augmentation of a batch, and its `step_losses`.

    A sample's augmentation depends on its row of the step's whole batch, whichever process has it; masks and mixtures are
    drawn by each process, and for each part of an accumulated batch, on its own.
    """
    views = [
        Photometric(view)(images, generator(recipe.seed, "photometric", step, number), batch.rows, batch.total)
        for number, (view, images) in enumerate(zip(recipe.views, batch.views, strict=True))
    ]
    return step_losses(framework, recipe, views, step, batch.number, diagnosed)


def step_losses(
    framework: Framework,
    recipe: PretrainRecipe,
    views: list[Tensor],
    step: int,
    part: int = 0,
    diagnosed: bool = False,
) -> dict[str, Tensor]:
    """L = L(q, k) + Σ over mixtures of λ L(q_mix, k) + (1 - λ) L(q_mix[p⁻¹], k) (equations 4-6).

    Clean and mixed queries go through the encoder apart, so that their batch statistics do not mix; keys are never mixed.
    For a framework with a symmetric loss, too, one view is mixed ("only one additional view per image", section 1).

    Args:
        framework: The framework.
        recipe: The run's recipe.
        views: Two (N, 3, H, W) views of the same images, augmented and normalised; small ones after them, if any.
        step: The step, from which masks, permutations and shuffles are drawn.
        part: Which part of an accumulated batch.
        diagnosed: Add `pretrain.diagnostics`.

    Returns:
        ``loss``, its terms, the framework's own metrics, and the diagnostics.
    """
    shared = generator(recipe.seed, "shuffle", step, part)
    own = python_generator(recipe.seed, "mask", step, world().rank, part)
    keys = (views[0], views[1])
    if isinstance(recipe.mix, Erase):
        clean = framework.clean((erase(recipe.mix, keys[0], own), erase(recipe.mix, keys[1], own)), keys, shared)
        terms = {"erased": clean.losses.mean()}
        for small in views[2:]:
            query = framework.query(erase(recipe.mix, small, own))
            terms["small"] = terms.get("small", 0) + framework.loss(query, clean.key).mean()
        loss = torch.stack([*terms.values()]).sum() / (1 + len(views[2:]))
    else:
        clean = framework.clean(keys, keys, shared)
        terms = {"clean": clean.losses.mean()}
        for mixture in draw_mixtures(recipe.mix, keys[0], own):
            mixed = framework.query(mixture.images)
            switched = framework.loss(mixed[mixture.switched], clean.key) if mixture.switch else None
            terms[mixture.name] = mixture_loss(framework.loss(mixed, clean.key), switched, mixture)
        loss = torch.stack([*terms.values()]).sum()
    return {
        "loss": loss,
        **{name: value.detach() for name, value in terms.items()},
        **clean.metrics,
        **(diagnose(clean.query.detach(), clean.key.detach()) if diagnosed else {}),
    }
