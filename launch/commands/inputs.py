"""The commands that inspect the inputs of a run: configs, show-views, check-data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mixmask.engine.builtin_configs import config_file, listed_configs
from mixmask.launch.commands.options import Config, Force, Overrides
from mixmask.launch.commands.terminal import show


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
    root: Annotated[Path, typer.Argument(help="A data set's folder, or a CIFAR archive.")],
    split: Annotated[
        list[str] | None, typer.Option(help="A folder in it; may be given several times. Default: train, val, test.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read headers and ends of files only; decode what looks damaged.")
    ] = False,
    layout: Annotated[
        str | None,
        typer.Option(help="The kind of data, as data.layout in configs. Default: what recognises the folder."),
    ] = None,
) -> None:
    """Count classes and images, report sizes, and find unreadable files, before a long run does. Uses all cores.

    \b
    Example:
      mixmask check-data /data/imagenet
    """
    from mixmask.engine.errors import DataError, listed
    from mixmask.engine.preflight import check_data, find_splits

    reports, problems, remarks = check_data(root, split or find_splits(root, layout), quick, layout)
    for text in (*(report.describe() for report in reports), *remarks):
        show(text)
    if problems:
        raise DataError(*listed(problems, 20))
