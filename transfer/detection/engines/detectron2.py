"""Detection with Detectron2: its model, data loader, trainer and evaluators, with our run directory and record.

Importing this module imports Detectron2; `detectron2_config.check_recipe` has checked before that this works.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from mixmask.engine import collectives, distributed
from mixmask.engine.checkpoint import require_same_data
from mixmask.engine.errors import CheckpointError, RunFailure
from mixmask.engine.progress import StepProgress, say, track
from mixmask.engine.randomness import derived_seed
from mixmask.engine.stopping import StopSignals, lost_on_one_of_several, outlive_stop_signals, stopped
from mixmask.engine.storage import disk_problem, require_right_to_write, write_text
from mixmask.transfer.checkpoints.names import COUNTER, to_detectron2
from mixmask.transfer.detection.detector import DetectorRecipe
from mixmask.transfer.detection.engines.detectron2_config import make_config
from mixmask.transfer.detection.engines.setting import DetectionSetting, Outcome
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.detection.results.metrics import FoundObject, voc_metrics

TOTAL = "total_loss"  # what Detectron2 calls the sum of the losses


def run(recipe: DetectRecipe, setting: DetectionSetting, weights: Path) -> Outcome:
    """Fine-tune a detector with Detectron2, resuming from its last checkpoint if there is one, and evaluate it.

    Args:
        recipe: The recipe.
        setting: The run directory, device, trunk and data.
        weights: The trunk as Detectron2's ``.pkl``.

    Raises:
        RunFailure: If a loss is not finite, or a trunk tensor is not in the detector after loading.
        Interrupted: After a stop signal, with a checkpoint written.
    """
    folder = setting.run.scratch
    folder.mkdir(parents=True, exist_ok=True)
    _log_to(folder / "log.txt")
    names = {split: _register(recipe, setting, split) for split in (*recipe.data.train, *recipe.data.test)}
    cfg = make_config(
        recipe,
        setting.backbone,
        len(setting.train_set.classes),
        device=setting.device,
        precision=setting.precision,
        seed=setting.seed,
        weights=weights,
        output=folder,
        train=[names[split] for split in recipe.data.train],
        test=[names[split] for split in recipe.data.test],
        num_workers=recipe.data.num_workers,
        checkpoint_every=setting.checkpoint_every,
    )
    # NumPy, which Detectron2 seeds as well, takes 32 bits.
    seed_all_rng(derived_seed(setting.seed, "detector") % 2**31)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(weights))
    require_landed(model, setting.state, recipe.detector)
    seconds, rate = _train(cfg, model, recipe, setting)
    metrics, found = evaluate(cfg, model, recipe, setting)
    kept = model.state_dict() if recipe.save_detector else {}
    detector = {name: tensor.detach().cpu() for name, tensor in kept.items()}
    metrics |= {"seconds": seconds, "images_per_second": rate}
    return Outcome(metrics, found, detector)


def _log_to(file: Path) -> None:
    """Send Detectron2's log to a file of the run, so that the terminal shows our messages only."""
    warnings.filterwarnings("ignore", module=r"torch\.functional|detectron2\.")  # of its use of torch and numpy
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    for name in ("detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(logging.FileHandler(file) if distributed.world().is_writer else logging.NullHandler())


def _register(recipe: DetectRecipe, setting: DetectionSetting, split: str) -> str:
    """Register a split in Detectron2's catalogue, with its own reader; returns the name there."""
    name = f"mixmask_{recipe.data.name}_{split.replace('/', '_')}"
    root = Path(recipe.data.root).expanduser()
    # Detectron2 refuses to register a name twice, and an earlier run of this process may have had another root.
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if recipe.coco:
        names = setting.train_set.keypoints
        about = {} if names is None else {"keypoint_names": list(names.names), "keypoint_flip_map": names.pairs}
        register_coco_instances(name, about, str(recipe.coco_file(split)), str(root / split))
    else:
        year, _, images = split.partition("/")
        # Its evaluator takes the 11-point AP for the year 2007 only, and that is the protocol's for every split.
        register_pascal_voc(name, str(root / f"VOC{year}"), images, 2007, list(setting.train_set.classes))
    return name


def require_landed(model: nn.Module, state: dict[str, Tensor], detector: DetectorRecipe) -> None:
    """Compare every trunk tensor with the detector's.

    Detectron2 only logs what it did not load, and a partly loaded detector trains to a plausible but wrong AP.

    Raises:
        RunFailure: If tensors are missing or different; the message names them.
    """
    theirs = model.state_dict()
    lost = []
    for name, tensor in state.items():
        if not name.endswith(COUNTER):
            place = detector.place_in_detectron2(to_detectron2(name))
            if place not in theirs or not torch.equal(theirs[place].cpu(), tensor):
                lost.append(place)
    if lost:
        raise RunFailure(f"{len(lost)} trunk tensors did not land in Detectron2's model: {', '.join(lost[:5])}")


# --- training --------------------------------------------------------------------------------------------------------


def _train(cfg: Any, model: nn.Module, recipe: DetectRecipe, setting: DetectionSetting) -> tuple[float, float]:
    """Train; returns the seconds over all sessions of the run, and the images per second of this session."""
    gpu = [setting.device.index] if setting.device.type == "cuda" else None
    # As in Detectron2's trainer: SyncBN keeps the batch statistics of all ranks equal, so nothing need be broadcast.
    parallel = create_ddp_model(model, broadcast_buffers=False, device_ids=gpu)
    optimizer = build_optimizer(cfg, model)
    trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(parallel, (), optimizer)
    trainer.register_hooks([hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))])
    checkpointer = DetectionCheckpointer(parallel, cfg.OUTPUT_DIR, trainer=trainer)
    resumed = distributed.agreed(lambda: _can_resume(checkpointer, setting))
    first, last = 0, cfg.SOLVER.MAX_ITER
    if resumed:
        distributed.agreed(lambda: _resume(checkpointer))
        first = trainer.iter + 1
    # The sampler's state is not in the checkpoint. Seeding by the first iteration gives a resumed run new draws, not
    # those of its start again.
    seed_all_rng(derived_seed(setting.seed, "detectron2", first, distributed.world().rank) % 2**31)
    trainer.data_loader = build_detection_train_loader(cfg)
    # The loader groups pictures by aspect ratio; its ``dataset`` is the DataLoader with the workers.
    _let_workers_outlive(trainer.data_loader.dataset)
    before = 0.0
    if distributed.world().is_writer:
        setting.run.rewind_log(first)
        before = _logged_seconds(setting)
    if resumed:
        say(f"{setting.title}: resuming at step {first} of {last} from {checkpointer.get_checkpoint_file()}")
    with (
        StepProgress(setting.title, last, first, recipe.batch_size) as progress,
        StopSignals() as stop,
    ):
        if first < last:
            statistics = [_PreciseStatistics(cfg, model, setting)] if recipe.precise_bn_iterations else []
            keep = _Checkpoints(setting, checkpointer, stop)
            trainer.register_hooks([_LogHook(setting, progress, before, recipe.detector.losses), *statistics, keep])
            try:
                trainer.train(first, last)
            except FloatingPointError as error:
                kept = f" The checkpoints in {cfg.OUTPUT_DIR} are kept." if checkpointer.has_checkpoint() else ""
                message = f"{setting.title}: {' '.join(str(error).split())}{kept}"
                # Only rank 0 checks the loss: an exception on it alone would leave the other ranks waiting for it.
                if distributed.world().size > 1:
                    print(f"failed: {message}", file=sys.stderr, flush=True)
                    os._exit(1)
                raise RunFailure(message) from None
        return before + progress.seconds, progress.images_per_second


