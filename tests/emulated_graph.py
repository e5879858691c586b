"""A CUDA graph without a GPU: operations on CPU tensors are recorded and replayed as a CUDA graph would replay them.

A replay starts the same operations on the same memory, with the numbers of the host as they were. So a step that reads
something else than the memory, which it is given anew, is wrong from the next step on. As on a GPU, recording does not
change any tensor, and it is an error to ask for a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
aten = torch.ops.aten
NEED_VALUES = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


def tensors_of(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


class Recorded(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()  # storages that were made inside
        self.made: list[Tensor] = []  # results that use them
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was there, and a copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masked = func is aten.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1])
        if func in NEED_VALUES or masked:
            raise RuntimeError("operation not permitted when stream is capturing")
        for one in tensors_of((args, kwargs)):
            where = one.untyped_storage()._cdata
            if where not in self.own and where not in self.before:
                self.before[where] = one, one.detach().clone()
        found = func(*args, **kwargs)
        known = {one.untyped_storage()._cdata for one in tensors_of((args, kwargs))}
        new = [one for one in tensors_of(found) if one.untyped_storage()._cdata not in known]
        self.own |= {one.untyped_storage()._cdata for one in new}
        self.made += new
        self.operations.append((func, args, kwargs, found))
        return found


class EmulatedGraph:
    """What `engine.recording.CUDAGraph` is on a GPU."""

    made = 0
    replays = 0

    def __init__(self) -> None:
        self.recorded = Recorded()

    def rehearse(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], T]) -> T:
        EmulatedGraph.made += 1
        try:
            with self.recorded:
                result = work()
        except RuntimeError as error:
            # A GPU says so at the end of any recording that has failed.
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            with torch.no_grad():
                for one, copy in self.recorded.before.values():
                    with torch.autograd._unsafe_preserve_version_counter(one):  # nothing was written
                        one.detach().copy_(copy)
                for one in self.recorded.made:
                    if one.is_floating_point() and one.untyped_storage()._cdata not in self.recorded.before:
                        one.detach().fill_(torch.nan)  # nothing was computed
        return result

    @torch.no_grad()
    def replay(self) -> None:
        EmulatedGraph.replays += 1
        for func, args, kwargs, result in self.recorded.operations:
            given = {one.untyped_storage()._cdata for one in tensors_of((args, kwargs))}
            for old, new in zip(tensors_of(result), tensors_of(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata not in given:
                    old.detach().copy_(new)
