"""Optimizers against loops over numbers in float64, and who is treated differently."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.frameworks.byol import BYOLRecipe
from mixmask.pretrain.frameworks.simsiam import SimSiamRecipe
from mixmask.pretrain.network import Framework
from mixmask.pretrain.optimizers import (
    AdamRecipe,
    AdamWRecipe,
    LARSRecipe,
    OptimizerRecipe,
    SGDRecipe,
    build_optimizer,
    parameter_groups,
)
from mixmask.pretrain.schedules import CosineRecipe

BACKBONE = BackboneRecipe(arch="resnet18", stem="cifar")


def simsiam() -> Framework:
    return SimSiamRecipe(dim=8, projector_layers=2).build(BACKBONE)


def test_parameter_groups_say_who_decays_and_whose_rate_is_fixed() -> None:
    framework = simsiam()
    groups = parameter_groups(SGDRecipe(lr=0.1, decay_norm_and_bias=False), framework, 256)
    assert {(group["fixed_lr"], group["decays"]) for group in groups} == {
        (fixed, decays) for fixed in (False, True) for decays in (False, True)
    }
    assert sum(len(group["params"]) for group in groups) == len([*framework.parameters()])
    for group in groups:
        assert ("weight_decay" in group) is not group["decays"]
        assert all((parameter.ndim == 1) == ("weight_decay" in group) for parameter in group["params"])
    predictor = {id(parameter) for parameter in framework.get_submodule("predictor").parameters()}
    fixed = {id(parameter) for group in groups if group["fixed_lr"] for parameter in group["params"]}
    assert fixed == predictor
    byol = BYOLRecipe(dim=8, projector_width=16).build(BACKBONE)
    (everything,) = parameter_groups(SGDRecipe(lr=0.1), byol, 256)
    assert not everything["fixed_lr"]
    assert len(everything["params"]) == sum(p.requires_grad for p in byol.parameters())


def test_biases_may_have_a_rate_of_their_own() -> None:
    """Barlow Twins, section 2.2: 0.2 for the weights and 0.0048 for biases and batch normalisation, times batch / 256."""
    recipe = LARSRecipe(lr=0.2, vector_lr=0.0048, reference_batch_size=256, decay_norm_and_bias=False)
    optimizer = build_optimizer(recipe, simsiam(), 2048)
    rates = {all(p.ndim == 1 for p in group["params"]): group["lr"] for group in optimizer.param_groups}
    assert rates == {False: pytest.approx(1.6), True: pytest.approx(0.0384)}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (SGDRecipe(lr=0.03, reference_batch_size=256), torch.optim.SGD),
        (AdamRecipe(lr=0.03, reference_batch_size=256), torch.optim.Adam),
        (AdamWRecipe(lr=0.03, reference_batch_size=256), torch.optim.AdamW),
    ],
)
def test_the_linear_rule(recipe: OptimizerRecipe, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = build_optimizer(recipe, simsiam(), 1024)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.12)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4


class Small(nn.Module):
    """A matrix and a vector, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=rng, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(4, generator=rng, dtype=torch.float64))

    def fixed_rate_parameters(self) -> tuple[nn.Parameter, ...]:
        return ()


def norm(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    decay=st.sampled_from([0.0, 1e-6, 0.05]),
    excluded=st.booleans(),
    clip=st.booleans(),
    trust=st.sampled_from([0.001, 0.5]),
)
def test_lars_number_by_number(seed: int, decay: float, excluded: bool, clip: bool, trust: float) -> None:
    """arXiv:1708.03888, algorithm 1: the local rate is η |w| / (|∇| + β |w|); the momentum takes the scaled gradient.

    With clipping, the local rate is at most the global one.
    """
    model: Any = Small(seed)
    recipe = LARSRecipe(lr=0.3, weight_decay=decay, momentum=0.9, decay_norm_and_bias=not excluded)
    recipe = recipe.model_copy(update={"clip": clip, "trust_coefficient": trust})
    optimizer = build_optimizer(recipe, model, 256)
    weights = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
    speeds = {name: [0.0] * len(values) for name, values in weights.items()}
    rng = torch.Generator().manual_seed(seed + 1)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            w, g = weights[name], parameter.grad.flatten().tolist()
            plain = name == "bias" and excluded
            own = 0.0 if plain else decay
            local = 1.0 if plain else trust * norm(w) / (norm(g) + own * norm(w))
            if clip and not plain:
                local = min(local / 0.3, 1)
            speeds[name] = [
                0.9 * v + local * (gradient + own * value) for v, gradient, value in zip(speeds[name], g, w)
            ]
            weights[name] = [value - 0.3 * v for value, v in zip(w, speeds[name])]
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.detach().flatten().tolist() == pytest.approx(weights[name], rel=1e-6, abs=1e-7)


def test_the_weight_decay_may_follow_a_cosine() -> None:
    """DINO, section 3: from 0.04 to 0.4."""
    recipe = AdamWRecipe(lr=1e-3, weight_decay=0.04, weight_decay_end=0.4)
    assert recipe.decay(0, 100) == pytest.approx(0.04)
    assert recipe.decay(50, 100) == pytest.approx(0.22)
    assert recipe.decay(100, 100) == pytest.approx(0.4)
    assert recipe.decay(25, 100) == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert AdamWRecipe(lr=1e-3, weight_decay=0.04).decay(70, 100) == 0.04


def test_the_cosine_may_end_above_zero() -> None:
    """Barlow Twins' code: the rate ends at a thousandth."""
    schedule = CosineRecipe(final=0.001)
    assert schedule.factor(5, 110, 10, 10) == 0.5
    assert schedule.factor(10, 110, 10, 10) == 1
    assert schedule.factor(60, 110, 10, 10) == pytest.approx(0.5 * 1 + 0.5 * 0.001)
    assert schedule.factor(110, 110, 10, 10) == pytest.approx(0.001)