def _can_resume(checkpointer: Any, setting: DetectionSetting) -> bool:
    """Whether there is a checkpoint of this run; the same answer on every rank.

    Raises:
        UserError: If the ranks see different files, or the checkpoint was made with other data.
    """
    found = bool(checkpointer.has_checkpoint())
    distributed.require_same(found, str(setting.run.scratch))
    identity = setting.run.scratch / "data.json"
    if found:
        try:
            begun = json.loads(identity.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{identity}: damaged ({error}); delete {setting.run.scratch} to start over"
            ) from None
        require_same_data(setting.run, begun, setting.data)
    elif distributed.world().is_writer:
        write_text(identity, json.dumps(setting.data))
    return found


def _resume(checkpointer: Any) -> None:
    try:
        checkpointer.resume_or_load("", resume=True)
    except Exception as error:  # torch's reader raises anything at all on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpointer.get_checkpoint_file()}: truncated or no checkpoint ({reason}); delete its folder to start over"
        ) from None


def _logged_seconds(setting: DetectionSetting) -> float:
    lines = setting.run.log_file.read_text().splitlines() if setting.run.log_file.is_file() else []
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def _let_workers_outlive(loader: Any) -> None:
    """Keep the workers of a `DataLoader` alive on stop signals, so that the run can still write its checkpoint."""
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)


