"""Pretraining steps whose passes are recorded as one CUDA graph (``compile: true``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mixmask.engine.job import Part
from mixmask.engine.loader import Batch
from mixmask.engine.precision import autocast
from mixmask.engine.recording import Recordable, Recorder
from mixmask.pretrain.diagnostics import diagnose
from mixmask.pretrain.network import Framework
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.step import Prepared, Shares, Term, compared, terms_of

Values = dict[str, Tensor]
Samples = list[tuple[Tensor, Tensor]]  # the embeddings of a share that diagnostics look at
Backward = Callable[[Sequence[Part]], Values]


class RecordedSteps:
    """Runs the passes of a step: all networks, losses and gradients are one graph.

    Outside of it stay augmentation and mixing, whose operations differ from step to step, and what follows the backward
    pass with other numbers in every step: optimizer, moving average and queue. Those are a few operations on all tensors
    together. Diagnostics wait for the device, so they stay outside, too.

    Args:
        framework: Its `Framework.recordable` is true.
        recipe: The run's recipe.
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
        recipe = self.recipe
        device = batch.views[0].device
        with autocast(device, recipe.precision):
            passes = self.passes(backward, Shares(self.framework, recipe, batch, step))
        values, samples = self.recorder(passes)
        values = dict(values)
        if diagnosed:
            with autocast(device, recipe.precision):
                for pair in samples:
                    for name, value in diagnose(*pair).items():
                        values[name] = values.get(name, 0) + (value * (1 / recipe.accumulate)).float()
        return values

    def passes(self, backward: Backward, shares: Shares) -> Recordable[tuple[Values, Samples]]:
        """A step in a form that can be recorded; its images are augmented and mixed."""
        framework, recipe = self.framework, self.recipe
        prepared = [_drawn(shares.prepared(number)) for number in range(recipe.accumulate)]
        known = {id(one): one for share in prepared for one in _tensors(share)}

        def run(inputs: Sequence[Tensor], generators: Sequence[torch.Generator]) -> tuple[Values, Samples]:
            given = dict(zip(known, inputs, strict=True))
            samples: Samples = []
            framework.fresh.clear()
            framework.settle()
            parts = []
            for share, shuffle in zip(prepared, generators, strict=True):
                terms = terms_of(framework, recipe.mix, _with(share, given), shuffle)
                parts += shares.parts(_sampled(terms, samples))
            values = backward(parts)
            framework.settle()
            return values, samples

        form = [
            (
                share.keys[0] is share.queries[0],
                *((one.name, one.switch, one.across, one.weight) for one in share.mixtures),
            )
            for share in prepared
        ]
        return Recordable(
            inputs=list(known.values()),
            generators=[shares.shuffle(number) for number in range(recipe.accumulate)],
            form=(framework.phase, *form),
            run=run,
            remember=self.remember,
        )

    def remember(self) -> Callable[[], None]:
        """What puts back the gradients and what the step left for `Framework.after_step`."""
        gradients = [(one, one.grad) for one in self.framework.parameters() if one.grad is not None]
        fresh = list(self.framework.fresh)

        def restore() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            self.framework.fresh[:] = fresh

        return restore


def _drawn(prepared: Prepared) -> Prepared:
    return replace(prepared, mixtures=list(prepared.mixtures))


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


def _sampled(terms: Iterator[Term], samples: Samples) -> Iterator[Term]:
    for term in terms:
        if term.clean is not None:
            samples.append(compared(term.clean))
        yield term
