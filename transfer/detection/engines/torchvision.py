"""Detection on torchvision's operators: training, PreciseBN and evaluation of a detector."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixmask.engine import host_values
from mixmask.engine.batch_statistics import synchronise_batchnorm
from mixmask.engine.distributed import from_first, gather_to_rank0, world
from mixmask.engine.job import Job, Part
from mixmask.engine.precision import autocast
from mixmask.engine.progress import say, track
from mixmask.engine.randomness import derived_seed, generator
from mixmask.engine.schedule import step_factor, warmup_factor
from mixmask.engine.training import train
from mixmask.transfer.detection.data.batches import DetectionBatch, evaluation_batches, training_batches
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.detector import Detections, Targets
from mixmask.transfer.detection.engines.precise_bn import estimate_statistics
from mixmask.transfer.detection.engines.setting import DetectionSetting, Outcome
from mixmask.transfer.detection.network import Detector
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.detection.results.masks import encode_mask
from mixmask.transfer.detection.results.metrics import FoundObject, coco_backend, coco_metrics, voc_metrics

MOST_WAITING = 64  # pictures whose masks are not yet encoded


def run(recipe: DetectRecipe, setting: DetectionSetting) -> Outcome:
    """Fine-tune a detector from a trunk and evaluate it, on all ranks."""
    # The new layers take their initial weights from torch's global generator.
    torch.manual_seed(derived_seed(setting.seed, "detector"))
    detector = recipe.detector.build(setting.backbone, setting.state, len(setting.train_set.classes), recipe.masks)
    detector.arrange(setting.device, setting.precision)
    synchronise_batchnorm(detector, setting.device)
    iterations = recipe.scaled_length(recipe.iterations)
    milestones = [recipe.scaled_length(m) for m in recipe.milestones]
    warmup = recipe.warmup_in_force
    job = Job(
        title=setting.title,
        run=setting.run,
        fingerprint=setting.fingerprint,
        data=setting.data,
        model=detector,
        optimizer=build_optimizer(detector, recipe),
        schedule=lambda step: (
            step_factor(step, milestones, recipe.gamma) * warmup_factor(step, warmup, recipe.warmup_factor)
        ),
        num_steps=iterations,
        images_per_step=recipe.batch_size,
        device=setting.device,
        seed=setting.seed,
        precision=setting.precision,
        log_every=setting.log_every,
        checkpoint_every=setting.checkpoint_every,
        clip_norm=recipe.clip_norm,
    )

    def batches(first: int) -> Iterator[DetectionBatch]:
        return training_batches(setting.train_set, recipe, setting.seed, first, iterations)

    def losses(batch: DetectionBatch, step: int) -> list[Part]:
        def detection() -> dict[str, Tensor]:
            images, targets = to_device(batch, setting.device)
            terms = detector.losses(images, targets, draws_of(recipe, setting.seed, step))
            return {"loss": torch.stack([*terms.values()]).sum(), **{k: v.detach() for k, v in terms.items()}}

        return [detection]

    result = train(job, batches, losses)
    # Running averages lag behind the weights and come from small batches. MoCo's configs use PreciseBN, too.
    if recipe.precise_bn_iterations:
        say(f"{setting.title}: batch statistics over {recipe.precise_bn_iterations} training batches (PreciseBN)")
        last = iterations + recipe.precise_bn_iterations
        more = enumerate(training_batches(setting.train_set, recipe, setting.seed, iterations, last), start=iterations)

        def look(item: tuple[int, DetectionBatch]) -> None:
            images, targets = to_device(item[1], setting.device)
            with autocast(setting.device, setting.precision):
                detector.losses(images, targets, draws_of(recipe, setting.seed, item[0]))

        detector.train()
        estimate_statistics(detector, more, look)
    shares = gather_to_rank0(find_objects(detector, recipe, setting))
    found = sorted((one for share in shares for one in share), key=lambda one: one.picture)
    metrics = from_first(measure(recipe, found, setting.test_set) if world().is_writer else {})
    kept = detector.state_dict() if recipe.save_detector else {}
    state = recipe.detector.to_detectron2({name: tensor.cpu() for name, tensor in kept.items()})
    return Outcome({**metrics, **result}, found, state)


def measure(recipe: DetectRecipe, found: Sequence[FoundObject], pictures: DetectionSet) -> dict[str, float]:
    """COCO's metrics, with masks if there are any, else VOC's; in percent."""
    if not recipe.coco:
        return voc_metrics(found, pictures)
    say(f"COCO metrics by {coco_backend()}")
    return coco_metrics(found, pictures, recipe.measures)


def draws_of(recipe: DetectRecipe, seed: int, step: int) -> list[torch.Generator]:
    """One generator per image of this rank, by step and row in the global batch: the world size changes no draw."""
    share = world().share(recipe.batch_size)
    return [generator(seed, "detection-sampling", step, row) for row in range(share.start, share.stop)]


def to_device(batch: DetectionBatch, device: torch.device) -> tuple[list[Tensor], list[Targets]]:
    """Move a batch to a device; polygons stay on the CPU, where mask targets are rasterised."""
    images = [image.to(device, non_blocking=True) for image in batch.images]
    targets = [
        Targets(
            host_values.to_device(t.boxes, device),
            host_values.to_device(t.labels, device),
            t.polygons,
            None if t.keypoints is None else host_values.to_device(t.keypoints, device),
        )
        for t in batch.targets
    ]
    return images, targets


def build_optimizer(detector: nn.Module, recipe: DetectRecipe) -> torch.optim.SGD:
    """SGD with momentum, without weight decay on normalisation layers (Detectron2's WEIGHT_DECAY_NORM 0)."""
    norms = [p for m in detector.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    of_norms = {id(p) for p in norms}
    rest = [p for p in detector.parameters() if id(p) not in of_norms]
    groups = [{"params": rest, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.scaled_lr, momentum=recipe.momentum)


@torch.no_grad()
def find_objects(detector: Detector, recipe: DetectRecipe, setting: DetectionSetting) -> list[FoundObject]:
    """Detections in this rank's share of the test pictures, in pixels of the original images.

    Masks are drawn and encoded by a thread of its own: the device goes on with the next pictures meanwhile.
    """
    detector.eval()
    batches = evaluation_batches(setting.test_set, recipe)
    total = math.ceil(len(range(world().rank, len(setting.test_set), world().size)) / recipe.test_batch_size)
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[list[FoundObject]]] = deque()
        found: list[FoundObject] = []
        for batch in track(f"{setting.title}: test pictures", batches, total, recipe.test_batch_size):
            with autocast(setting.device, setting.precision):
                every = detector.detect([image.to(setting.device) for image, _, _ in batch])
            for detections, (image, index, (width, height)) in zip(every, batch, strict=True):
                waiting.append(
                    pool.submit(in_original_pixels, on_cpu(detections), index, image.shape[1:], width, height)
                )
            while len(waiting) > MOST_WAITING:
                found += waiting.popleft().result()
        for rest in waiting:
            found += rest.result()
    return found


def on_cpu(detections: Detections) -> Detections:
    """The detections of one image, moved to the CPU."""
    masks = None if detections.masks is None else detections.masks.float().cpu()
    points = None if detections.keypoints is None else detections.keypoints.float().cpu()
    return Detections(detections.boxes.cpu(), detections.scores.cpu(), detections.labels.cpu(), masks, points)


def in_original_pixels(
    detections: Detections, index: int, seen: torch.Size, width: int, height: int
) -> list[FoundObject]:
    """The detections of one image in the pixels of its file; a box that clipping left empty is dropped, as in Detectron2.

    Args:
        detections: On the CPU.
        index: The picture's index in its `DetectionSet`.
        seen: Height and width of the image that the network saw.
        width: The file's width.
        height: The file's height.
    """
    scale = torch.tensor([width / seen[1], height / seen[0]] * 2)
    limits = torch.tensor([width, height, width, height])
    boxes = torch.minimum((detections.boxes * scale).clamp(min=0), limits)
    masks = None if detections.masks is None else detections.masks.numpy()
    points: list[list[list[float]]] | None = None
    if detections.keypoints is not None:
        points = (detections.keypoints * torch.cat([scale[:2], torch.ones(1)])).tolist()
    found = []
    for number, (box, score, label) in enumerate(
        zip(boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    ):
        left, top, right, bottom = box
        if right <= left or bottom <= top:
            continue
        mask = None if masks is None else encode_mask(masks[number], (left, top, right, bottom), height, width)
        own = None if points is None else tuple((x, y, probability) for x, y, probability in points[number])
        found.append(FoundObject(index, label, score, (left, top, right, bottom), mask, own))
    return found
