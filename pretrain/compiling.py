"""``compile: true``: the encoders as compiled code, and on a GPU the whole step but for its ends as one CUDA graph."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from mixmask.engine.distributed import world
from mixmask.engine.progress import say
from mixmask.engine.recording import Graph, Recorder, StepGraph
from mixmask.pretrain.network import Framework
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.recorded_step import RecordedSteps


def compile_encoders(encoders: Iterable[nn.Module], device: torch.device) -> None:
    """Compile trunks in place, if this machine can; if not, the user is told why.

    Shapes are static in steps, so that nothing is compiled again; a framework with small crops has code for each shape.
    Evaluations run `uncompiled`.
    """
    why = obstacle(device)
    if why is not None:
        say(f"compile: true: {why}, so the encoders run operator by operator")
        return
    for encoder in encoders:
        encoder.compile(dynamic=False)


def recorded_steps(framework: Framework, recipe: PretrainRecipe, device: torch.device) -> RecordedSteps | None:
    """What runs the passes of steps as one CUDA graph; None if that is not possible here, and the user is told why."""
    new_graph = graphs_of(device)
    if new_graph is None:
        return None
    why = None
    if world().size > 1:
        why = f"{world().size} processes exchange gradients meanwhile"
    elif recipe.accumulate > 1:
        why = f"accumulate: {recipe.accumulate} saves memory, which a recording needs"
    elif not vars(type(framework)).get("recordable"):
        why = f"{type(framework).__name__}.recordable is not set: its steps may start other operations every time"
    if why is not None:
        say(f"compile: true: without CUDA graphs, because {why}")
        return None
    return RecordedSteps(framework, recipe, Recorder("compile: true: the step", new_graph))


def graphs_of(device: torch.device) -> Callable[[], Graph] | None:
    """What makes the graphs of a device; None if it has none."""
    return StepGraph if device.type == "cuda" else None


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let compiled parts of a model run operator by operator: batches of other sizes would each be compiled."""
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    before = [module._compiled_call_impl for module in compiled]
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(compiled, before, strict=True):
            module._compiled_call_impl = call


def obstacle(device: torch.device) -> str | None:
    """Why code cannot be compiled for a device here, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 0):
            return f"Triton needs a GPU of compute capability 7.0 or more, this one has {capability[0]}.{capability[1]}"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (install g++, or set CXX)"
    return None
