"""What the training loop trains: models, optimizer, length, and where the run is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mixmask.engine.late import torch
from mixmask.engine.precision import Precision
from mixmask.engine.storage import RunDirectory
from mixmask.engine.watching import Sink

if TYPE_CHECKING:
    from torch import nn

Values = dict[str, "torch.Tensor"]  # scalars of a step by name
Part = Callable[[], Values]
Backward = Callable[[Sequence[Part]], Values]  # runs the forward and backward passes of parts, in their order


@dataclass
class Job:
    """What the loop trains, and where it keeps it.

    Attributes:
        title: Shown with the progress.
        run: Where the log and the checkpoint go.
        fingerprint: Identity of the recipe, kept in the checkpoint.
        data: Identity of the data (`ImageSet.summary`), kept in the checkpoint.
        model: Everything that has state besides the optimizer: weights, buffers, queues.
        optimizer: The initial ``lr`` of each parameter group is its base rate, which the schedule scales; a group with
            ``fixed_lr: True`` keeps its rate.
        schedule: Maps a step to the factor of the base rates.
        num_steps: Length of the run.
        weight_decay: Maps a step to the weight decay of the groups with ``decays: True``; None keeps every group's own.
        images_per_step: Global batch size, for the throughput in the log.
        device: Where the model and the batches are.
        seed: torch's global generator is re-seeded from it at every step, for dropout and the like.
        precision: Number format of the forward pass.
        log_every: Steps between two log lines.
        checkpoint_every: Steps between two checkpoints.
        evaluate: Called after every ``evaluate_every`` steps and after the last, by every process; its values are logged.
        evaluate_every: Steps between two evaluations; 0 means never.
        clip_norm: Largest gradient norm, or None.
        before_step: Called before each optimizer step, when the gradients are there.
        after_step: Called with the step number after each optimizer step; updates momentum encoders and queues.
        elastic: Given a world size, whether the run computes with it what it does with one process, so that it may resume
            with another one. Batch statistics of each process's own images depend on the world size.
        watch: Given a log line and its step, returns a warning or None.
        open_sinks: Given the first step, opens the destinations of the log besides ``log.jsonl``.
    """

    title: str
    run: RunDirectory
    fingerprint: str
    data: Mapping[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    num_steps: int
    images_per_step: int
    device: torch.device
    seed: int
    weight_decay: Callable[[int], float] | None = None
    precision: Precision = "fp32"
    log_every: int = 10
    checkpoint_every: int = 1000
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_every: int = 0
    clip_norm: float | None = None
    before_step: Callable[[], None] | None = None
    after_step: Callable[[int], None] | None = None
    elastic: Callable[[int], bool] = lambda size: False
    watch: Callable[[Mapping[str, float], int], str | None] | None = None
    open_sinks: Callable[[int], Sequence[Sink]] = lambda first: ()
    base_rates: list[float] = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
