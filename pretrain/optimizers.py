"""The optimizers of the paper's recipes, and which parameters they treat differently."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from mixmask.engine.config import Recipe
from mixmask.pretrain.framework import Framework


class OptimizerRecipe(Recipe):
    """The keys that all optimizers share.

    ``lr`` is the learning rate at ``reference_batch_size`` and is scaled linearly to other batch sizes
    (arXiv:1706.02677). Without a reference it is used as given. ``decay_norm_and_bias: false`` leaves biases and the
    weights of normalisation layers out of the weight decay, as SimCLR and BYOL do.
    """

    lr: float = Field(gt=0, le=1e30)
    reference_batch_size: int | None = Field(None, ge=1, le=2**22)
    weight_decay: float = Field(1e-4, ge=0, le=1e6)
    decay_norm_and_bias: bool = True

    def rate(self, batch_size: int) -> float:
        """Base learning rate for a global batch of ``batch_size``, by the linear scaling rule."""
        return self.lr * batch_size / (self.reference_batch_size or batch_size)


class SGDRecipe(OptimizerRecipe):
    """SGD with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)


class AdamRecipe(OptimizerRecipe):
    """Adam with L2 regularisation (weight decay added to the gradient, arXiv:1412.6980), not decoupled as in AdamW."""

    kind: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)


AnyOptimizer = Annotated[SGDRecipe | AdamRecipe, Field(discriminator="kind")]


def build_optimizer(recipe: SGDRecipe | AdamRecipe, framework: Framework, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of a framework's trainable parameters; ``batch_size`` is global and scales the learning rate."""
    groups = parameter_groups(recipe, framework)
    rate = recipe.rate(batch_size)
    if isinstance(recipe, AdamRecipe):
        return torch.optim.Adam(groups, lr=rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def parameter_groups(recipe: OptimizerRecipe, framework: Framework) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by fixed or scheduled learning rate and by weight decay; no group is empty."""
    fixed = {id(parameter) for parameter in framework.fixed_rate_parameters()}
    # Biases and the parameters of normalisation layers, which ``decay_norm_and_bias: false`` leaves out.
    vectors = {
        id(parameter)
        for module in framework.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in framework.parameters():
        if parameter.requires_grad:
            decays = recipe.decay_norm_and_bias or id(parameter) not in vectors
            groups.setdefault((id(parameter) in fixed, decays), []).append(parameter)
    return [
        {"params": parameters, "fixed_lr": is_fixed, **({} if decays else {"weight_decay": 0.0})}
        for (is_fixed, decays), parameters in groups.items()
    ]