def _start_worker(theirs: Callable[[int], None], worker: int) -> None:
    outlive_stop_signals(worker)
    theirs(worker)


class _Hook(HookBase):  # type: ignore[misc]
    """The base of our hooks, which Detectron2's trainer calls after every step."""

    def __init__(self, setting: DetectionSetting) -> None:
        self.setting = setting


class _LogHook(_Hook):
    """Logs mean losses, learning rate and images per second, under the names that both engines use."""

    def __init__(
        self, setting: DetectionSetting, progress: StepProgress, before: float, names: Mapping[str, str]
    ) -> None:
        super().__init__(setting)
        self.names = {TOTAL: "loss", **names}
        self.progress, self.before = progress, before
        self.sums: dict[str, list[float]] = {}

    def after_step(self) -> None:
        values = {name: value for name, (value, _) in self.trainer.storage.latest().items()}
        self.progress.advance(f"loss {values[TOTAL]:.3f}" if TOTAL in values else "")
        for name in self.names.keys() & values.keys():
            self.sums.setdefault(self.names[name], []).append(values[name])
        done = self.trainer.iter + 1
        if distributed.world().is_writer and (done % self.setting.log_every == 0 or done == self.trainer.max_iter):
            means = {name: float(np.mean(self.sums[name])) for name in self.names.values() if name in self.sums}
            rate = round(self.progress.images_per_second, 2)
            line = {"step": done, "of": self.trainer.max_iter, **means, "lr": values["lr"], "images_per_second": rate}
            line["seconds"] = round(self.before + self.progress.seconds, 3)
            with lost_on_one_of_several():
                self.setting.run.log(line)
            self.sums.clear()


class _PreciseStatistics(_Hook):
    """Runs PreciseBN after the last iteration, then broadcasts the buffers of rank 0."""

    def __init__(self, cfg: Any, model: nn.Module, setting: DetectionSetting) -> None:
        super().__init__(setting)
        self.cfg, self.model = cfg, model

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            return
        num = self.cfg.TEST.PRECISE_BN.NUM_ITER
        say(f"{self.setting.title}: batch statistics over {num} training batches (PreciseBN)")
        batches = itertools.islice(build_detection_train_loader(self.cfg), num)
        with EventStorage(), torch.no_grad():
            update_bn_stats(self.model, batches, num)
        collectives.broadcast_buffers(self.model)


