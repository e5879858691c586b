"""Convert the tensor names of a RetinaNet between our network and Detectron2's, in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixmask.transfer.detection.layers.pyramid_names import pyramid_from_detectron2, pyramid_to_detectron2

FINEST = 3  # p3, of stride 8
HEAD = "head."  # the names in it are Detectron2's
OURS_ALONE = ("normalizer",)  # Detectron2 keeps it as an attribute, and forgets it when a run is resumed


def detector_to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a `RetinaNet` to Detectron2's; the normaliser of its losses has no place there.

    Raises:
        KeyError: If a tensor has no counterpart there.
    """
    found = {}
    for name, tensor in state.items():
        if name not in OURS_ALONE:
            theirs = name if name.startswith(HEAD) else pyramid_to_detectron2(name, FINEST)
            if theirs is None:
                raise KeyError(name)
            found[theirs] = tensor
    return found


def detector_from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `detector_to_detectron2`.

    Raises:
        KeyError: If a tensor has no place here.
    """
    found = {}
    for name, tensor in state.items():
        ours = name if name.startswith(HEAD) else pyramid_from_detectron2(name, FINEST)
        if ours is None:
            raise KeyError(name)
        found[ours] = tensor
    return found
