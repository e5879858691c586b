"""Translate a detection recipe to a Detectron2 config, and refuse what that engine cannot do."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mixmask.engine.backbones import RESNETS, BackboneRecipe
from mixmask.engine.errors import ConfigError
from mixmask.engine.precision import Precision
from mixmask.engine.storage import write_text
from mixmask.engine.texts import read_text
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.network import PIXEL_MEAN, PIXEL_STD
from mixmask.transfer.detection.recipe import DetectRecipe

INSTALL = 'pip install --no-build-isolation "git+https://github.com/facebookresearch/detectron2" "setuptools<81"'
# VOC 2012 with the 11-point AP, under a name that the user registers (see `dump_config`).
AS_2007 = "voc_2012_{}_ap07"
BUILT_IN = {  # Detectron2's own names of the usual splits, which it looks for in $DETECTRON2_DATASETS
    "2007/trainval": "voc_2007_trainval",
    "2007/train": "voc_2007_train",
    "2007/val": "voc_2007_val",
    "2007/test": "voc_2007_test",
    "2012/trainval": "voc_2012_trainval",
    "2012/train": "voc_2012_train",
    "2012/val": "voc_2012_val",
    "train2017": "coco_2017_train",
    "val2017": "coco_2017_val",
}


def built_in(recipe: DetectRecipe, split: str) -> str:
    """Detectron2's name of a usual split."""
    return f"keypoints_{BUILT_IN[split]}" if recipe.detector.sigmas else BUILT_IN[split]


