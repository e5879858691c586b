"""The optimizers of pretraining, and which parameters they treat differently."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.config import Recipe, added
from mixmask.engine.late import torch
from mixmask.engine.schedule import cosine_factor

if TYPE_CHECKING:
    from torch import nn

    from mixmask.pretrain.network import Framework


class OptimizerRecipe(Recipe):
    """The keys that all optimizers share.

    ``lr`` is the learning rate at ``reference_batch_size`` and is scaled linearly to other batch sizes
    (arXiv:1706.02677). Without a reference it is used as given. ``decay_norm_and_bias: false`` leaves biases and the
    weights of normalisation layers out of the weight decay, as SimCLR and BYOL do. ``vector_lr`` is their learning rate
    (as Barlow Twins' code has it); null takes ``lr``. ``weight_decay_end`` is where the weight decay ends, along half a
    cosine over the run (as DINO's code has it); null keeps it constant.
    """

    lr: float = Field(gt=0, le=1e30)
    reference_batch_size: int | None = Field(None, ge=1, le=2**22)
    weight_decay: float = Field(1e-4, ge=0, le=1e6)
    decay_norm_and_bias: bool = True
    vector_lr: float | None = added(None, gt=0, le=1e30)
    weight_decay_end: float | None = added(None, ge=0, le=1e6)

    def rate(self, batch_size: int) -> float:
        """Base learning rate for a global batch of ``batch_size``, by the linear scaling rule."""
        return self.lr * self.scale(batch_size)

    def scale(self, batch_size: int) -> float:
        """What the linear scaling rule multiplies learning rates by."""
        return batch_size / (self.reference_batch_size or batch_size)

    def decay(self, step: int, num_steps: int) -> float:
        """The weight decay at ``step``, which counts from 0."""
        if self.weight_decay_end is None:
            return self.weight_decay
        share = cosine_factor(step, num_steps)
        return self.weight_decay_end + share * (self.weight_decay - self.weight_decay_end)

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups at a base learning rate; a group may have its own values."""


class SGDRecipe(OptimizerRecipe):
    """SGD with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)

    @override
    def build(self, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay)


class AdamRecipe(OptimizerRecipe):
    """Adam with L2 regularisation (weight decay added to the gradient, arXiv:1412.6980), not decoupled as in AdamW."""

    kind: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)

    @override
    def build(self, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=rate, betas=self.betas, weight_decay=self.weight_decay)


class AdamWRecipe(OptimizerRecipe):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)

    @override
    def build(self, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=rate, betas=self.betas, weight_decay=self.weight_decay)


class LARSRecipe(OptimizerRecipe):
    """LARS (arXiv:1708.03888): SGD that scales each tensor's step by ``trust_coefficient`` · |w| / |gradient|.

    With ``decay_norm_and_bias: false`` biases and normalisation layers are left out of the scaling, too, as in the
    published code of Barlow Twins, VICReg and MoCo v3. That code divides by |gradient + decay · w|; timm's, which is used
    here, by |gradient| + decay · |w|, as the paper of LARS does. The step is shorter by a share of at most
    2 · decay · |w| / |gradient|. ``clip`` takes no step that is longer than SGD's (LARC).
    """

    kind: Literal["lars"] = "lars"
    momentum: float = Field(0.9, ge=0, lt=1)
    trust_coefficient: float = Field(0.001, gt=0)
    clip: bool = False

    @override
    def build(self, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
        from timm.optim import Lars

        # timm leaves groups without weight decay out of the scaling, unless told otherwise.
        told = [{"always_adapt": group["decays"], **group} for group in groups]
        lars: torch.optim.Optimizer = Lars(
            told,
            lr=rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            trust_coeff=self.trust_coefficient,
            trust_clip=self.clip,
        )
        return lars


AnyOptimizer = Annotated[SGDRecipe | AdamRecipe | AdamWRecipe | LARSRecipe, Field(discriminator="kind")]


def build_optimizer(recipe: OptimizerRecipe, framework: Framework, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of a framework's trainable parameters; ``batch_size`` is global and scales the learning rate."""
    return recipe.build(parameter_groups(recipe, framework, batch_size), recipe.rate(batch_size))


def parameter_groups(recipe: OptimizerRecipe, framework: Framework, batch_size: int) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by fixed or scheduled rate, and biases and norms apart if they are treated so.

    Groups have ``fixed_lr``, ``decays``, and their own ``lr`` and ``weight_decay`` where these differ. None is empty.
    """
    fixed = {id(parameter) for parameter in framework.fixed_rate_parameters()}
    # Biases and the parameters of normalisation layers, which ``decay_norm_and_bias: false`` leaves out.
    vectors = {
        id(parameter)
        for module in framework.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias"
        or isinstance(module, torch.nn.modules.batchnorm._NormBase | torch.nn.LayerNorm | torch.nn.GroupNorm)
    }
    apart = recipe.vector_lr is not None or not recipe.decay_norm_and_bias
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in framework.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in fixed, apart and id(parameter) in vectors), []).append(parameter)
    found = []
    for (is_fixed, is_vector), parameters in groups.items():
        decays = recipe.decay_norm_and_bias or not is_vector
        group: dict[str, Any] = {"params": parameters, "fixed_lr": is_fixed, "decays": decays}
        if not decays:
            group["weight_decay"] = 0.0
        if is_vector and recipe.vector_lr is not None:
            group["lr"] = recipe.vector_lr * recipe.scale(batch_size)
        found.append(group)
    return found
