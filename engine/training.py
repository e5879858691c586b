"""The training loop: one plain function that pretraining, probing, finetuning and detection share."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mixmask.engine import collectives, distributed
from mixmask.engine.batch_statistics import average_statistics
from mixmask.engine.checkpoint import Start, require_finite, resume, save
from mixmask.engine.errors import Interrupted, RunFailure
from mixmask.engine.job import Backward, Job, Part, Values
from mixmask.engine.late import torch
from mixmask.engine.precision import autocast
from mixmask.engine.progress import StepProgress, say
from mixmask.engine.randomness import derived_seed
from mixmask.engine.stopping import StopNow, StopSignals, lost_on_one_of_several, stopped
from mixmask.engine.watching import Sink

if TYPE_CHECKING:
    from torch import Tensor, nn

B = TypeVar("B")


def train(
    job: Job, batches: Callable[[int], Iterator[B]], losses: Callable[[B, int], Sequence[Part]]
) -> dict[str, float]:
    """Run a job from its checkpoint, or from the start, to its last step.

    Args:
        job: What is trained.
        batches: Given the first step, returns an iterator over the remaining batches.
        losses: Given a batch and its step, returns the parts of the step's loss. Each part is called without arguments
            and returns named scalars: ``loss`` is minimised, all are logged. The backward pass of a part runs before
            the next part is called; gradients and scalars are summed over the parts.

    Returns:
        ``seconds`` of this run including earlier, interrupted starts, the mean ``images_per_second`` of this start, and
        the values of the last evaluation in it.

    Raises:
        RunFailure: When the loss is not finite, or a checkpoint cannot be written; the last good checkpoint stays.
        Interrupted: After SIGTERM, SIGUSR2 or Ctrl-C, when the step has been finished and a checkpoint written.
    """
    return train_by(job, batches, lambda backward, batch, step: backward(losses(batch, step)))


def train_by(
    job: Job, batches: Callable[[int], Iterator[B]], passes: Callable[[Backward, B, int], Values]
) -> dict[str, float]:
    """Like `train`, but the passes of a step may be run in another way, such as a recording.

    Args:
        job: What is trained.
        batches: Given the first step, returns an iterator over the remaining batches.
        passes: Given what runs the parts of a loss forward and backward, a batch and its step, leaves the gradients in the
            model and returns the step's scalars.
    """
    from mixmask.engine.parts import Parts

    start = distributed.agreed(lambda: resume(job))
    first = start.step
    backward = partial(_backward, job, collectives.parallel(Parts(job.model), job.device))
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
        stop = stack.enter_context(StopSignals())
        for sink in sinks:
            stack.callback(sink.close)

        def evaluate(done: int) -> dict[str, float]:
            assert job.evaluate is not None
            window.settle()
            # Several ranks cannot leave in the middle of an evaluation, so they ask before it. And a stop during the
            # last evaluation must not cost any training.
            if distributed.world().size > 1 or done == job.num_steps:
                asked = stop.asked()
                save(job, Start(done, elapsed(), window.sums, to_evaluate=True))
                if asked is not None:
                    raise _stopped(job, done, asked)
            with progress.paused():
                try:
                    with stop.at_once():
                        values = job.evaluate()
                except StopNow:
                    save(job, Start(done, elapsed(), window.sums, to_evaluate=True))
                    raise _stopped(job, done, signal.Signals(stop.received[0])) from None
            _log(job, sinks, done, values)
            say(f"{job.title}: step {done}, " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
            return values

        if start.to_evaluate:
            evaluated = evaluate(first)
        for step in range(first, job.num_steps):
            for group, rate in zip(job.optimizer.param_groups, job.base_rates, strict=True):
                # SimSiam's predictor keeps its rate (arXiv:2011.10566, section 4.1).
                group["lr"] = rate if group.get("fixed_lr") else rate * job.schedule(step)
                if job.weight_decay is not None and group.get("decays"):
                    group["weight_decay"] = job.weight_decay(step)
            before = time.monotonic()
            batch = next(remaining)
            waited += time.monotonic() - before
            # Re-seed at every step: what the network draws (dropout) depends on the step and the rank only, so a
            # resumed run draws the same.
            torch.manual_seed(derived_seed(job.seed, "step", step, distributed.world().rank))

            window.add(step, passes(backward, batch, step))
            if job.before_step is not None:
                job.before_step()
            if job.clip_norm is not None:
                job.scaler.unscale_(job.optimizer)  # clip the true gradients, not those scaled for fp16
                torch.nn.utils.clip_grad_norm_(job.model.parameters(), job.clip_norm)
            job.scaler.step(job.optimizer)
            job.scaler.update()
            average_statistics(job.model)
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
                if warning is not None and not warned:  # repeated only if it had disappeared in between
                    say(f"{job.title}: step {done}: warning: {warning}")
                warned = warning is not None
            due = job.evaluate_every and (done % job.evaluate_every == 0 or done == job.num_steps)
            if due and job.evaluate is not None:
                evaluated = evaluate(done)
            elif done == job.num_steps:
                # The caller's final evaluation may take long, and a stop during it must not cost any training.
                window.settle()
                save(job, Start(done, elapsed(), window.sums))
            # Not after the last step: the training is complete and saved.
            stopped_by = stop.asked() if done < job.num_steps else None
            if stopped_by is not None or (done % job.checkpoint_every == 0 and done < job.num_steps):
                # Read pending values first: the checkpoint holds them, and a loss that is not finite must stop here.
                window.settle()
                save(job, Start(done, elapsed(), window.sums))
            if stopped_by is not None:
                raise _stopped(job, done, stopped_by)
        rate = progress.images_per_second
    require_finite(job, job.num_steps)
    job.model.eval()
    return {"seconds": elapsed(), "images_per_second": rate, **evaluated}


def _backward(job: Job, compute: nn.Module, parts: Sequence[Part]) -> Values:
    """Forward and backward over the parts of a step; returns each scalar, detached and summed over the parts."""
    job.optimizer.zero_grad(set_to_none=True)
    sums: Values = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        # Gradients add up locally; only the last part's backward averages them over ranks, one all-reduce per step.
        local = (
            compute.no_sync() if isinstance(compute, torch.nn.parallel.DistributedDataParallel) and not last else None
        )
        with local or contextlib.nullcontext():
            with autocast(job.device, job.precision):
                terms = compute(part)
            job.scaler.scale(terms["loss"]).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
    return sums


class _Window:
    """The means of the logged scalars since the last log line, and the check that the loss is finite.

    On a GPU a step's values are read one step later, while the next step already runs. Reading them at once would leave
    the device idle at every step. `settle` reads the values that are still pending.
    """

    def __init__(self, job: Job, sums: Mapping[str, tuple[float, int]]) -> None:
        self.job = job
        self.sums = dict(sums)  # not empty after a resume: the next log line has the same means
        self.status = ""
        self.pending: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        values = collectives.mean(torch.stack([*terms.values()]))
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.pending.append((step, [*terms], values, event))
        # On a GPU the newest step stays pending until the next one has been queued.
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
        with lost_on_one_of_several():
            job.run.log({"step": step, "of": job.num_steps, **values})
        for sink in sinks:
            sink.log(step, values)


def _stopped(job: Job, step: int, number: signal.Signals) -> Interrupted:
    return stopped(job.title, step, job.num_steps, number, job.run.checkpoint_file)
