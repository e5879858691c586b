"""A picture of what a recipe does to its images: views, masks, mixtures and switch images (the paper's figure 8)."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from mixmask.engine.augment import Photometric
from mixmask.engine.data import open_split
from mixmask.engine.loader import BatchPlan, check_crop, open_source
from mixmask.engine.normalization import Normalization, statistics_of
from mixmask.engine.randomness import generator, python_generator
from mixmask.engine.storage import write_atomic
from mixmask.pretrain.recipe import PretrainRecipe

Column = tuple[str, list[Tensor], list[str]]  # heading, one (3, H, W) in [0, 1] per image, a caption for each


def draw_views(recipe: PretrainRecipe, out: Path, num: int) -> str:
    """Draw the first ``num`` images of the run's first epoch as its first step would see them, and write a PNG.

    Returns:
        A line that names the file and its columns.

    Raises:
        UserError: If the data cannot be read, or there are fewer than ``num`` images.
    """
    columns = _columns(recipe, num)
    _paint(recipe, columns, num, out)
    return f"{out}: {num} images × {len(columns)} columns ({', '.join(heading for heading, _, _ in columns)})"


def _columns(recipe: PretrainRecipe, num: int) -> list[Column]:
    images = open_split(recipe.data, "train").with_decoding(recipe.backbone.in_channels)
    for view in recipe.views:
        check_crop(images, recipe.data, view)
    plan = BatchPlan(len(images), num, drop_last=True, seed=recipe.seed)
    chosen = images.subset(plan.indices(0)[0])
    # A data set of the chosen images alone, so that nothing else is decoded; its single batch shuffles them again.
    alone = BatchPlan(num, num, drop_last=True, seed=recipe.seed)
    source = open_source(chosen, recipe.data.model_copy(update={"num_workers": 0}), torch.device("cpu"))
    batch = next(iter(source.training(alone, recipe.views, 0, 1)))
    order = alone.indices(0)[0]
    views = [
        Photometric(view)(cut, generator(recipe.seed, "photometric", 0, number), batch.rows, batch.total)
        for number, (view, cut) in enumerate(zip(recipe.views, batch.views, strict=True))
    ]
    none = [""] * num
    originals = [_as_rgb(chosen.read(index).float() / 255) for index in order]
    names = [chosen.classes[int(chosen.labels[index])][:18] if chosen.classes else "" for index in order]
    columns: list[Column] = [
        ("image", originals, names),
        ("view 1 (query)", _shown(views[0], recipe.augment.normalization), none),
        ("view 2 (key)", _shown(views[1], recipe.augment.normalization), none),
    ]
    rng = python_generator(recipe.seed, "mask", 0, 0, 0)
    mix = recipe.mix
    groups = getattr(mix, "mask_groups", 1)
    if groups > 1:  # groups as large as in training, where the pictures suffice; else one group of them all
        fits = [count for count in range(1, num + 1) if num % count == 0 and count <= groups * num / recipe.batch_size]
        mix = mix.model_copy(update={"mask_groups": max(fits, default=1)})
    small, extra = views[2 : 2 + recipe.num_small], views[2 + recipe.num_small :]
    for number, pictures in enumerate(small, start=1):
        columns.append((f"small view {number}", _shown(pictures, recipe.augment.normalization), none))
    for column in mix.pictures([*views[:2], *extra], rng):
        shown = list(column.images) if column.is_mask else _shown(column.images, recipe.augment.normalization)
        columns.append((column.heading, shown, list(column.captions)))
    return columns


def _shown(views: Tensor, normalization: Normalization) -> list[Tensor]:
    """Undo the normalisation: one (3, H, W) image in [0, 1] per view."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in statistics_of(normalization, views.shape[1]))
    return [_as_rgb(view) for view in (views * std + mean).clamp(0, 1)]


def _as_rgb(image: Tensor) -> Tensor:
    """(C, H, W) to (3, H, W): a grey image in three channels, or the first three of several."""
    return image[:1].expand(3, -1, -1) if len(image) < 3 else image[:3]


def _paint(recipe: PretrainRecipe, columns: list[Column], num: int, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.75 * len(columns), 1.95 * num + 0.5), dpi=110, layout="constrained")
    grid = figure.subplots(num, len(columns), squeeze=False)
    figure.suptitle(f"{recipe.name}: {recipe.framework.kind}, {recipe.method}", fontsize=11)
    for place, (heading, pictures, captions) in enumerate(columns):
        for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            axes = grid[row][place]
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(caption, fontsize=8)
            if row == 0:
                axes.set_title(heading, fontsize=9)
            if place == 0:
                axes.set_ylabel(str(row + 1), rotation=0, labelpad=10, va="center", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(out, lambda file: file.write(buffer.getvalue()))
