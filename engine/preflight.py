"""Inspects a whole data set before training (``mixmask check-data``): counts, image sizes, and unreadable files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.engine.data import KINDS, kind_of, open_split
from mixmask.engine.data.folder import NO_CLASSES, USUAL_SPLITS, images_in, is_unlabelled
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import ImageSet
from mixmask.engine.late import torch
from mixmask.engine.progress import track

CHUNK = 256


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split.

    Attributes:
        name: Its folder's name.
        kind: The kind of data that it was read as.
        images: The images.
        sizes: Count of each (width, height) in pixels.
        damaged: What is wrong with each file that cannot be read.
    """

    name: str
    kind: str
    images: ImageSet
    sizes: Counter[tuple[int, int]]
    damaged: list[str]

    def describe(self) -> str:
        """A summary in a few lines: images, classes, sizes in pixels, damaged files."""
        widths, heights = ([size[side] for size in self.sizes.elements()] for side in (0, 1))
        (usual, count), *_ = self.sizes.most_common(1) or [((0, 0), 0)]
        lines = [
            str(self.images.root) if self.name == "." else f"{self.name}  {self.images.root}",
            f"  kind      {self.kind}",
            f"  images    {len(self.images):,}{self._classes()}",
        ]
        if widths:
            lines.append(
                f"  pixels    {_middle(widths)} × {_middle(heights)} (median), widths {_range(widths)}, heights "
                f"{_range(heights)}; {usual[0]} × {usual[1]} is the commonest ({100 * count / len(widths):.0f} %)"
            )
        lines.append(f"  damaged   {len(self.damaged) or 'none'}")
        return "\n".join(lines)

    def _classes(self) -> str:
        labels, num = self.images.labels, len(self.images.classes)
        if not num:
            return ", without labels"
        per_class = torch.bincount(labels, minlength=num) if labels.ndim == 1 else (labels == 1).sum(dim=0)
        return f" in {num:,} classes, {_range(per_class.tolist())} per class"


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _middle(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]


def find_splits(root: Path, layout: str | None = None, labels: bool = True) -> list[str]:
    """Names of the splits in ``root``, from the first kind of data that finds any.

    Args:
        root: The data set's folder or archive.
        layout: The kind of data; by default the one that recognises ``root``.
        labels: Whether images must lie in class folders.

    Raises:
        DataError: If there is none.
        ConfigError: If ``layout`` names no kind of data.
    """
    root = root.expanduser()
    if not root.exists():
        raise DataError(f"{root}: no such folder or archive")
    known = KINDS.classes() if layout is None else [KINDS.get(layout, "--layout")]
    kinds = sorted((one() for one in known), key=lambda one: one.general)
    splits = next((found for one in kinds if (found := one.splits(root))), [])
    if not splits and layout is not None:
        kinds[0].open(root, DataRecipe(name="data", root=str(root), layout=layout), "train")  # says what it expected
    if not splits and not labels and root.is_dir():
        return [name for name in USUAL_SPLITS if (root / name).is_dir()] or ["."]
    if not splits and root.is_file():
        raise DataError(
            f"{root}: is a file and no archive that is known; a folder was expected, a .zip file, a list of images (.txt), "
            f"a .parquet or .arrow file, or CIFAR's archive"
        )
    if not splits and images_in(root):
        raise DataError(f"{root}: {NO_CLASSES}")
    if not splits:
        there = sorted(path.name for path in root.iterdir())[:10] if root.is_dir() else []
        raise DataError(
            f"{root}: none of {', '.join(USUAL_SPLITS)} and no archive that is known in it "
            f"({'it holds ' + ', '.join(there) if there else 'it is empty'}); name the splits"
        )
    return splits


def split_recipe(root: Path, name: str, **keys: Any) -> tuple[DataRecipe, Part]:
    """What opens one of the splits that `find_splits` found.

    Args:
        root: The data set.
        name: The split.
        keys: Further keys of the recipe: ``layout``, ``labels``, ``image_column``, ``label_column``.

    Raises:
        DataError: If there is no such split.
    """
    there = find_splits(root, keys.get("layout"), keys.get("labels", True)) if not (root / name).exists() else [name]
    if name not in there:
        raise DataError(f"{root}: no split '{name}'; there are: {', '.join(there)}")
    others = [split for split in USUAL_SPLITS if split != name]
    # Where splits are no folders, "train" and "test" are the only names.
    train = name if name == "train" or ((root / name).exists() and not (root / "train").is_dir()) else "train"
    test = name if name != train else others[0]
    data = DataRecipe(name="data", root=str(root), train=train, test=test, **keys)
    return data, "train" if name == train else "test"


def inspect_split(root: Path, name: str, quick: bool, **keys: Any) -> SplitReport:
    """Read every image of a split, with one thread per core.

    Args:
        root: The data set's folder or archive.
        name: The split's folder.
        quick: Read only the header and the end of a JPEG. This finds its size and truncation, but not damage in
            between. Other files are decoded all the same.
        keys: As `split_recipe` takes them.

    Raises:
        DataError: If the split's folder is not one with images in class folders.
    """
    data, part = split_recipe(root, name, **keys)
    images = open_split(data, part).with_decoding(channels=0)  # whatever the channels are
    sizes: Counter[tuple[int, int]] = Counter()
    damaged: list[str] = []
    # In chunks, so that the progress bar moves while the threads read.
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def look(index: int) -> tuple[int, int] | str:
            try:
                return images.size(index) if quick else _decoded(images, index)
            except DataError as error:
                return str(error)

        results = (list(pool.map(look, chunk)) for chunk in chunks)
        for found in track(f"{name}: reading images", results, len(chunks), CHUNK):
            for item in found:
                if isinstance(item, str):
                    damaged.append(item)
                else:
                    sizes[item] += 1
    return SplitReport(name, kind_of(root, data).kind, images, sizes, damaged)


def _decoded(images: ImageSet, index: int) -> tuple[int, int]:
    _, height, width = images.read(index).shape
    return width, height


def unlabelled_splits(root: Path, splits: Sequence[str]) -> list[str]:
    """The splits without class folders, like Tiny-ImageNet's ``test``, which are left out where labels are wanted."""
    return [name for name in splits if is_unlabelled(root / name)]


def check_data(
    root: Path, splits: Sequence[str], quick: bool, **keys: Any
) -> tuple[list[SplitReport], list[str], list[str]]:
    """Inspect every split, and check that all have the same classes.

    Returns:
        The reports, what is wrong (damaged files, and classes that differ between splits), and remarks on splits without
        labels, as Tiny-ImageNet's ``test``.
    """
    root = root.expanduser()
    without = unlabelled_splits(root, splits) if keys.get("labels", True) else []
    labelled = [name for name in splits if name not in without]
    reports = [inspect_split(root, name, quick, **keys) for name in labelled]
    if not reports:
        raise DataError(f"{root / without[0]}: holds images without class folders; nothing to train or test with")
    problems = [problem for report in reports for problem in report.damaged]
    first = reports[0]
    for report in reports[1:]:
        differing = sorted(set(first.images.classes) ^ set(report.images.classes))
        if differing:
            problems.append(
                f"{first.images.root} and {report.images.root} have different classes: {len(differing)} stand in one only, "
                f"for example {', '.join(differing[:3])}"
            )
    return reports, problems, [f"{name}  {root / name}\n  images    without labels, not used" for name in without]