def require_detectron2() -> None:
    """Check that Detectron2 can be imported.

    Raises:
        ConfigError: If not; the message says how to install it, and what runs without it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own use of torch
            import detectron2.engine  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"engine: detectron2 does not import here ({error}). Install it with",
            f"  {INSTALL}",
            "or put its source tree on PYTHONPATH; engine=torchvision runs the same network and procedure without it",
        ) from None


def check_recipe(recipe: DetectRecipe, backbone: BackboneRecipe, device: torch.device, precision: Precision) -> None:
    """Refuse a recipe that Detectron2 cannot run.

    Raises:
        ConfigError: The message names the key and an alternative.
    """
    require_detectron2()
    if backbone.arch not in RESNETS:
        raise ConfigError(f"engine: detectron2 has ResNets only, this trunk is {backbone.arch}; use engine=torchvision")
    if precision == "bf16" or (precision == "fp16" and device.type == "cpu"):
        raise ConfigError(
            f"precision: Detectron2 has fp32, and fp16 on a GPU; {precision} on this device needs engine=torchvision"
        )
    if recipe.clip_norm is not None:
        raise ConfigError(
            "clip_norm: Detectron2 clips each parameter by itself; leave it null or use engine=torchvision"
        )
    if len(recipe.data.test) > 1:
        raise ConfigError(
            f"data.test: Detectron2 evaluates each of {', '.join(recipe.data.test)} by itself: name one; engine=torchvision "
            f"takes them as one test set"
        )


def check_annotations(recipe: DetectRecipe, classes: Sequence[str]) -> None:
    """Read all annotations with Detectron2 before training: its readers are stricter than ours.

    Raises:
        ConfigError: If it cannot read a split; the message names it.
    """
    root = Path(recipe.data.root).expanduser()
    for split in (*recipe.data.train, *recipe.data.test):
        try:
            if recipe.coco:
                _load_coco(recipe.coco_file(split), root / split)
            else:
                _load_voc(root, split, classes, split in recipe.data.test)
        except (AttributeError, AssertionError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{root}, {split}: Detectron2 cannot read it ({reason}); engine=torchvision can"
            ) from None


def _load_coco(file: Path, images: Path) -> None:
    from detectron2.data.datasets import load_coco_json

    with contextlib.redirect_stdout(io.StringIO()):
        load_coco_json(str(file), str(images))


def _load_voc(root: Path, split: str, classes: Sequence[str], evaluated: bool) -> None:
    from detectron2.data.datasets.pascal_voc import load_voc_instances
    from detectron2.evaluation.pascal_voc_evaluation import parse_rec

    year, _, images = split.partition("/")
    folder = root / f"VOC{year}"
    load_voc_instances(str(folder), images, list(classes))
    if evaluated:  # the evaluator takes a whole line as the name, and needs every field
        for line in read_text(folder / "ImageSets" / "Main" / f"{images}.txt").splitlines():
            file = folder / "Annotations" / f"{line.strip()}.xml"
            try:
                parse_rec(str(file))
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}: {error}; it wants whole numbers, and <pose>, <truncated> and <difficult> of every object"
                ) from None


def make_config(
    recipe: DetectRecipe,
    backbone: BackboneRecipe,
    num_classes: int,
    *,
    device: torch.device,
    precision: Precision,
    seed: int,
    weights: Path,
    output: Path,
    train: Sequence[str],
    test: Sequence[str],
    num_workers: int,
    checkpoint_every: int,
) -> Any:
    """The recipe as a Detectron2 ``CfgNode``; modules of ours that it names are registered.

    Args:
        recipe: The detection recipe, whose rate and lengths are scaled to its batch size.
        backbone: A ResNet.
        num_classes: Foreground classes.
        device: Where it runs; a CPU gets plain BatchNorm, because it has no SyncBN.
        precision: ``fp32`` or ``fp16``.
        seed: Detectron2's ``SEED``.
        weights: The trunk as Detectron2's ``.pkl``.
        output: Detectron2's output folder.
        train: Names of the training sets in its catalogue.
        test: Names of the test sets.
        num_workers: Data loader workers per rank.
        checkpoint_every: Iterations between two checkpoints.
    """
    from detectron2.config import get_cfg

    cfg = get_cfg()
    model, solver = cfg.MODEL, cfg.SOLVER
    model.DEVICE, model.WEIGHTS, model.MASK_ON = device.type, str(weights), recipe.masks
    model.PIXEL_MEAN, model.PIXEL_STD = list(PIXEL_MEAN), list(PIXEL_STD)
    # MoCo fine-tunes all layers; Detectron2's default freezes the first two stages.
    model.BACKBONE.FREEZE_AT = 0
    model.RESNETS.DEPTH = int(backbone.arch.removeprefix("resnet"))
    model.RESNETS.RES2_OUT_CHANNELS = 64 if model.RESNETS.DEPTH < 50 else 256
    model.RESNETS.NORM = "SyncBN" if device.type == "cuda" else "BN"
    # torchvision's bottlenecks have the stride in the 3×3 convolution; Detectron2's default is Caffe's, in the 1×1.
    model.RESNETS.STRIDE_IN_1X1 = False
    recipe.detector.configure(cfg, backbone, num_classes)
    # As in pretraining; Detectron2's default is BGR.
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = recipe.min_size_train, recipe.max_size_train
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = recipe.min_size_test, recipe.max_size_test
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    solver.IMS_PER_BATCH, solver.BASE_LR = recipe.batch_size, recipe.scaled_lr
    solver.MOMENTUM, solver.WEIGHT_DECAY, solver.GAMMA = recipe.momentum, recipe.weight_decay, recipe.gamma
    solver.MAX_ITER = recipe.scaled_length(recipe.iterations)
    solver.STEPS = tuple(recipe.scaled_length(m) for m in recipe.milestones)
    solver.WARMUP_ITERS = recipe.warmup_in_force
    solver.WARMUP_FACTOR = recipe.warmup_factor
    solver.CHECKPOINT_PERIOD = checkpoint_every
    solver.AMP.ENABLED = precision == "fp16"
    cfg.TEST.PRECISE_BN.ENABLED = recipe.precise_bn_iterations > 0
    cfg.TEST.PRECISE_BN.NUM_ITER = max(recipe.precise_bn_iterations, 1)
    cfg.SEED, cfg.OUTPUT_DIR = seed, str(output)
    if recipe.detector.detectron2_module is not None:
        importlib.import_module(recipe.detector.detectron2_module)
    return cfg


def dump_config(
    recipe: DetectRecipe,
    backbone: BackboneRecipe,
    pictures: DetectionSet,
    precision: Precision,
    seed: int,
    weights: Path,
    file: Path,
) -> None:
    """Write the recipe as YAML for Detectron2's own tools: for GPUs, and with Detectron2's names of the data sets.

    Raises:
        ConfigError: If Detectron2 cannot be imported, cannot run the recipe, or does not know its data.
    """
    device = torch.device("cuda")
    check_recipe(recipe, backbone, device, precision)
    unknown = [split for split in (*recipe.data.train, *recipe.data.test) if split not in BUILT_IN]
    if unknown:
        raise ConfigError(
            f"data: Detectron2 has no name of its own for {', '.join(unknown)}; it knows {', '.join(BUILT_IN)}"
        )
    own = [split for split in recipe.data.test if split.startswith("2012")]
    registered = "".join(
        f'#   register_pascal_voc("{AS_2007.format(split[5:])}", "datasets/VOC2012", "{split[5:]}", 2007)\n'
        for split in own
    )
    usual = (1 if recipe.detector.sigmas else 80) if recipe.coco else 20
    if len(pictures.classes) != usual:
        raise ConfigError(
            f"data: holds {len(pictures.classes)} classes, the sets that Detectron2 knows under these names have {usual}"
        )
    cfg = make_config(
        recipe,
        backbone,
        len(pictures.classes),
        device=device,
        precision=precision,
        seed=seed,
        weights=weights,
        output=Path("output"),
        train=[built_in(recipe, split) for split in recipe.data.train],
        test=[AS_2007.format(split[5:]) if split in own else built_in(recipe, split) for split in recipe.data.test],
        num_workers=recipe.data.num_workers,
        checkpoint_every=5000,
    )
    module = recipe.detector.detectron2_module
    head = f"# {recipe.protocol}{recipe.detector.suffix} as a Detectron2 config. The trunk is {weights}.\n"
    if module is not None:
        head += f"# Its heads are not Detectron2's own: `import {module}` in your program registers them.\n"
    if own:
        head += (
            "# Under its own name, Detectron2 measures VOC 2012 with the area under the whole curve; this recipe, as all\n"
            "# of VOC here, with the 11 points of 2007. DATASETS.TEST is the 2012 list measured so. Register it first:\n"
            f"#   from detectron2.data.datasets import register_pascal_voc\n{registered}"
        )
    write_text(file, head + cfg.dump())
