"""Convert the tensor names of a ResNet trunk between torchvision and other libraries."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from typing_extensions import override

COUNTER = "num_batches_tracked"
# What torch.compile, Lightning Fabric, activation checkpointing and FSDP put into tensor names, at any depth.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|_forward_module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def unwrapped(name: str) -> str:
    """A tensor's name without `WRAPPERS`."""
    return WRAPPERS.sub("", name)


def to_detectron2(name: str) -> str:
    """Detectron2's name of a trunk tensor: ``layer1.0.bn1.weight`` is ``res2.0.conv1.norm.weight``.

    Raises:
        KeyError: If the name is not a ResNet trunk's.
    """
    stem = re.fullmatch(r"(conv1|bn1)\.(\w+)", name)
    if stem:
        return f"stem.conv1.{'norm.' if stem[1] == 'bn1' else ''}{stem[2]}"
    block = re.fullmatch(r"layer([1-4])\.([0-9]{1,3})\.(conv|bn|downsample\.)([0-9])\.(\w+)", name)
    if not block:
        raise KeyError(name)
    stage, index, kind, number, leaf = block.groups()
    where = f"res{int(stage) + 1}.{index}"
    if kind == "downsample.":
        return f"{where}.shortcut.{'norm.' if number == '1' else ''}{leaf}"
    return f"{where}.conv{number}.{'norm.' if kind == 'bn' else ''}{leaf}"


def from_detectron2(name: str) -> str:
    """The inverse of `to_detectron2`.

    Raises:
        KeyError: If the name is not a Detectron2 ResNet's.
    """
    stem = re.fullmatch(r"stem\.conv1\.(norm\.)?(\w+)", name)
    if stem:
        return f"{'bn1' if stem[1] else 'conv1'}.{stem[2]}"
    block = re.fullmatch(r"res([2-5])\.([0-9]{1,3})\.(conv([0-9])|shortcut)\.(norm\.)?(\w+)", name)
    if not block:
        raise KeyError(name)
    stage, index, part, number, norm, leaf = block.groups()
    where = f"layer{int(stage) - 1}.{index}"
    if part == "shortcut":
        return f"{where}.downsample.{1 if norm else 0}.{leaf}"
    return f"{where}.{'bn' if norm else 'conv'}{number}.{leaf}"


class Names(ABC):
    """A naming scheme for the tensors of a trunk.

    Attributes:
        anchor: The name of the first tensor (a convolution's weight), by which the trunk is located.
    """

    anchor: str

    @abstractmethod
    def trunk_name(self, name: str) -> str | None:
        """Our name for a tensor, given the source's name without its prefix; None if it is not part of the trunk."""

    def among(self, names: Iterable[str]) -> Names:
        """The same scheme, adapted to a file that holds ``names`` (given without their prefix)."""
        del names
        return self

    def is_beyond(self, name: str) -> bool:
        """Whether the name alone shows that a tensor comes after the trunk (a later child of a ``Sequential``)."""
        del name
        return False


class TorchvisionNames(Names):
    """``conv1.weight`` … ``layer4.2.bn3.running_var``."""

    anchor = "conv1.weight"

    @override
    def trunk_name(self, name: str) -> str | None:
        return name if re.fullmatch(r"(conv1|bn1|layer[0-9])\..+", name) else None


class SequentialNames(Names):
    """The children of a ResNet in a ``Sequential``: ``0.weight``, ``1.bias``, ``4.0.conv1.weight``.

    The four child indices that hold blocks are the layers. Their values depend on whether activation and pooling are
    children, too.
    """

    anchor = "0.weight"

    def __init__(self, layers: Sequence[int] = ()) -> None:
        self.layers = {str(number): f"layer{place}" for place, number in enumerate(layers, start=1)}

    @override
    def among(self, names: Iterable[str]) -> Names:
        return SequentialNames(
            sorted({int(m[1]) for name in names if (m := re.match(r"([0-9]{1,3})\.[0-9]{1,3}\.conv1\.", name))})
        )

    @override
    def trunk_name(self, name: str) -> str | None:
        number, _, rest = name.partition(".")
        if number in self.layers:
            return f"{self.layers[number]}.{rest.replace('shortcut.', 'downsample.')}"
        return {"0": f"conv1.{rest}", "1": f"bn1.{rest}"}.get(number)

    @override
    def is_beyond(self, name: str) -> bool:
        number = name.partition(".")[0]
        return re.fullmatch("[0-9]{1,3}", number) is not None and int(number) > max(map(int, self.layers), default=0)


class Detectron2Names(Names):
    """``stem.conv1.weight`` … ``res5.2.conv3.norm.running_var``; in a C4 detector, res5 is in the RoI heads."""

    anchor = "stem.conv1.weight"

    @override
    def trunk_name(self, name: str) -> str | None:
        try:
            return from_detectron2(name)
        except KeyError:
            return None


class ListedNames(Names):
    """The exact names of one network (of timm), for which there is no scheme.

    Args:
        names: All tensor names, in the network's order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.listed = tuple(names)
        self.anchor = self.listed[0]

    @override
    def trunk_name(self, name: str) -> str | None:
        return name if name in self.listed else None


class TransformersNames(Names):
    """The ResNet of Hugging Face's transformers: ``embedder.embedder.convolution.weight`` …"""

    anchor = "embedder.embedder.convolution.weight"

    @override
    def trunk_name(self, name: str) -> str | None:
        stem = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name)
        if stem:
            return f"{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
        block = re.fullmatch(
            r"encoder\.stages\.([0-3])\.layers\.([0-9]{1,3})\.(?:layer\.([0-2])|(shortcut))\.(convolution|normalization)\.(\w+)",
            name,
        )
        if not block:
            return None
        stage, index, layer, shortcut, part, leaf = block.groups()
        where, norm = f"layer{int(stage) + 1}.{index}", part == "normalization"
        if shortcut:
            return f"{where}.downsample.{int(norm)}.{leaf}"
        return f"{where}.{'bn' if norm else 'conv'}{int(layer) + 1}.{leaf}"


TORCHVISION, SEQUENTIAL, DETECTRON2, TRANSFORMERS = (
    TorchvisionNames(),
    SequentialNames(),
    Detectron2Names(),
    TransformersNames(),
)
