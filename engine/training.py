"""The training loop: one plain function that pretraining, probing, finetuning and detection share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError, RunDirectoryError, RunFailure
from engine.precision import Precision, autocast
from engine.progress import StepProgress, say
from engine.storage import RunDirectory, write_atomic

B = TypeVar("B")


@dataclass
class Job:
    """What the loop trains, and where it keeps it.

    Attributes:
        title: Shown with the progress.
        run: Where the log and the checkpoint go.
        fingerprint: Identity of the recipe, kept in the checkpoint.
        data: Identity of the data (`ImageSet.summary`), kept in the checkpoint.
        model: Everything that has state besides the optimizer: weights, buffers, queues.
        optimizer: Its groups' ``lr`` at the start are the base rates that the schedule scales.
        schedule: Step to factor of the base rates.
        num_steps: Length of the run.
        images_per_step: For the rate in the log.
        precision: Number format of the forward pass.
        log_every: Steps between two log lines.
        checkpoint_every: Steps between two checkpoints.
        evaluate: Called after every ``evaluate_every`` steps and after the last; its values are logged.
        evaluate_every: Steps between two evaluations; 0 means never.
        clip_norm: Largest gradient norm, or None.
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
    precision: Precision = "fp32"
    log_every: int = 10
    checkpoint_every: int = 1000
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_every: int = 0
    clip_norm: float | None = None
    base_rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]


def train(
    job: Job, batches: Callable[[int], Iterator[B]], losses: Callable[[B, int], dict[str, Tensor]]
) -> dict[str, float]:
    """Run a job from its checkpoint, or from the start, to its last step.

    Args:
        job: What is trained.
        batches: From the first step to do, an iterator over the remaining batches.
        losses: From a batch and its step to named scalars; ``loss`` is the one that is minimised, all are logged.

    Returns:
        ``seconds`` over all processes that worked on the run, the mean ``images_per_second`` of this one, and the last
        values that ``job.evaluate`` gave.

    Raises:
        RunFailure: When the loss is not finite; the last checkpoint stays.
    """
    first, seconds_before = _resume(job)
    started = time.monotonic()
    evaluated: dict[str, float] = {}
    window: dict[str, float] = {}
    in_window = 0
    waited = 0.0
    job.model.train()
    remaining = batches(first)
    with StepProgress(job.title, job.num_steps, first, job.images_per_step) as progress:
        for step in range(first, job.num_steps):
            for group, rate in zip(job.optimizer.param_groups, job.base_rates, strict=True):
                group["lr"] = rate * job.schedule(step)
            before = time.monotonic()
            batch = next(remaining)
            waited += time.monotonic() - before

            with autocast(job.device, job.precision):
                terms = losses(batch, step)
            values = {name: float(value) for name, value in zip(terms, torch.stack([*terms.values()]).tolist())}
            if not math.isfinite(values["loss"]):
                raise RunFailure(_not_finite(job, step, values))
            job.optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()  # type: ignore[no-untyped-call]
            if job.clip_norm is not None:
                nn.utils.clip_grad_norm_(job.model.parameters(), job.clip_norm)
            job.optimizer.step()

            done = step + 1
            progress.advance(f"loss {values['loss']:.3f}")
            in_window += 1
            for name, value in values.items():
                window[name] = window.get(name, 0.0) + value
            due = job.evaluate_every > 0 and (done % job.evaluate_every == 0 or done == job.num_steps)
            if due and job.evaluate is not None:
                evaluated = job.evaluate()
                job.run.log({"step": done, **evaluated})
                say(f"{job.title}: step {done}, " + ", ".join(f"{k} {v:.2f}" for k, v in evaluated.items()))
            if done % job.log_every == 0 or done == job.num_steps:
                elapsed = time.monotonic() - started
                job.run.log(
                    {
                        "step": done,
                        **{name: total / in_window for name, total in window.items()},
                        "lr": job.optimizer.param_groups[0]["lr"],
                        "images_per_second": round(progress.images_per_second, 2),
                        "data_wait_share": round(waited / max(elapsed, 1e-9), 4),
                        "seconds": round(seconds_before + elapsed, 3),
                    }
                )
                window, in_window = {}, 0
            if done % job.checkpoint_every == 0 and done < job.num_steps:
                _save(job, done, seconds_before + time.monotonic() - started)
        rate = progress.images_per_second
    job.model.eval()
    return {"seconds": seconds_before + time.monotonic() - started, "images_per_second": rate, **evaluated}


def _not_finite(job: Job, step: int, values: Mapping[str, float]) -> str:
    terms = ", ".join(f"{name} = {value}" for name, value in values.items())
    rates = ", ".join(f"{group['lr']:.4g}" for group in job.optimizer.param_groups)
    kept = f"The checkpoint {job.run.checkpoint_file} is kept." if job.run.checkpoint_file.exists() else ""
    return (
        f"{job.title}: the loss is not finite at step {step} ({terms}; learning rates {rates}). Likely causes: a learning "
        f"rate too high for this batch size or without warm-up, or precision bf16 with very large activations. {kept}"
    ).strip()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _save(job: Job, step: int, seconds: float) -> None:
    state = {
        "fingerprint": job.fingerprint,
        "data": dict(job.data),
        "step": step,
        "seconds": seconds,
        "model": job.model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
    }
    write_atomic(job.run.checkpoint_file, lambda file: torch.save(state, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint written by the loop.

    Raises:
        CheckpointError: If it is truncated or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises anything at all on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({reason}); delete it to start over") from None
    if not isinstance(state, dict) or not {"fingerprint", "step", "model", "optimizer"} <= state.keys():
        raise CheckpointError(f"{path}: not a training checkpoint of this project; delete it to start over")
    return state


def _resume(job: Job) -> tuple[int, float]:
    if not job.run.checkpoint_file.is_file():
        job.run.rewind_log(0)
        return 0, 0.0
    state = read_checkpoint(job.run.checkpoint_file)
    if state["fingerprint"] != job.fingerprint:
        raise RunDirectoryError(
            f"{job.run.checkpoint_file}: written by the run {state['fingerprint']}, this one is {job.fingerprint}"
        )
    require_same_data(job.run, state["data"], job.data)
    job.model.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    job.run.rewind_log(state["step"])
    say(f"{job.title}: resuming at step {state['step']} of {job.num_steps} from {job.run.checkpoint_file}")
    return int(state["step"]), float(state["seconds"])


def require_same_data(run: RunDirectory, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with (or to reuse) a run that was made from other images under the same data set name.

    Raises:
        RunDirectoryError: With what differs.
    """
    differing = [f"{key}: {found.get(key)} -> {given.get(key)}" for key in given if found.get(key) != given.get(key)]
    if differing:
        raise RunDirectoryError(
            f"{run.path}: was made from other data under the same data.name ({'; '.join(differing)}). "
            f"Give the other data another data.name"
        )
