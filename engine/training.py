"""The training loop: one plain function that pretraining, probing, finetuning and detection share."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine import distributed
from engine.errors import CheckpointError, Interrupted, RunDirectoryError, RunFailure
from engine.loader import STOP_SIGNALS
from engine.precision import Precision, autocast
from engine.progress import StepProgress, say
from engine.randomness import derived_seed
from engine.storage import RunDirectory, write_atomic
from engine.watching import Sink

B = TypeVar("B")
Part = Callable[[], dict[str, Tensor]]


@dataclass
class Job:
    """What the loop trains, and where it keeps it.

    Attributes:
        title: Shown with the progress.
        run: Where the log and the checkpoint go.
        fingerprint: Identity of the recipe, kept in the checkpoint.
        data: Identity of the data (`ImageSet.summary`), kept in the checkpoint.
        model: Everything that has state besides the optimizer: weights, buffers, queues.
        optimizer: Its groups' ``lr`` at the start are the base rates that the schedule scales; a group with
            ``fixed_lr: True`` keeps its rate.
        schedule: Step to factor of the base rates.
        num_steps: Length of the run.
        images_per_step: For the rate in the log; over all processes.
        seed: From it, the seed of torch's global generator at every step (dropout and the like).
        precision: Number format of the forward pass.
        log_every: Steps between two log lines.
        checkpoint_every: Steps between two checkpoints.
        evaluate: Called after every ``evaluate_every`` steps and after the last, by every process; its values are logged.
        evaluate_every: Steps between two evaluations; 0 means never.
        clip_norm: Largest gradient norm, or None.
        after_step: Called with the step after the optimizer's step: momentum encoders and queues move here.
        not_shared: Suffixes of buffers that the processes keep equal themselves.
        watch: From a log line and its step to a warning, or None.
        open_sinks: From the first step to places that the log goes to besides ``log.jsonl``.
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
    precision: Precision = "fp32"
    log_every: int = 10
    checkpoint_every: int = 1000
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_every: int = 0
    clip_norm: float | None = None
    after_step: Callable[[int], None] | None = None
    not_shared: tuple[str, ...] = ()
    watch: Callable[[Mapping[str, float], int], str | None] | None = None
    open_sinks: Callable[[int], Sequence[Sink]] = lambda first: ()
    base_rates: list[float] = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


