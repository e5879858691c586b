"""Both engines on the same things: Detectron2 must be importable, or these are skipped with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")

from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage

from mixmask.engine.schedule import step_factor, warmup_factor
from mixmask.transfer.detection.data.batches import DetectionBatch, training_batches
from mixmask.transfer.detection.engines import torchvision as torchvision_engine
from mixmask.transfer.detection.layers import roi_heads, rpn
from mixmask.transfer.detection.layers.roi_heads import SampledBoxes
from tests.conftest import make_backbone
from tests.transfer.detection.engine_pairs import (
    SIZES,
    Pair,
    both_losses,
    close,
    detected_by_both,
    fix_statistics,
    make_pair,
    pictures,
    require_same_gradients,
)
from tests.transfer.detection.keypoint_sets import KEYPOINTS, persons
from tests.transfer.detection.small_recipes import COCO, VOC, with_pyramid

__all__ = ["persons"]


@pytest.fixture(
    scope="module", params=["c4-coco50", "c4-voc18", "fpn-coco50", "fpn-voc18", "fpn_2fc-coco18", "keypoints-coco18"]
)
def pair(
    request: pytest.FixtureRequest, coco: Path, voc: Path, persons: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    where = tmp_path_factory.mktemp(request.param)
    detector, data = request.param.split("-")
    text, root = (COCO, coco) if data.startswith("coco") else (VOC, voc)
    text = text if detector == "c4" else with_pyramid(text)
    if detector == "keypoints":
        text, root = KEYPOINTS, persons
    plain = [
        "detector.norm=false",
        "detector.box_head={num_conv: 0, num_fc: 2, fc_dim: 32}",
        "detector.mask_head.norm=false",
    ]
    overrides = plain if detector == "fpn_2fc" else []
    return make_pair(text, root, where, make_backbone(where / "b.safetensors", f"resnet{data[-2:]}"), *overrides)


def proposals_of(pair: Pair, images: list[Tensor], train: bool) -> tuple[list[Any], list[Tensor]]:
    """(theirs, ours) for the same images."""
    fix_statistics(pair, train)
    batch = pair.theirs.preprocess_image([{"image": image} for image in images])
    with torch.no_grad(), EventStorage():
        every = pair.theirs.backbone(batch.tensor)
        features = [every[name] for name in pair.theirs.proposal_generator.in_features]
        anchors = pair.theirs.proposal_generator.anchor_generator(features)
        logits, deltas = pair.theirs.proposal_generator.rpn_head(features)
        flat_logits = [one.permute(0, 2, 3, 1).flatten(1) for one in logits]
        flat_deltas = [
            one.view(len(images), -1, 4, *one.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, -2) for one in deltas
        ]
        theirs = pair.theirs.proposal_generator.predict_proposals(anchors, flat_logits, flat_deltas, batch.image_sizes)
        maps = pair.ours.maps(images)
        regions = pair.ours.rpn(maps)
        ours = pair.ours.rpn.proposals(regions, SIZES)
    torch.testing.assert_close(pair.ours.batch(images), batch.tensor, rtol=0, atol=1e-5)
    for level in range(len(features)):
        close(maps[level], features[level])
        assert torch.equal(regions.anchors[level], anchors[level].tensor)
        close(regions.logits[level], flat_logits[level])
        close(regions.deltas[level], flat_deltas[level])
    return theirs, ours


def test_names_are_a_bijection(pair: Pair) -> None:
    state = pair.ours.state_dict()
    detector = pair.recipe.detector
    assert list(detector.from_detectron2(detector.to_detectron2(state))) == list(state)
    assert set(detector.to_detectron2(state)) == set(pair.theirs.state_dict())


@pytest.mark.parametrize("train", [True, False])
def test_same_anchors_objectness_and_proposals(pair: Pair, train: bool) -> None:
    theirs, ours = proposals_of(pair, pictures(), train)
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(other, one.proposal_boxes.tensor, rtol=1e-4, atol=1e-3)


def test_same_detections_masks_and_keypoints(pair: Pair) -> None:
    for one, found in detected_by_both(pair):
        if pair.recipe.masks:
            masks = torch.from_numpy(np.stack([coco_mask.decode(f.mask) for f in found])).bool()
            assert float((masks != one.pred_masks).float().mean()) < 1e-3
        if "keypoints" in pair.recipe.measures:
            points = torch.tensor([f.keypoints for f in found])
            torch.testing.assert_close(points[..., :2], one.pred_keypoints[..., :2], rtol=1e-4, atol=1e-2)
            close(points[..., 2], one.pred_keypoints[..., 2])


def batch_of(pair: Pair) -> DetectionBatch:
    return next(training_batches(pair.train, pair.recipe, 3, 0, 1))


def first_of(positive: Tensor, negative: Tensor, num: int, fraction: float) -> tuple[Tensor, Tensor]:
    num_positive = min(len(positive), int(num * fraction))
    return positive[:num_positive], negative[: min(len(negative), num - num_positive)]


@pytest.fixture
def no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines take the first candidates instead of drawing among them."""

    def ours(
        positive: Tensor, negative: Tensor, num: int, fraction: float, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return first_of(positive, negative, num, fraction)

    def theirs(labels: Tensor, num: int, fraction: float, background: int) -> tuple[Tensor, Tensor]:
        positive = ((labels != -1) & (labels != background)).nonzero().flatten()
        return first_of(positive, (labels == background).nonzero().flatten(), num, fraction)

    monkeypatch.setattr(rpn, "sample", ours)
    monkeypatch.setattr(roi_heads, "sample", ours)
    monkeypatch.setattr("detectron2.modeling.proposal_generator.rpn.subsample_labels", theirs)
    monkeypatch.setattr("detectron2.modeling.roi_heads.roi_heads.subsample_labels", theirs)


@pytest.fixture
def their_samples(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our regions are those that Detectron2 sampled: rounding moves a proposal's corner, and that a pixel of its mask."""
    sampled: list[SampledBoxes] = []
    label_and_sample = pair.theirs.roi_heads.label_and_sample_proposals

    def recording(proposals: list[Any], targets: list[Any]) -> list[Any]:
        result: list[Any] = label_and_sample(proposals, targets)
        sampled.clear()
        for one, target in zip(result, targets, strict=True):
            matched = (one.gt_boxes.tensor[:, None] == target.gt_boxes.tensor[None]).all(dim=2).int().argmax(dim=1)
            sampled.append(SampledBoxes(one.proposal_boxes.tensor, one.gt_classes, matched))
        return result

    monkeypatch.setattr(pair.theirs.roi_heads, "label_and_sample_proposals", recording)
    monkeypatch.setattr(pair.ours.roi_heads, "sample", lambda proposals, targets, rng: list(sampled))


@pytest.mark.usefixtures("no_chance")
def test_same_samples_and_losses(pair: Pair) -> None:
    batch = batch_of(pair)
    fix_statistics(pair, train=True)
    theirs, ours = both_losses(pair, batch)
    for name in ours:
        assert float(ours[name].detach()) == pytest.approx(float(theirs[name].detach()), rel=2e-3, abs=1e-5), name


@pytest.mark.usefixtures("no_chance", "their_samples")
def test_same_losses_and_gradients_for_the_same_samples(pair: Pair) -> None:
    batch = batch_of(pair)
    before = {name: tensor.clone() for name, tensor in pair.ours.state_dict().items()}
    pair.ours.train()
    pair.theirs.train()
    theirs, ours = both_losses(pair, batch)
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert float(ours[name].detach()) == pytest.approx(float(theirs[name].detach()), rel=1e-4, abs=1e-5), name
    pair.ours.load_state_dict(before)
    pair.theirs.load_state_dict(pair.recipe.detector.to_detectron2(before), strict=False)
    fix_statistics(pair, train=True)
    theirs, ours = both_losses(pair, batch)
    require_same_gradients(pair, ours, theirs)


@pytest.mark.usefixtures("no_chance")
@pytest.mark.slow
def test_a_short_training_on_the_same_batches_stays_together(voc: Path, tmp_path: Path) -> None:
    """Twelve steps with warm-up and a fall of the rate.

    The first three losses agree to 1e-3. Then a proposal that rounding moves over a threshold is another sample; a copy of
    our own network with weights that differ by 1e-6 leaves as far. The objectness stays within 10 %, the mean within 5 %.
    """
    pair = make_pair(
        VOC,
        voc,
        tmp_path,
        make_backbone(tmp_path / "b.safetensors"),
        "iterations=12",
        "milestones=[9]",
        "lr=0.005",
        "warmup_iterations=4",
    )
    optimizer = torchvision_engine.build_optimizer(pair.ours, pair.recipe)
    other = build_optimizer(pair.cfg, pair.theirs)
    schedule = build_lr_scheduler(pair.cfg, other)
    pair.ours.train()
    pair.theirs.train()
    course: list[tuple[float, float]] = []
    for step, batch in enumerate(training_batches(pair.train, pair.recipe, 0, 0, 12)):
        rate = 0.005 * step_factor(step, [9], 0.1) * warmup_factor(step, 4, pair.recipe.warmup_factor)
        for group in optimizer.param_groups:
            group["lr"] = rate
        assert all(group["lr"] == pytest.approx(rate, rel=1e-6) for group in other.param_groups)
        theirs, ours = both_losses(pair, batch)
        total, wanted = sum(ours.values()), sum(theirs.values())
        if step < 3:
            assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
        assert float(ours["rpn_objectness"]) == pytest.approx(float(theirs["rpn_objectness"]), rel=0.1)
        course.append((float(total.detach()), float(wanted.detach())))
        for losses, engine in ((total, optimizer), (wanted, other)):
            engine.zero_grad()
            losses.backward()
            engine.step()
        schedule.step()
    mine, other_mean = np.mean(course, axis=0)
    assert mine == pytest.approx(other_mean, rel=5e-2)


def test_the_same_groups_of_parameters(pair: Pair) -> None:
    def decays(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, float]:
        return {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}

    theirs = decays(build_optimizer(pair.cfg, pair.theirs), {id(p): n for n, p in pair.theirs.named_parameters()})
    mine = decays(
        torchvision_engine.build_optimizer(pair.ours, pair.recipe), {id(p): n for n, p in pair.ours.named_parameters()}
    )
    assert pair.recipe.detector.to_detectron2({n: torch.tensor(d) for n, d in mine.items()}) == {
        n: torch.tensor(d) for n, d in theirs.items()
    }
