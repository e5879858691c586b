"""RetinaNet on both engines: Detectron2 must be importable, or these are skipped with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")

from detectron2.utils.events import EventStorage

from benchmarks.detection import their_batch
from mixmask.engine.randomness import generator
from mixmask.transfer.detection.data.batches import DetectionBatch, training_batches
from mixmask.transfer.detection.engines import torchvision as torchvision_engine
from tests.conftest import make_backbone
from tests.transfer.detection.engine_pairs import Pair, make_pair, pictures
from tests.transfer.detection.test_detection import COCO, RETINANET, VOC, with_detector
from tests.transfer.detection.test_parity import close, fix_statistics


@pytest.fixture(scope="module", params=["coco50", "voc18"])
def pair(request: pytest.FixtureRequest, coco: Path, voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    where = tmp_path_factory.mktemp(request.param)
    text, root, arch = (COCO, coco, "resnet50") if request.param == "coco50" else (VOC, voc, "resnet18")
    return make_pair(with_detector(text, RETINANET), root, where, make_backbone(where / "b.safetensors", arch))


def test_names_are_a_bijection(pair: Pair) -> None:
    state = {name: tensor for name, tensor in pair.ours.state_dict().items() if name != "normalizer"}
    detector = pair.recipe.detector
    assert set(detector.from_detectron2(detector.to_detectron2(state))) == set(state)
    assert set(detector.to_detectron2(state)) == set(pair.theirs.state_dict())


def test_same_anchors_and_predictions(pair: Pair) -> None:
    images = pictures()
    fix_statistics(pair, train=False)
    with torch.no_grad():
        batch = pair.theirs.preprocess_image([{"image": image} for image in images])
        every = pair.theirs.backbone(batch.tensor)
        features = [every[name] for name in pair.theirs.head_in_features]
        anchors = pair.theirs.anchor_generator(features)
        shape = [pair.theirs.num_classes, 4]
        logits, deltas = pair.theirs._transpose_dense_predictions(pair.theirs.head(features), shape)
        ours = pair.ours.predict(images)
    for level in range(5):
        assert torch.equal(ours[0][level], anchors[level].tensor)
        close(ours[1][level], logits[level])
        close(ours[2][level], deltas[level])


def test_same_detections(pair: Pair) -> None:
    images, sizes = pictures(), [(121, 161), (352, 480)]
    fix_statistics(pair, train=False)
    inputs = [{"image": image, "height": h, "width": w} for image, (h, w) in zip(images, sizes)]
    with torch.no_grad():
        theirs = [output["instances"] for output in pair.theirs(inputs)]
        detections = pair.ours.detect(images)
    for number, (one, other) in enumerate(zip(theirs, detections, strict=True)):
        height, width = sizes[number]
        found = torchvision_engine.in_original_pixels(
            torchvision_engine.on_cpu(other), number, images[number].shape[1:], width, height
        )
        assert len(found) == len(one) > 2
        assert [f.label for f in found] == one.pred_classes.tolist()
        close(torch.tensor([f.score for f in found]), one.scores)
        torch.testing.assert_close(torch.tensor([f.box for f in found]), one.pred_boxes.tensor, rtol=1e-4, atol=1e-2)


def both_losses(pair: Pair, batch: DetectionBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = pair.recipe.detector.losses
    with EventStorage():
        theirs = {names[name]: loss for name, loss in pair.theirs(their_batch(batch)).items()}
    rng = [generator(0, row) for row in range(len(batch.images))]
    return theirs, pair.ours.losses(batch.images, batch.targets, rng)


def test_same_losses_and_gradients_step_after_step(pair: Pair) -> None:
    """The normaliser is a mean over steps: it must go the same way."""
    batches: list[Any] = list(training_batches(pair.train, pair.recipe, 3, 0, 3))
    fix_statistics(pair, train=True)
    for batch in batches:
        theirs, ours = both_losses(pair, batch)
        assert theirs.keys() == ours.keys()
        for name in ours:
            assert float(ours[name].detach()) == pytest.approx(float(theirs[name].detach()), rel=1e-4, abs=1e-5), name
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    wanted = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    given = pair.recipe.detector.to_detectron2({name: p.grad for name, p in pair.ours.named_parameters()})
    assert given.keys() == wanted.keys()
    for name, gradient in given.items():
        assert float((gradient - wanted[name]).norm()) < 2e-2 * float(wanted[name].norm()) + 1e-6, name
