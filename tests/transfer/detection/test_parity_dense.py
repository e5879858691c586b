"""RetinaNet on both engines: Detectron2 must be importable, or these are skipped with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")


from mixmask.transfer.detection.data.batches import training_batches
from tests.conftest import make_backbone
from tests.transfer.detection.engine_pairs import (
    Pair,
    both_losses,
    close,
    detected_by_both,
    fix_statistics,
    make_pair,
    pictures,
    require_same_gradients,
)
from tests.transfer.detection.small_recipes import COCO, RETINANET, VOC, with_detector


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
    assert len(list(detected_by_both(pair))) == 2


def test_same_losses_and_gradients_step_after_step(pair: Pair) -> None:
    """The normaliser is a mean over steps: it must go the same way."""
    batches: list[Any] = list(training_batches(pair.train, pair.recipe, 3, 0, 3))
    fix_statistics(pair, train=True)
    for batch in batches:
        theirs, ours = both_losses(pair, batch)
        assert theirs.keys() == ours.keys()
        for name in ours:
            assert float(ours[name].detach()) == pytest.approx(float(theirs[name].detach()), rel=1e-4, abs=1e-5), name
    require_same_gradients(pair, ours, theirs)
