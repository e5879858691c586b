"""The names of a C4 detector's tensors in our network and in Detectron2's, in both directions."""

from __future__ import annotations

from mixmask.transfer.checkpoints.names import from_detectron2, to_detectron2
from mixmask.transfer.detection.layers.tensor_names import RPN_AND_BOXES, renamed, reversed_names

TRUNK = {
    "stem.0.": "conv1.",
    "stem.1.": "bn1.",
    "res2.": "layer1.",
    "res3.": "layer2.",
    "res4.": "layer3.",
    "roi_heads.res5.": "layer4.",
}
HEADS = {**RPN_AND_BOXES, "roi_heads.norm.": "roi_heads.res5.norm."}


def name_in_detectron2(name: str) -> str | None:
    """Detectron2's name of a tensor of a `C4Detector`; None if there is none."""
    head = renamed(name, HEADS)
    if head is not None:
        return head
    trunk = renamed(name, TRUNK)
    if trunk is None:
        return None
    return f"{'roi_heads' if trunk.startswith('layer4') else 'backbone'}.{to_detectron2(trunk)}"


def name_here(name: str) -> str | None:
    """The inverse of `name_in_detectron2`."""
    head = renamed(name, reversed_names(HEADS))
    if head is not None:
        return head
    trunk = from_detectron2(name.removeprefix("backbone.").removeprefix("roi_heads."))
    return renamed(trunk, reversed_names(TRUNK))
