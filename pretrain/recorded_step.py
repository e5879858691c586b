"""Pretraining steps whose passes are recorded as one CUDA graph (``compile: true``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mixmask.engine.job import Backward, Values
from mixmask.engine.loader import Batch
from mixmask.engine.precision import autocast
from mixmask.engine.recording import Recordable, Recorder
from mixmask.pretrain.diagnostics import diagnose
from mixmask.pretrain.network import Framework
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.step import Prepared, Shares, Term, batch_parts, compared, terms_of

Samples = tuple[Tensor, Tensor]  # the embeddings that diagnostics look at


class RecordedSteps:
    """Runs the passes of a step: all networks, losses and gradients are one graph.

    Outside of it stay augmentation and mixing, whose operations differ from step to step, and what follows the backward
    pass with other numbers in every step: optimizer, moving average and queue. Those are a few operations on all tensors
    together. Diagnostics wait for the device, so they stay outside, too.

    Args:
        framework: Its `Framework.recordable` is true.
        recipe: The run's recipe, without gradient accumulation.
        recorder: Records and replays.
    """

    def __init__(
        self, framework: Framework, recipe: PretrainRecipe, recorder: Recorder[tuple[Values, Samples]]
    ) -> None:
        self.framework = framework
        self.recipe = recipe
        self.recorder = recorder

    def __call__(self, backward: Backward, batch: Batch, step: int, diagnosed: bool) -> Values:
        """Run a step up to its gradients.

        Args:
            backward: Runs the forward and the backward pass of parts, in their order; returns their values.
            batch: The step's images.
            step: Its number.
            diagnosed: Also return the metrics of `pretrain.diagnostics`.

        Returns:
            The values of the step by name. The next step overwrites them.
        """
        if self.recorder.stopped:  # parts prepare their images one after another, which takes less memory
            return backward(batch_parts(self.framework, self.recipe, batch, step, diagnosed))
        device, precision = batch.views[0].device, self.recipe.precision
        with autocast(device, precision):
            passes = self.passes(backward, Shares(self.framework, self.recipe, batch, step))
        values, samples = self.recorder(passes)
        if not diagnosed:
            return values
        with autocast(device, precision):
            return values | {name: value.float() for name, value in diagnose(*samples).items()}

    def passes(self, backward: Backward, shares: Shares) -> Recordable[tuple[Values, Samples]]:
        """A step in a form that can be recorded; its images are augmented and mixed."""
        framework, mix = self.framework, self.recipe.mix
        prepared = shares.prepared(0)
        prepared = replace(prepared, mixtures=list(prepared.mixtures))
        known = {id(one): one for one in _tensors(prepared)}

        def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> tuple[Values, Samples]:
            samples: list[Samples] = []
            framework.fresh.clear()
            framework.settle()
            given = _with(prepared, dict(zip(known, inputs, strict=True)))
            terms = _sampled(terms_of(framework, mix, given, *generators), samples)
            values = backward(shares.parts(terms))
            framework.settle()
            return values, samples[0]

        return Recordable(
            inputs=list(known.values()),
            generators=[shares.shuffle(0)],
            form=(
                framework.phase,
                prepared.keys[0] is prepared.queries[0],
                *((one.name, one.switch, one.across, one.weight) for one in prepared.mixtures),
            ),
            run=run,
            remember=partial(_remember, framework),
            forget=framework.forget,
        )


def _remember(framework: Framework) -> Callable[[], None]:
    """What puts back the gradients and what the step left for `Framework.after_step`."""
    gradients = [(one, one.grad) for one in framework.parameters() if one.grad is not None]
    fresh = list(framework.fresh)

    def restore() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        framework.fresh[:] = fresh

    return restore


def _tensors(prepared: Prepared) -> Iterator[Tensor]:
    yield from (*prepared.queries, *prepared.keys)
    for mixture in prepared.mixtures:
        yield from (mixture.images, mixture.lam, mixture.perm)


def _with(prepared: Prepared, given: dict[int, Tensor]) -> Prepared:
    """The same with other tensors; those that were one tensor stay one."""

    def other(views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(given[id(view)] for view in views)

    mixtures = [
        replace(one, images=given[id(one.images)], lam=given[id(one.lam)], perm=given[id(one.perm)], mask=None)
        for one in prepared.mixtures
    ]
    return Prepared(other(prepared.queries), other(prepared.keys), mixtures)


def _sampled(terms: Iterator[Term], samples: list[Samples]) -> Iterator[Term]:
    for term in terms:
        if term.clean is not None:
            samples.append(compared(term.clean))
        yield term
