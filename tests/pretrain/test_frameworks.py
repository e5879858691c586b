"""What holds for every framework: what its loss is put together from, gradients, moving averages, heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.heads import mlp
from mixmask.engine.randomness import generator
from mixmask.pretrain.batch_loss import BatchLossFramework
from mixmask.pretrain.diagnostics import feature_std
from mixmask.pretrain.framework import FrameworkRecipe
from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe
from mixmask.pretrain.frameworks.densecl import DenseCLRecipe
from mixmask.pretrain.frameworks.densecl.network import DenseCL
from mixmask.pretrain.frameworks.dino import DINORecipe
from mixmask.pretrain.frameworks.dino.network import DINO
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.frameworks.mocov3 import MoCoV3Recipe
from mixmask.pretrain.frameworks.swav import SwAVRecipe
from mixmask.pretrain.frameworks.swav.network import sinkhorn
from mixmask.pretrain.frameworks.vicreg import VICRegRecipe
from mixmask.pretrain.mixture import Mixture, mixture_loss
from mixmask.pretrain.network import cosine_momentum
from tests.pretrain.small_frameworks import RECIPES, build, rows


@pytest.mark.parametrize("name", RECIPES)
def test_clean_loss_is_put_together_from_its_parts(name: str) -> None:
    framework = build(name).eval()  # in eval mode an embedding depends on its own image alone
    first, second = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    clean = framework.forward_views((first, second), (first, second), generator(0))
    q1, q2 = framework.query(first), framework.query(second)
    if clean.partner is None:
        assert torch.allclose(clean.query, q1, atol=1e-5)
    if isinstance(framework, DenseCL):
        key = framework.answer(second)
        expected = framework.loss(q1, key)
    elif name == "swav":
        # Both views' codes, each predicted from the other view (equation 1).
        code, key = (sinkhorn(q.detach(), 0.05, 3) for q in (q1, q2))
        expected = (framework.loss(q2, code) + framework.loss(q1, key)) / 2
    elif isinstance(framework, DINO):
        answers = [framework.teacher.cosines(framework.teacher(view)) for view in (first, second)]
        k1, key = (((answer - framework.center) / 0.04).softmax(dim=1) for answer in answers)
        expected = (framework.loss(q1, key) + framework.loss(q2, k1)) / 2
    elif name == "moco":
        key = F.normalize(framework.key_encoder(second), dim=1)
        expected = framework.loss(q1, key)
    elif name == "simclr":
        key = q2
        expected = (framework.loss(q1, q2) + framework.loss(q2, q1)) / 2
    elif isinstance(framework, BatchLossFramework):
        key = q2
        expected = framework.loss(q1, q2)
    else:
        slow: Any = {"byol": "target", "mocov3": "momentum_encoder", "simsiam": "encoder"}[name]
        encoder = framework.get_submodule(slow)
        k1, key = F.normalize(encoder(first), dim=1), F.normalize(encoder(second), dim=1)
        expected = (framework.loss(q1, key) + framework.loss(q2, k1)) / 2
        if name == "byol":  # the paper's: the squared distances of both directions, added
            assert torch.allclose(expected, ((q1 - key) ** 2).sum(1) + ((q2 - k1) ** 2).sum(1), atol=1e-5)
    assert torch.allclose(clean.losses, expected, atol=1e-5)
    assert torch.allclose(clean.keys[0], key, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_mixed_with_itself_gives_the_clean_loss(name: str) -> None:
    framework = build(name).eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = framework.forward_views((images, images), (images, images), generator(0))
    mixture = Mixture("x", images, torch.rand(4), torch.arange(4))
    mixed = framework.query(mixture.images)
    losses = framework.loss(mixed, clean.keys[0]), framework.loss(mixed, clean.keys[0][mixture.perm])
    assert float(mixture_loss(*losses, mixture)) == pytest.approx(float(clean.losses.mean()), abs=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_an_erased_query_is_compared_with_clean_keys(name: str) -> None:
    framework = build(name).eval()
    first, second = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    hidden = torch.zeros_like(first)
    whole = framework.forward_views((first, second), (first, second), generator(0))
    erased = framework.forward_views((hidden, hidden), (first, second), generator(0))
    assert torch.allclose(erased.keys[0], whole.keys[0], atol=1e-5)
    if erased.partner is None:
        assert torch.allclose(erased.query, framework.query(hidden), atol=1e-5)
    else:
        assert whole.partner is not None
        assert torch.allclose(erased.partner, whole.partner, atol=1e-5)
        assert not torch.allclose(erased.query, whole.query)
    assert not torch.allclose(erased.losses, whole.losses)


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_reach_what_is_trained_and_nothing_else(name: str) -> None:
    framework = build(name).train()
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    framework.forward_views(views, views, generator(0)).losses.mean().backward()
    for parameter_name, parameter in framework.named_parameters():
        slow = parameter_name.startswith(("key_encoder", "target", "momentum_encoder", "teacher", "dense_key"))
        assert parameter.requires_grad is not slow
        assert (parameter.grad is None) is slow, parameter_name


def test_simsiam_stops_the_gradient_of_its_keys() -> None:
    framework = build("simsiam")
    query, key = rows(3, 8, 0).requires_grad_(), rows(3, 8, 1).requires_grad_()
    framework.loss(query, key).sum().backward()
    assert query.grad is not None
    assert key.grad is None


def test_simsiam_keys_are_the_same_whether_or_not_they_are_computed_apart() -> None:
    framework = build("simsiam").train()
    first, second = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    together = framework.forward_views((first, second), (first, second), generator(0))
    apart = framework.forward_views((first.clone(), second.clone()), (first, second), generator(0))
    assert torch.allclose(together.losses, apart.losses, atol=1e-5)


def test_moving_averages_follow_their_formula(moco: MoCo) -> None:
    byol = build("byol")
    for framework, fast, slow, momentum in (
        (moco, "query_encoder", "key_encoder", 0.9),
        (byol, "online", "target", cosine_momentum(0.9, 0.25)),
    ):
        quick, lazy = framework.get_submodule(fast), framework.get_submodule(slow)
        with torch.no_grad():
            for parameter in quick.parameters():
                parameter.add_(1.0)
        before = [p.clone() for p in lazy.parameters()]
        framework.after_step(0.25)
        for old, new, target in zip(before, lazy.parameters(), quick.parameters()):
            assert torch.allclose(new, momentum * old + (1 - momentum) * target, atol=1e-6)


def test_cosine_momentum_rises_to_one() -> None:
    assert cosine_momentum(0.99, 0) == pytest.approx(0.99)
    assert cosine_momentum(0.99, 0.5) == pytest.approx(0.995)
    assert cosine_momentum(0.99, 1) == 1


def test_heads_have_the_layers_of_their_papers() -> None:
    def layers(module: nn.Module) -> list[str]:
        names = []
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                names.append(f"{layer.in_features}-{layer.out_features}")
            elif isinstance(layer, nn.BatchNorm1d):
                names.append("bn" if layer.affine else "bn-plain")
            elif isinstance(layer, nn.ReLU):
                names.append("relu")
        return names

    assert layers(mlp([4, 3, 2], norm=False)) == ["4-3", "relu", "3-2"]
    dino = build("dino").get_submodule("student.projector")
    assert [type(layer).__name__ for layer in dino] == [
        "Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"
    ]  # fmt: skip
    barlow = layers(build("barlowtwins").get_submodule("encoder.projector"))
    assert barlow == ["512-16", "bn", "relu", "16-16", "bn", "relu", "16-8"]
    last = build("vicreg").get_submodule("encoder.projector.6")
    assert isinstance(last, nn.Linear)
    assert last.bias is None
    assert layers(build("mocov3").get_submodule("encoder.projector")) == ["512-16", "bn", "relu", "16-8", "bn-plain"]
    simclr, byol, simsiam = (build(name) for name in ("simclr", "byol", "simsiam"))
    assert layers(simclr.get_submodule("encoder.projector")) == ["512-16", "bn", "relu", "16-8", "bn"]
    assert layers(byol.get_submodule("online.projector")) == ["512-16", "bn", "relu", "16-8"]
    assert layers(byol.get_submodule("predictor")) == ["8-16", "bn", "relu", "16-8"]
    assert layers(simsiam.get_submodule("encoder.projector")) == ["512-512", "bn", "relu", "512-8", "bn-plain"]
    assert layers(simsiam.get_submodule("predictor")) == ["8-2", "bn", "relu", "2-8"]


LEARNERS: dict[str, FrameworkRecipe] = {
    "swav": SwAVRecipe(dim=16, projector_width=64, prototypes=12, num_small=0, freeze_prototypes=0),
    "dino": DINORecipe(dim=16, projector_width=64, outputs=16, num_small=0, momentum=0.9, freeze_prototypes=0),
    "barlowtwins": BarlowTwinsRecipe(dim=16, projector_width=64),
    "vicreg": VICRegRecipe(dim=16, projector_width=64),
    "mocov3": MoCoV3Recipe(dim=16, projector_width=64, momentum=0.9, temperature=0.2),
    "densecl": DenseCLRecipe(dim=16, queue_size=64, momentum=0.9, bn_splits=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_images_are_learnt_by_heart_without_collapse(name: str) -> None:
    """After some steps on the same images with noise, the loss has fallen and the embeddings are spread."""
    torch.manual_seed(0)
    framework = LEARNERS[name].build(BackboneRecipe(arch="timm/test_resnet")).train()
    optimizer = torch.optim.AdamW([p for p in framework.parameters() if p.requires_grad], lr=1e-3)
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 32, 32, generator=rng)
    losses, steps = [], 40
    for step in range(steps):
        framework.progress = step / steps
        views = tuple(images + 0.3 * torch.randn(images.shape, generator=rng) for _ in range(2))
        clean = framework.forward_views(views, views, generator(0, step))
        loss = clean.losses.mean()
        optimizer.zero_grad()
        loss.backward()
        framework.before_step()
        optimizer.step()
        framework.after_step((step + 1) / steps)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * max(losses)
    assert float(feature_std(F.normalize(clean.query.detach(), dim=1))) > 0.5
