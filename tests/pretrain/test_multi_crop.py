"""SwAV and DINO: codes, small views, queue, prototypes and centre."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import DINOLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch import Tensor

from mixmask.engine.randomness import generator
from mixmask.pretrain.frameworks.dino import DINORecipe
from mixmask.pretrain.frameworks.dino.network import DINO
from mixmask.pretrain.frameworks.swav import SwAVRecipe
from mixmask.pretrain.frameworks.swav.network import SwAV, sinkhorn
from tests.pretrain.small_frameworks import BACKBONE, build, embeddings


def slow_sinkhorn(similarity: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """Algorithm 1 of the SwAV paper, appendix A, number by number."""
    codes = [[math.exp(value / epsilon) for value in row] for row in similarity]
    num, clusters = len(codes), len(codes[0])
    for _ in range(iterations):
        for cluster in range(clusters):
            total = sum(row[cluster] for row in codes)
            for row in codes:
                row[cluster] /= total * clusters
        for row in codes:
            total = sum(row)
            row[:] = [value / total / num for value in row]
    return [[value * num for value in row] for row in codes]


@settings(max_examples=25, deadline=None)
@given(num=st.integers(1, 6), clusters=st.integers(2, 5), seed=st.integers(0, 10**6), iterations=st.integers(1, 4))
def test_sinkhorn(num: int, clusters: int, seed: int, iterations: int) -> None:
    similarity = torch.rand(num, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = sinkhorn(similarity, 0.05, iterations)
    assert ours.flatten().tolist() == pytest.approx(
        [code for row in slow_sinkhorn(similarity.tolist(), 0.05, iterations) for code in row]
    )
    assert ours.sum(dim=1).tolist() == pytest.approx([1.0] * num)
    theirs = lightly_sinkhorn(similarity.clone(), iterations=iterations, epsilon=0.05, gather_distributed=False)
    torch.testing.assert_close(ours, theirs)


def swapped(predictions: list[Tensor], codes: list[Tensor]) -> Tensor:
    """Each full view's code, predicted by every other view (SwAV equation 1, DINO equation 3), number by number."""
    terms = []
    for number, code in enumerate(codes):
        for view, prediction in enumerate(predictions):
            if view != number:
                terms.append([
                    -sum(c * math.log(p) for c, p in zip(codes_of, probabilities))
                    for codes_of, probabilities in zip(code.tolist(), (prediction / 0.1).softmax(dim=1).tolist())
                ])  # fmt: skip
    return torch.tensor(terms).mean(dim=0)


def test_small_views_predict_both_codes() -> None:
    rng = torch.Generator().manual_seed(0)
    full = [torch.randn(5, 3, 16, 16, generator=rng) for _ in range(2)]
    small = [torch.randn(5, 3, 8, 8, generator=rng) for _ in range(2)]
    for name in ("swav", "dino"):
        framework = build(name).eval()
        clean = framework.forward_views((*full, *small), (full[0], full[1]), generator(0))
        predictions = [framework.query(view).detach() for view in (*full, *small)]
        if isinstance(framework, DINO):
            codes = [((framework.teacher.cosines(framework.teacher(v))) / 0.04).softmax(dim=1).detach() for v in full]
        else:
            codes = [sinkhorn(prediction, 0.05, 3) for prediction in predictions[:2]]
        assert torch.allclose(clean.losses.detach(), swapped(predictions, codes), atol=1e-4)
        assert torch.allclose(clean.keys[0], codes[1], atol=1e-4)


def test_the_queue_of_swav_helps_to_make_codes_when_it_is_full() -> None:
    recipe = SwAVRecipe(dim=8, projector_width=16, prototypes=12, num_small=0, queue_size=6, queue_starts=0.2)
    torch.manual_seed(0)
    framework = recipe.build(BACKBONE)
    assert isinstance(framework, SwAV)
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    for progress, filled in ((0.1, 0), (0.3, 4), (0.5, 6)):
        clean = framework.forward_views((views[0], views[1]), (views[0], views[1]), generator(0))
        assert clean.partner is not None
        newest, before = clean.partner, framework.queue.clone()
        framework.after_step(progress)
        assert framework.filled == filled
        if filled:
            assert torch.equal(framework.queue[1, :4], newest)
            assert torch.equal(framework.queue[1, 4:], before[1, :2])
    similarity = framework._similarity(torch.cat([framework.queue[1], newest]))
    codes = framework.eval()._codes([newest, newest])
    assert torch.allclose(codes[1], sinkhorn(similarity, 0.05, 3)[6:])
    assert not torch.allclose(codes[1], sinkhorn(similarity[6:], 0.05, 3), atol=1e-3)


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_prototypes_stay_for_the_first_share(name: str) -> None:
    framework = build(name)
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    weight = next(p for n, p in framework.named_parameters() if n.endswith("prototypes.weight") and p.requires_grad)
    for progress, frozen in ((0.0, True), (0.5, False)):
        framework.progress = progress
        framework.forward_views(views, views, generator(0)).losses.mean().backward()
        framework.before_step()
        assert (weight.grad is None) is frozen
    framework.after_step(0.5)
    if name == "swav":
        assert weight.norm(dim=1).tolist() == pytest.approx([1.0] * 12, abs=1e-6)


def test_the_centre_and_the_temperature_of_dino() -> None:
    framework = build("dino")
    assert isinstance(framework, DINO)
    assert [framework.teacher_temperature(share) for share in (0, 0.03125, 0.0625, 0.9)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    framework.forward_views(views, views, generator(0))
    mean = framework.fresh[0].clone()
    framework.after_step(0.1)
    assert torch.allclose(framework.center, 0.1 * mean)
    with pytest.raises(ValueError, match="the teacher must be sharper than the student"):
        DINORecipe(teacher_temperature=0.1)


def test_lightly_agrees_on_dino() -> None:
    """Its loss also takes outputs and a centre; with two views of each side both are equation 3."""
    framework = build("dino")
    student = [embeddings(5, seed).float() for seed in (1, 2)]
    teacher = [embeddings(5, seed).float() for seed in (3, 4)]
    keys = [(one / 0.04).softmax(dim=1) for one in teacher]
    ours = (framework.loss(student[0], keys[1]) + framework.loss(student[1], keys[0])).mean() / 2
    theirs = DINOLoss(output_dim=8, teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=1)
    assert float(ours) == pytest.approx(float(theirs(teacher, student, epoch=0)), rel=1e-5)
