"""The commands that inspect the inputs of a run: configs, show-views, check-data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from mixmask.engine.builtin_configs import config_file, listed_configs
from mixmask.launch.commands.options import Config, Force, Overrides
from mixmask.launch.commands.terminal import show

Root = Annotated[
    Path, typer.Argument(help="A folder, a .zip file, a list of paths (.txt), a .parquet file, or CIFAR's archive.")
]
Layout = Annotated[
    str | None,
    typer.Option(help="The kind of data, as data.layout in configs. Default: what recognises the folder."),
]
Labels = Annotated[
    bool, typer.Option("--labels/--no-labels", help="Whether class folders are classes, or just folders.")
]
ImageColumn = Annotated[str | None, typer.Option(help="The column of images of parquet and arrow files.")]
LabelColumn = Annotated[str | None, typer.Option(help="The column of classes of parquet and arrow files.")]
SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}


def configs(
    kind: Annotated[
        Literal["pretrain", "transfer", "suites", "cluster"] | None, typer.Argument(help="Only those of one kind.")
    ] = None,
    path: Annotated[bool, typer.Option("--path", help="Where the files lie, one to a line.")] = False,
) -> None:
    """List the configs that come with mixmask; each is named on the command line by its name alone.

    \b
    Examples:
      mixmask configs transfer
      mixmask transfer knn backbone=backbone.safetensors data.root=/data/cifar10
    """
    found = listed_configs(kind)
    for number, (place, name, about) in enumerate(found):
        if path:
            show(config_file(Path(f"{name}.yaml"), place))
            continue
        if number == 0 or found[number - 1][0] != place:
            show(f"{chr(10) * bool(number)}{place}")
        show(f"  {name}\n      {about}")


def show_views(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("views.png"),
    num: Annotated[int, typer.Option(help="Number of images.", min=2, max=64)] = 8,
    force: Force = False,
) -> None:
    """Draw what a recipe does to your images: the views, masks, mixtures and switch images of its first step.

    \b
    Example:
      mixmask show-views imagenet_mocov2_mixmask data.root=/data/imagenet --out views.png
    """
    from mixmask.engine.config import load_recipe
    from mixmask.engine.storage import require_output_file
    from mixmask.pretrain.recipe import PretrainRecipe
    from mixmask.pretrain.show_views import draw_views

    require_output_file(out, force)
    show(draw_views(load_recipe(PretrainRecipe, config_file(config, "pretrain"), overrides or ()), out, num))


def check_data(
    root: Root,
    split: Annotated[
        list[str] | None, typer.Option(help="A folder in it; may be given several times. Default: train, val, test.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read headers and ends of files only; decode what looks damaged.")
    ] = False,
    layout: Layout = None,
    labels: Labels = True,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
) -> None:
    """Count classes and images, report sizes, and find unreadable files, before a long run does. Uses all cores.

    \b
    Examples:
      mixmask check-data /data/imagenet
      mixmask check-data photos.zip --no-labels
    """
    from mixmask.engine.errors import DataError, listed
    from mixmask.engine.preflight import check_data, find_splits

    keys = {"layout": layout, "labels": labels, "image_column": image_column, "label_column": label_column}
    reports, problems, remarks = check_data(root, split or find_splits(root, layout, labels), quick, **keys)
    for text in (*(report.describe() for report in reports), *remarks):
        show(text)
    if problems:
        raise DataError(*listed(problems, 20))


def pack(
    source: Annotated[
        Path, typer.Argument(help="What to pack, as check-data takes it; or, without OUT, a folder of .tar files.")
    ],
    out: Annotated[Path | None, typer.Argument(help="A new folder for the shards.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="A split; may be given several times. Default: all that are there.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="A shard is closed at this size: 200MB, 1GB.")] = "1GB",
    layout: Layout = None,
    labels: Labels = True,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at a JPEG's first and last bytes only; by default all are decoded.")
    ] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave damaged images out, and name them.")
    ] = False,
) -> None:
    """Write images into a few large .tar files with an index, which clusters read faster than millions of small files.

    A run on the shards equals a run on the source bit for bit: give OUT as data.root. Without OUT, the index of .tar files
    that are there already is written beside them (WebDataset's .cls files become labels).

    \b
    Examples:
      mixmask pack /data/imagenet /scratch/imagenet-shards
      mixmask pack photos.zip shards --no-labels --shard-size 200MB
      mixmask pack /data/webdataset/train
    """
    from mixmask.engine.data import open_split
    from mixmask.engine.errors import UserError
    from mixmask.engine.packing import check_pack, index_shards, pack, shard_folders
    from mixmask.engine.preflight import find_splits, split_recipe, unlabelled_splits

    source = source.expanduser()
    if out is None:
        for folder in shard_folders(source):
            show(index_shards(folder).describe())
        return
    size = _bytes(shard_size)
    splits = split or find_splits(source, layout, labels)
    without = unlabelled_splits(source, splits) if labels and split is None else []
    keys = {"layout": layout, "labels": labels, "image_column": image_column, "label_column": label_column}
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise UserError(f"{out}: lies in {source}; name a folder outside of what is packed")
    opened = []
    for name in splits:
        if name not in without:
            place = out if name == "." else out / name
            opened.append((open_split(*split_recipe(source, name, **keys)), place))
            check_pack(*opened[-1])  # all of them, before the first is packed
    for images, place in opened:
        packed = pack(images, place, size, quick, skip_unreadable)
        show(packed.describe())
        for problem in packed.left_out:
            show(f"  left out: {problem}")
    for name in without:
        show(f"{source / name}: without labels, not packed (--no-labels packs images without classes)")


def _bytes(size: str) -> int:
    from mixmask.engine.errors import UserError

    found = re.fullmatch(r"(\d{1,15})\s*(KB|MB|GB)?", size.strip().upper())
    if found is None or int(found[1]) == 0:
        raise UserError(f"--shard-size {size}: a number and KB, MB or GB was expected, for example 500MB")
    return int(found[1]) * SIZES[found[2] or ""]
