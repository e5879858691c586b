"""Deterministic kernels: on while a run works, off afterwards; resume on a GPU is equal to the bit."""

from __future__ import annotations

import pytest
import torch

from mixmask.engine.determinism import deterministic_kernels
from mixmask.engine.errors import ConfigError


def test_they_are_on_inside_and_as_before_outside() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before
    with deterministic_kernels(False):
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before
    with pytest.raises(ValueError, match="other"), deterministic_kernels(True):
        raise ValueError("other")
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    named = pytest.raises(ConfigError, match=r"deterministic: true: put_ has no deterministic kernel")
    with named, deterministic_kernels(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="shape"), deterministic_kernels(True):
        torch.zeros(3).view(2)
