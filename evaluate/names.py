"""What data sets, frameworks, methods, protocols, metrics and settings are called in tables and plots."""

from __future__ import annotations

import re
from typing import Any

NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny_imagenet": "Tiny-ImageNet",
    "imagenet1k": "ImageNet-1K",
    "voc2007": "VOC 2007",
    "coco2017": "COCO 2017",
    "imagenet100": "ImageNet-100",
    "food101": "Food-101",
    "sun397": "SUN397",
    "stanford_cars": "Stanford Cars",
    "fgvc_aircraft": "FGVC Aircraft",
    "dtd": "DTD",
    "oxford_pets": "Oxford Pets",
    "caltech101": "Caltech-101",
    "flowers102": "Flowers-102",
    "cub200": "CUB-200",
    "eurosat": "EuroSAT",
    "places205": "Places205",
    "places365": "Places365",
    "inaturalist2018": "iNaturalist 2018",
    "moco": "MoCo",
    "mocov2": "MoCo v2",
    "simsiam": "SimSiam",
    "byol": "BYOL",
    "simclr": "SimCLR",
    "swav": "SwAV",
    "densecl": "DenseCL",
    "pixpro": "PixPro",
    "detco": "DetCo",
    "dino": "DINO",
    "mocov3": "MoCo v3",
    "vicreg": "VICReg",
    "resim": "ReSim",
    "inscon": "InsCon",
    "clove": "CLoVE",
    "soco": "SoCo",
    "slotcon": "SlotCon",
    "infomin": "InfoMin",
    "barlowtwins": "Barlow Twins",
    "deepclusterv2": "DeepCluster-v2",
    "supervised": "Supervised",
    "vanilla": "Vanilla",
    "unmix": "Un-Mix",
    "mixmask": "MixMask",
    "mixmask+unmix": "MixMask + Un-Mix",
    "mscn": "MSCN",
    "random": "Random",
    "knn": "kNN",
    "mix.grid": "Grid size",
    "mix.mask": "Masking strategy",
    "mix.ratio": "Masking ratio",
    "mix.switch": "Switch mixture",
    "mix.permutation": "Permutations",
    "mix.unmix_prob": "Un-Mix probability",
}
OLD_KEYS = {  # what earlier versions called a recipe's keys in tables and queries; still read
    "grid_size": "mix.grid",
    "mask": "mix.mask",
    "mask_ratio": "mix.ratio",
    "switch": "mix.switch",
    "permutation": "mix.permutation",
    "unmix_prob": "mix.unmix_prob",
}
BASELINES = ("random", "vanilla")  # what every other method is compared with, so tables and legends begin with them
# COCO's names of what is detected; any other one is shown as it is.
FOUND = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}


def method_place(method: str) -> tuple[int, str]:
    """Sort key of methods: the baselines first, then the others by name."""
    return (BASELINES.index(method) if method in BASELINES else len(BASELINES), name(method).lower())


def method_order() -> dict[str, int]:
    """The texts that tables put first, and their places."""
    return {name(method): number for number, method in enumerate(BASELINES)}


def average_precision_name(metric: str) -> str | None:
    """``box AP50`` for ``bbox/AP50``; None if the metric is not an average precision over all classes."""
    found = re.fullmatch(r"(\w+)/(AP\w*)", metric)
    return f"{FOUND.get(found[1], found[1])} {found[2]}" if found else None


KEYS = {shown.lower(): key for key, shown in NAMES.items()}


def key_of(text: str) -> str:
    """A data set's, framework's or method's key from its key or from what it is called: ``cifar100`` from ``CIFAR-100``."""
    return text if text in NAMES else KEYS.get(text.lower(), text)


def name(value: Any) -> str:
    """A data set, framework or method as the paper writes it."""
    return "?" if value is None else NAMES.get(str(value), str(value))


def epochs_name(value: float | None) -> str:
    """A number of epochs, or a question mark."""
    return "?" if value is None else f"{value:,.10g}"


def setting_name(key: str, value: Any) -> str:
    """A value of what tables 1 to 3 vary, as the paper writes it."""
    if key == "mix.grid":
        return f"{value} × {value}"
    if key == "mix.switch":
        return "yes" if value in (True, "true") else "no"
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


def text_of(value: Any) -> str:
    """A setting's value in a footnote."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.10g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
