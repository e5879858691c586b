from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.backbones import BackboneRecipe
from engine.randomness import generator
from pretrain.frameworks.moco import MoCo, MoCoRecipe
from pretrain.split_batch_norm import SplitBatchNorm2d

SMALL = MoCoRecipe(kind="mocov2", dim=8, queue_size=16, momentum=0.9, temperature=0.2, bn_splits=2)
BACKBONE = BackboneRecipe(arch="resnet18", stem="cifar")


@pytest.fixture
def model() -> MoCo:
    torch.manual_seed(0)
    return MoCo(SMALL, BACKBONE)


def slow_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> list[float]:
    """Equation 1 of the MoCo paper, number by number in float64."""
    losses = []
    for i in range(len(query)):
        q = [float(v) for v in query[i].double()]
        positive = math.exp(sum(a * float(b) for a, b in zip(q, key[i].double())) / temperature)
        total = positive
        for j in range(len(queue)):
            total += math.exp(sum(a * float(b) for a, b in zip(q, queue[j].double())) / temperature)
        losses.append(-math.log(positive / total))
    return losses


def test_loss_against_a_float64_loop(model: MoCo) -> None:
    draws = torch.Generator().manual_seed(1)
    query, key = (F.normalize(torch.randn(4, 8, generator=draws), dim=1) for _ in range(2))
    expected = slow_info_nce(query, key, model.queue, 0.2)
    assert model.loss(query, key).tolist() == pytest.approx(expected, rel=1e-5)


def test_loss_gradient(model: MoCo) -> None:
    model.double()
    query = F.normalize(torch.randn(3, 8, dtype=torch.float64), dim=1).requires_grad_()
    key = F.normalize(torch.randn(3, 8, dtype=torch.float64), dim=1)
    assert torch.autograd.gradcheck(lambda q: model.loss(q, key), query)


def test_loss_is_fp32_inside_autocast(model: MoCo) -> None:
    query, key = (F.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.loss(query, key), model.loss(query.clone(), key.clone()))
        assert model.loss(query, key).dtype == torch.float32


def test_queue_is_first_in_first_out_and_wraps(model: MoCo) -> None:
    batches = [torch.full((4, 8), float(i)) for i in range(5)]
    for keys in batches:
        model.enqueue(keys)
    assert model.queue[:, 0].tolist() == [4.0] * 4 + [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    assert int(model.queue_position) == 4


def test_keys_have_no_gradient_and_follow_the_query_encoder(model: MoCo) -> None:
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in model.key_encoder.parameters()]
    fast = [p.clone() for p in model.query_encoder.parameters()]
    keys = model.key(torch.randn(4, 3, 16, 16), generator(0))
    assert not keys.requires_grad
    for old, new, target in zip(before, model.key_encoder.parameters(), fast):
        assert torch.allclose(new, 0.9 * old + 0.1 * target, atol=1e-6)


def test_keys_come_back_in_order(model: MoCo) -> None:
    """In eval mode a key depends on its own image alone, so the shuffle must leave no trace."""
    model.eval()
    images = torch.randn(6, 3, 16, 16)
    keys = model.key(images, generator(5))
    for i in range(6):
        alone: Tensor = model.key_encoder(images[i : i + 1])
        assert torch.allclose(keys[i : i + 1], alone, atol=1e-5)


def test_shuffle_changes_the_groups_of_batch_statistics(model: MoCo) -> None:
    model.train()
    images = torch.randn(8, 3, 16, 16)
    assert not torch.allclose(model.key(images, generator(1)), model.key(images, generator(2)), atol=1e-4)


def test_split_batch_norm_is_batch_norm_per_group() -> None:
    torch.manual_seed(0)
    split, plain = SplitBatchNorm2d(3, 4), nn.BatchNorm2d(3)
    plain.load_state_dict(split.state_dict())
    images = torch.randn(8, 3, 5, 5) * 2 + 1
    groups, means, variances = [], [], []
    for part in images.chunk(4):
        own = nn.BatchNorm2d(3)
        groups.append(own(part))
        means.append(own.running_mean)
        variances.append(own.running_var)
    assert torch.allclose(split(images), torch.cat(groups), atol=1e-6)
    assert torch.allclose(split.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(split.running_var, torch.stack(variances).mean(0), atol=1e-6)
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(images), plain.eval()(images))