class _Losses(nn.Module):
    """A part of the loss as one forward pass, which is what gradients are averaged over processes for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Part) -> dict[str, Tensor]:
        return part()


def train(
    job: Job, batches: Callable[[int], Iterator[B]], losses: Callable[[B, int], Sequence[Part]]
) -> dict[str, float]:
    """Run a job from its checkpoint, or from the start, to its last step.

    Args:
        job: What is trained.
        batches: From the first step to do, an iterator over the remaining batches.
        losses: From a batch and its step to the parts of the step's loss. Each part gives named scalars: ``loss`` is the one
            that is minimised, all are logged. The gradient of a part is computed before the next one is called, and the
            gradients and the scalars of the parts are added.

    Returns:
        ``seconds`` over all processes that worked on the run one after another, the mean ``images_per_second`` of this
        one, and the last values that ``job.evaluate`` gave.

    Raises:
        RunFailure: When the loss is not finite, or a checkpoint cannot be written; the last good checkpoint stays.
        Interrupted: After SIGTERM or SIGUSR2, when the step has been finished and a checkpoint written.
    """
    start = distributed.agreed(lambda: _resume(job))
    first = start.step
    compute = distributed.parallel(_Losses(job.model), job.device, job.not_shared)
    sinks = distributed.agreed(lambda: job.open_sinks(first) if distributed.world().is_writer else ())
    started = time.monotonic()
    evaluated: dict[str, float] = {}
    window = _Window(job, start.window)
    waited, warned = 0.0, False
    job.model.train()
    remaining = batches(first)

    def elapsed() -> float:
        return start.seconds + time.monotonic() - started

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(StepProgress(job.title, job.num_steps, first, job.images_per_step))
        stop = stack.enter_context(_StopSignals())
        for sink in sinks:
            stack.callback(sink.close)

        def evaluate(done: int) -> dict[str, float]:
            assert job.evaluate is not None
            window.settle()
            distributed.share_buffers(job.model, job.not_shared)
            with progress.paused():
                try:
                    with stop.at_once():
                        values = job.evaluate()
                except _StopNow:
                    _save(job, done, elapsed(), window.sums, to_evaluate=True)
                    raise _interrupted(job, done, signal.Signals(stop.received[0])) from None
            _log(job, sinks, done, values)
            say(f"{job.title}: step {done}, " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
            return values

        if start.to_evaluate:
            evaluated = evaluate(first)
        for step in range(first, job.num_steps):
            for group, rate in zip(job.optimizer.param_groups, job.base_rates, strict=True):
                group["lr"] = rate if group.get("fixed_lr") else rate * job.schedule(step)
            before = time.monotonic()
            batch = next(remaining)
            waited += time.monotonic() - before
            torch.manual_seed(derived_seed(job.seed, "step", step, distributed.world().rank))

            window.add(step, _backward(job, compute, losses(batch, step)))
            if job.clip_norm is not None:
                job.scaler.unscale_(job.optimizer)
                nn.utils.clip_grad_norm_(job.model.parameters(), job.clip_norm)
            job.scaler.step(job.optimizer)
            job.scaler.update()
            if job.after_step is not None:
                job.after_step(step)

            done = step + 1
            progress.advance(window.status)
            if done % job.log_every == 0 or done == job.num_steps:
                line = {
                    **window.means(),
                    "lr": job.optimizer.param_groups[0]["lr"],
                    "images_per_second": round(progress.images_per_second, 2),
                    "data_wait_share": round(waited / max(progress.seconds, 1e-9), 4),
                    "seconds": round(elapsed(), 3),
                }
                _log(job, sinks, done, line)
                warning = job.watch(line, done) if job.watch is not None else None
                if warning is not None and not warned:  # said again only if it had stopped
                    say(f"{job.title}: step {done}: warning: {warning}")
                warned = warning is not None
            due = job.evaluate_every and (done % job.evaluate_every == 0 or done == job.num_steps)
            if due and job.evaluate is not None:
                evaluated = evaluate(done)
            stopped_by = stop.asked() if done < job.num_steps else None
            if stopped_by is not None or (done % job.checkpoint_every == 0 and done < job.num_steps):
                window.settle()
                _save(job, done, elapsed(), window.sums)
            if stopped_by is not None:
                raise _interrupted(job, done, stopped_by)
        rate = progress.images_per_second
    distributed.share_buffers(job.model, job.not_shared)
    _require_finite(job, job.num_steps)
    job.model.eval()
    return {"seconds": elapsed(), "images_per_second": rate, **evaluated}


def _backward(job: Job, compute: nn.Module, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Forward and backward over the parts of a step; of several processes, the last part's backward averages gradients."""
    job.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        local = compute.no_sync() if isinstance(compute, nn.parallel.DistributedDataParallel) and not last else None
        with local or contextlib.nullcontext():
            with autocast(job.device, job.precision):
                terms = compute(part)
            job.scaler.scale(terms["loss"]).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
    return sums


