"""The checks of a pretraining run before it starts: data, sizes, network, memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mixmask.engine import distributed
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe, OpenImages, require_same_classes
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.images import ImageSet
from mixmask.engine.late import torch
from mixmask.engine.loader import BatchPlan, check_crop
from mixmask.engine.precision import require_memory
from mixmask.engine.wording import nearest_multiples
from mixmask.pretrain.monitor import Monitored
from mixmask.pretrain.recipe import PretrainRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework

KEYS = re.compile(rf"\bdata\.({'|'.join(DataRecipe.model_fields)})\b")  # in messages about the monitor's own data


def check_inputs(
    recipe: PretrainRecipe, processes: int, open_images: OpenImages = open_split
) -> tuple[ImageSet, Monitored | None, BatchPlan]:
    """List the data, and check that the recipe's sizes fit the data and the number of processes.

    Args:
        recipe: What to run.
        processes: World size of the run.
        open_images: Lists a split; the default reads the folders.

    Returns:
        The training images, the monitor's images, and the batches.

    Raises:
        UserError: If the data are missing or the sizes do not fit.
    """
    _check_batch(recipe, processes)
    channels = recipe.backbone.in_channels
    train_images = open_images(recipe.data, "train").with_decoding(channels)
    monitored = _monitored(recipe, train_images, open_images)
    batches = BatchPlan(len(train_images), recipe.batch_size, drop_last=True, seed=recipe.seed, parts=recipe.accumulate)
    steps, warmup = recipe.num_steps(batches.steps_per_epoch), recipe.warmup_steps(batches.steps_per_epoch)
    if recipe.epochs and warmup >= steps:
        key = "warmup_epochs" if recipe.warmup_epochs else "schedule.warmup_steps"
        raise ConfigError(
            f"the warm-up of {warmup} steps ({key}) does not leave any of the run's {steps} steps: shorten the warm-up, too "
            f"({key}=0 leaves it out)"
        )
    if recipe.epochs:
        for view in recipe.views:
            check_crop(train_images, recipe.data, view)
    return train_images, monitored, batches


def _monitored(recipe: PretrainRecipe, train: ImageSet, open_images: OpenImages) -> Monitored | None:
    """The monitor's bank and queries: the run's own data, or ``monitor.data``."""
    if recipe.monitor is None:
        return None
    data, own = recipe.monitor.data or recipe.data, recipe.monitor.data is None
    if own and not train.classes:
        raise ConfigError(
            f"monitor: the images of '{data.name}' have no labels, which kNN needs; set monitor=null, or monitor.data to a "
            f"labelled data set"
        )
    channels = recipe.backbone.in_channels
    try:
        bank = train if own else open_images(data, "train").with_decoding(channels)
        queries = open_images(data, "test").with_decoding(channels)
        require_same_classes(bank, queries, data.allow_overlap)
    except DataError as error:
        raise error if own else DataError(*(KEYS.sub(r"monitor.data.\1", line) for line in error.args)) from None
    if bank.targets.ndim == 2:
        raise ConfigError(
            f"monitor: the images of '{data.name}' have several labels each, which kNN cannot be tested on; set "
            f"monitor=null"
        )
    return Monitored(bank, queries, data)


def _check_batch(recipe: PretrainRecipe, processes: int) -> None:
    """Check that the batch divides into processes and accumulation parts and fits the framework."""
    parts = processes * recipe.accumulate
    if recipe.batch_size % parts:
        raise ConfigError(
            f"batch_size {recipe.batch_size} cannot be shared equally by {processes} processes and {recipe.accumulate} "
            f"accumulated parts; {nearest_multiples(recipe.batch_size, parts)}"
        )
    if recipe.epochs and recipe.batch_size // parts < 2:
        raise ConfigError(
            f"batch_size {recipe.batch_size} leaves {recipe.batch_size // parts} image per part; batch normalisation needs 2"
        )
    try:
        if recipe.epochs:
            recipe.framework.check_batch(recipe.batch_size, recipe.accumulate, processes)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_network(recipe: PretrainRecipe, device: torch.device) -> None:
    """Build the network without its weights, so that errors in it are reported before training.

    Raises:
        ConfigError: If it cannot take the images, has no part that is to be exported, or cannot fit into memory.
    """
    with torch.device("meta"), torch.no_grad():
        # In eval mode, because two images are too few for the groups of `SplitBatchNorm2d`.
        model = recipe.framework.build(recipe.backbone).eval()
        for view in recipe.views:
            try:
                model.trunk(torch.empty(2, recipe.backbone.in_channels, view.crop, view.crop))
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(
                    f"backbone.arch {recipe.backbone.arch} cannot take images of {view.crop} pixels: {reason}"
                ) from None
    recipe.exported(model)
    _check_memory(recipe, model, device)
    if recipe.sync_bn:
        plain = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and type(module) not in plain:
                raise ConfigError(
                    f"sync_bn: {recipe.backbone.arch} fuses {type(module).__name__} with its activation, which "
                    f"SyncBatchNorm would drop; leave sync_bn out"
                )


def _check_memory(recipe: PretrainRecipe, model: Framework, device: torch.device) -> None:
    """Check that weights, gradients, momenta, queue and the images of a step fit into memory."""
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    rows = recipe.batch_size // (recipe.accumulate * distributed.world().size)
    images = sum(recipe.backbone.in_channels * view.crop**2 for view in recipe.views) * max(rows, 1)
    # Bytes in fp32. Activations are not counted, so this finds only what can never fit.
    parts = {
        "weights, buffers and queue (backbone.arch; framework.dim, queue_size, projector_width)": 4 * kept,
        "gradients and momenta (the same keys)": 8 * weights,
        "the images of a step (augment.crop, batch_size, accumulate)": 4 * images,
    }
    require_memory(parts, device, recipe.name)
