"""The checkpoint of an unfinished run: everything it needs to resume as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask.engine import distributed
from mixmask.engine.errors import CheckpointError, RunDirectoryError, RunFailure
from mixmask.engine.job import Job
from mixmask.engine.late import torch
from mixmask.engine.progress import say
from mixmask.engine.storage import RunDirectory, disk_problem, write_atomic


@dataclass(frozen=True)
class Start:
    """The point from which a run continues.

    Attributes:
        step: Number of finished steps.
        seconds: Time spent on the run so far.
        window: Sum and count of each scalar since the last log line.
        to_evaluate: Whether the evaluation after ``step`` is still to be done.
    """

    step: int = 0
    seconds: float = 0.0
    window: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    to_evaluate: bool = False


def save(job: Job, reached: Start) -> None:
    """Write the checkpoint atomically. Every rank must call it; rank 0 writes.

    Raises:
        RunFailure: If a weight is not finite or the file cannot be written; the previous checkpoint is kept.
    """
    distributed.on_rank0(lambda: _write(job, reached))


def require_finite(job: Job, step: int) -> None:
    """Refuse weights that are not finite after ``step`` steps.

    Raises:
        RunFailure: If there are any; names the first three parameters.
    """
    broken = [name for name, value in job.model.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        kept = " The checkpoint before it is kept." if job.run.checkpoint_file.exists() else ""
        raise RunFailure(
            f"{job.title}: weights that are not finite after step {step - 1} ({', '.join(broken[:3])}); they were not "
            f"written.{kept} Likely causes: a learning rate too high, or gradients that need clip_norm"
        )


def _write(job: Job, reached: Start) -> None:
    step = reached.step
    require_finite(job, step)
    state = {
        "fingerprint": job.fingerprint,
        "data": dict(job.data),
        "step": step,
        "seconds": reached.seconds,
        "window": dict(reached.window),
        "to_evaluate": reached.to_evaluate,
        "world_size": distributed.world().size,
        "model": job.model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "scaler": job.scaler.state_dict(),
    }
    try:
        write_atomic(job.run.checkpoint_file, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        kept = "The checkpoint before it is untouched; " if job.run.checkpoint_file.exists() else ""
        raise RunFailure(
            f"{job.title}: cannot write {job.run.checkpoint_file} at step {step} ({disk_problem(error)}). {kept}"
            f"when there is room, the same command resumes the run"
        ) from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint written by the loop.

    Raises:
        CheckpointError: If it is truncated or not a training checkpoint.
    """
    try:
        # weights_only, because unpickling can run code. To the CPU, or every rank would put a copy on rank 0's GPU.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch's reader raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({reason}); delete it to start over") from None
    if not isinstance(state, dict) or not {"fingerprint", "step", "model", "optimizer"} <= state.keys():
        raise CheckpointError(f"{path}: not a training checkpoint of this project; delete it to start over")
    return state


def resume(job: Job) -> Start:
    """Restore a job from its checkpoint, or start at step 0 if there is none. Every rank must call it.

    Raises:
        UserError: If the checkpoint is damaged, belongs to another run or other data, or is not seen by every process.
    """
    distributed.require_same(job.run.checkpoint_file.is_file(), f"{job.run.checkpoint_file}")
    if not job.run.checkpoint_file.is_file():
        if distributed.world().is_writer:
            job.run.rewind_log(0)
        return Start()
    state = read_checkpoint(job.run.checkpoint_file)
    if state["fingerprint"] != job.fingerprint:
        raise RunDirectoryError(
            f"{job.run.checkpoint_file}: written by the run {state['fingerprint']}, this one is {job.fingerprint}"
        )
    require_same_data(job.run, state["data"], job.data)
    job.model.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    job.scaler.load_state_dict(state["scaler"])
    if distributed.world().is_writer:
        job.run.rewind_log(state["step"])
    size = distributed.world().size
    if state["world_size"] != size and not (job.elastic(size) and job.elastic(state["world_size"])):
        say(
            f"{job.title}: warning: this run was started with world size {state['world_size']} and resumes with {size}. "
            f"Batch statistics are of each process's own images, so the result is not the one that either number alone "
            f"would give"
        )
    say(f"{job.title}: resuming at step {state['step']} of {job.num_steps} from {job.run.checkpoint_file}")
    return Start(int(state["step"]), float(state["seconds"]), state["window"], state["to_evaluate"])


def require_same_data(run: RunDirectory, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to resume or reuse a run that was made from other images under the same data set name.

    Raises:
        RunDirectoryError: If the data differ; lists how.
    """
    differing = [f"{key}: {found.get(key)} -> {given.get(key)}" for key in given if found.get(key) != given.get(key)]
    if differing:
        raise RunDirectoryError(
            f"{run.path}: was made from other data under the same data.name ({'; '.join(differing)}). "
            f"Give the other data another data.name"
        )
