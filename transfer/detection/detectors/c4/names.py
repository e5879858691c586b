"""Convert the tensor names of a C4 detector between our network and Detectron2's, in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixmask.transfer.checkpoints.names import from_detectron2, to_detectron2

STEM = {"stem.0.": "conv1.", "stem.1.": "bn1."}
STAGES = {"res2.": "layer1.", "res3.": "layer2.", "res4.": "layer3.", "roi_heads.res5.": "layer4."}
HEADS = {
    "rpn.conv.": "proposal_generator.rpn_head.conv.",
    "rpn.objectness.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.deltas.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_heads.norm.": "roi_heads.res5.norm.",
    "roi_heads.classifier.": "roi_heads.box_predictor.cls_score.",
    "roi_heads.regressor.": "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.": "roi_heads.mask_head.",
}
TRUNK = STEM | STAGES


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    return next((new + name[len(old) :] for old, new in table.items() if name.startswith(old)), None)


def detector_to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a `C4Detector` to Detectron2's ``GeneralizedRCNN`` with `Res5ROIHeadsExtraNorm`.

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
    head = _renamed(name, HEADS)
    if head is not None:
        return head
    trunk = _renamed(name, TRUNK)
    if trunk is None:
        raise KeyError(name)
    return f"{'roi_heads' if trunk.startswith('layer4') else 'backbone'}.{to_detectron2(trunk)}"


def _ours(name: str) -> str:
    head = _renamed(name, {theirs: ours for ours, theirs in HEADS.items()})
    if head is not None:
        return head
    trunk = from_detectron2(name.removeprefix("backbone.").removeprefix("roi_heads."))
    ours = _renamed(trunk, {theirs: ours for ours, theirs in TRUNK.items()})
    if ours is None:
        raise KeyError(name)
    return ours
