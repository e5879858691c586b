"""Convert the tensor names of an FPN detector between our network and Detectron2's, in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixmask.transfer.detection.layers.pyramid_names import pyramid_from_detectron2, pyramid_to_detectron2

FINEST = 2  # p2, of stride 4
HEADS = {
    "rpn.conv.": "proposal_generator.rpn_head.conv.",
    "rpn.objectness.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.deltas.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_heads.classifier.": "roi_heads.box_predictor.cls_score.",
    "roi_heads.regressor.": "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.box_head.": "roi_heads.box_head.",
    "roi_heads.mask_head.": "roi_heads.mask_head.",
}


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    return next((new + name[len(old) :] for old, new in table.items() if name.startswith(old)), None)


def detector_to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of an `FPNDetector` to Detectron2's ``GeneralizedRCNN`` on an FPN.

    Raises:
        KeyError: If a tensor has no counterpart there.
    """
    return {_theirs(name): tensor for name, tensor in state.items()}


def detector_from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `detector_to_detectron2`.

    Raises:
        KeyError: If a tensor has no place here.
    """
    return {_ours(name): tensor for name, tensor in state.items()}


def _theirs(name: str) -> str:
    found = _renamed(name, HEADS) or pyramid_to_detectron2(name, FINEST)
    if found is None:
        raise KeyError(name)
    return found


def _ours(name: str) -> str:
    found = _renamed(name, {theirs: ours for ours, theirs in HEADS.items()}) or pyramid_from_detectron2(name, FINEST)
    if found is None:
        raise KeyError(name)
    return found
