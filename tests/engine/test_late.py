"""Libraries that are imported late behave like the libraries."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mixmask.engine import late


def test_it_is_the_library() -> None:
    assert late.torch.nn.Linear is torch.nn.Linear
    assert "imported when it is used" in repr(late.torch)
    with pytest.raises(AttributeError, match="no_such_name"):
        late.torch.no_such_name  # noqa: B018
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "no_such_name", 1, raising=False)
        assert late.torch.no_such_name == 1


def test_copies_are_the_library_itself() -> None:
    assert copy.copy(late.torch) is torch
    assert copy.deepcopy(late.torch) is torch
    assert pickle.loads(pickle.dumps(late.torch)) is torch