class _Checkpoints(_Hook):
    """Saves a checkpoint every ``checkpoint_every`` steps, at the end, and on a stop signal, which ends the run."""

    def __init__(self, setting: DetectionSetting, checkpointer: Any, stop: StopSignals) -> None:
        super().__init__(setting)
        self.checkpointer, self.stop = checkpointer, stop

    def after_step(self) -> None:
        done, last = self.trainer.iter + 1, self.trainer.max_iter
        asked = self.stop.asked() if done < last else None
        if done % self.setting.checkpoint_every == 0 or done == last or asked is not None:
            distributed.on_rank0(self._save)
        if asked is not None:
            raise stopped(self.setting.title, done, last, asked, Path(self.checkpointer.get_checkpoint_file()))

    def _save(self) -> None:
        """Write the new checkpoint, then delete the one before it: at any time, one is whole."""
        old = self.checkpointer.get_checkpoint_file() if self.checkpointer.has_checkpoint() else None
        require_right_to_write(self.setting.run.scratch)
        try:
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        except (OSError, RuntimeError) as error:
            raise RunFailure(
                f"{self.setting.title}: cannot write a checkpoint in {self.setting.run.scratch} "
                f"({disk_problem(error)}). When there is room, the same command resumes the run"
            ) from None
        if old is not None and old != self.checkpointer.get_checkpoint_file():
            Path(old).unlink(missing_ok=True)


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(
    cfg: Any, model: nn.Module, recipe: DetectRecipe, setting: DetectionSetting
) -> tuple[dict[str, float], list[FoundObject]]:
    """Evaluate with Detectron2's evaluators: metrics in percent on every rank, detections on rank 0."""
    (name,) = cfg.DATASETS.TEST
    judge = (
        COCOEvaluator(name, output_dir=None, kpt_oks_sigmas=recipe.detector.sigmas)
        if recipe.coco
        else PascalVOCDetectionEvaluator(name)
    )
    collector = _Collector(recipe, setting)
    loader = build_detection_test_loader(cfg, name, batch_size=recipe.test_batch_size)
    model.eval()
    judge.reset()
    with torch.no_grad():
        for inputs in track(f"{setting.title}: test pictures", loader, len(loader), recipe.test_batch_size):
            outputs = model(inputs)
            collector.process(inputs, outputs)  # first: the judge of keypoints moves them by half a pixel in place
            judge.process(inputs, outputs)
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's evaluation prints its table
        results = judge.evaluate() or {}
    found = sorted((one for share in comm.gather(collector.found) for one in share), key=lambda one: one.picture)
    metrics = flat_metrics(results)
    if not recipe.coco and distributed.world().is_writer:
        metrics = {
            **voc_metrics(found, setting.test_set),
            **metrics,
        }  # for the APs per class, which Detectron2's VOC evaluator does not report
    if not found:  # without detections, Detectron2's AP on COCO is NaN
        metrics = {f"{kind}/{name}": 0.0 for kind in recipe.measures for name in ("AP", "AP50", "AP75")} | metrics
    return distributed.from_first(metrics), found


class _Collector:
    """Collects Detectron2's outputs as `FoundObject`s."""

    def __init__(self, recipe: DetectRecipe, setting: DetectionSetting) -> None:
        # Our keys of VOC pictures begin with the year (``2007/000001``), Detectron2's image ids do not.
        self.before = "" if recipe.coco else recipe.data.test[0].partition("/")[0] + "/"
        self.numbers = {picture.key: number for number, picture in enumerate(setting.test_set.pictures)}
        self.found: list[FoundObject] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        for picture, output in zip(inputs, outputs, strict=True):
            number = self.numbers[f"{self.before}{picture['image_id']}"]
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.tolist()
            masks = instances.pred_masks.numpy() if instances.has("pred_masks") else [None] * len(boxes)
            points = instances.pred_keypoints.tolist() if instances.has("pred_keypoints") else [None] * len(boxes)
            for box, score, label, mask, own in zip(
                boxes, instances.scores.tolist(), instances.pred_classes.tolist(), masks, points, strict=True
            ):
                coded = None if mask is None else coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                self.found.append(FoundObject(number, label, score, tuple(box), coded, own and tuple(map(tuple, own))))


def flat_metrics(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """``{"bbox": {"AP": 1, "AP-cat": 2}}`` to ``{"bbox/AP": 1, "bbox/AP/cat": 2}``; NaN (not measured) is left out."""
    return {
        f"{kind}/{name.replace('AP-', 'AP/', 1)}": float(value)
        for kind, values in results.items()
        for name, value in values.items()
        if np.isfinite(value)
    }