class _Window:
    """The means of the terms since the last log line, and the check that the loss is finite.

    On a GPU a step's values are read while the next step already runs: asking for them at once would make the device wait
    for the host at every step. `settle` reads what is still on its way.
    """

    def __init__(self, job: Job, sums: Mapping[str, tuple[float, int]]) -> None:
        self.job = job
        self.sums = dict(sums)  # of an interrupted window, so that a resumed run logs the same means
        self.status = ""
        self.pending: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        values = distributed.mean(torch.stack([*terms.values()]))
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.pending.append((step, [*terms], values, event))
        while len(self.pending) > (0 if event is None else 1):
            self._take()

    def settle(self) -> None:
        while self.pending:
            self._take()

    def means(self) -> dict[str, float]:
        self.settle()
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def _take(self) -> None:
        step, names, tensor, event = self.pending.pop(0)
        if event is not None:
            event.synchronize()
        values = dict(zip(names, tensor.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise RunFailure(_not_finite(self.job, step, values))
        self.status = f"loss {values['loss']:.3f}"
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)


def _not_finite(job: Job, step: int, values: Mapping[str, float]) -> str:
    terms = ", ".join(f"{name} = {value}" for name, value in values.items())
    rates = ", ".join(f"{group['lr']:.4g}" for group in job.optimizer.param_groups)
    kept = f"The checkpoint {job.run.checkpoint_file} is kept." if job.run.checkpoint_file.exists() else ""
    return (
        f"{job.title}: the loss is not finite at step {step} ({terms}; learning rates {rates}). Likely causes: a learning "
        f"rate too high for this batch size or without warm-up, gradients that need clip_norm, or precision "
        f"{job.precision} with very large activations. {kept}"
    ).strip()


def _log(job: Job, sinks: Sequence[Sink], step: int, values: Mapping[str, float]) -> None:
    if distributed.world().is_writer:
        job.run.log({"step": step, **values})
        for sink in sinks:
            sink.log(step, values)


def _interrupted(job: Job, step: int, number: signal.Signals) -> Interrupted:
    return Interrupted(
        f"{job.title}: stopped at step {step} of {job.num_steps} by {number.name}; "
        f"the same command goes on from {job.run.checkpoint_file}",
        number,
    )


class _StopNow(BaseException):
    """Raised inside an evaluation by a stop signal."""


class _StopSignals:
    """Turns the signals that ask a process to stop into a question that the loop asks after every step.

    With several processes all get the same answer, whichever of them was signalled.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.previous: dict[int, Any] = {}
        self.urgent = False

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.urgent:
            raise _StopNow

    def asked(self) -> signal.Signals | None:
        """The signal that asked for a stop, or None. Every process must ask."""
        if distributed.any_of(bool(self.received)):
            return signal.Signals(self.received[0] if self.received else signal.SIGTERM)
        return None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Do not wait for the end of what runs in here, which changes no state; one process alone can do that."""
        if self.received and distributed.world().size == 1:
            raise _StopNow
        self.urgent = distributed.world().size == 1
        try:
            yield
        finally:
            self.urgent = False


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """Where a run goes on: its step, the seconds behind it, the log window it was in, and whether it was evaluating."""

    step: int = 0
    seconds: float = 0.0
    window: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    to_evaluate: bool = False


def _save(
    job: Job, step: int, seconds: float, sums: Mapping[str, tuple[float, int]], to_evaluate: bool = False
) -> None:
    distributed.share_buffers(job.model, job.not_shared)
    distributed.first_only(lambda: _write(job, _Start(step, seconds, sums, to_evaluate)))


def _require_finite(job: Job, step: int) -> None:
    broken = [name for name, value in job.model.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        kept = " The checkpoint before it is kept." if job.run.checkpoint_file.exists() else ""
        raise RunFailure(
            f"{job.title}: weights that are not finite after step {step - 1} ({', '.join(broken[:3])}); they were not "
            f"written.{kept} Likely causes: a learning rate too high, or gradients that need clip_norm"
        )


def _write(job: Job, reached: _Start) -> None:
    step = reached.step
    _require_finite(job, step)
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
    except (OSError, RuntimeError) as error:  # torch's writer wraps the system's error in its own
        cause = error if isinstance(error, OSError) else error.__context__ or error
        kept = "The checkpoint before it is untouched; " if job.run.checkpoint_file.exists() else ""
        raise RunFailure(
            f"{job.title}: cannot write {job.run.checkpoint_file} at step {step} ({str(cause).splitlines()[0]}). {kept}"
            f"when there is room, the same command goes on"
        ) from None


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


def _resume(job: Job) -> _Start:
    distributed.require_same(job.run.checkpoint_file.is_file(), f"{job.run.checkpoint_file}")
    if not job.run.checkpoint_file.is_file():
        if distributed.world().is_writer:
            job.run.rewind_log(0)
        return _Start()
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
    if state["world_size"] != size:
        say(
            f"{job.title}: warning: this run was begun with {state['world_size']} processes and goes on with {size}. Masks, "
            f"partners in mixtures and (other than MoCo's groups) batch statistics are each process's own, so it is not the "
            f"run that either number alone would give"
        )
    say(f"{job.title}: resuming at step {state['step']} of {job.num_steps} from {job.run.checkpoint_file}")
    return _Start(int(state["step"]), float(state["seconds"]), state["window"], state["to_evaluate"])


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
