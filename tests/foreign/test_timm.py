"""timm's tests of reading checkpoints, on our reader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixmask.transfer.checkpoints.safe_read import read_tensors
from tests.foreign.clones import clone, module_of

FILE = clone("timm", "timm_src", "pytorch-image-models") / "tests" / "test_checkpoint_loading.py"


def ours(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, read by us."""
    found = read_tensors(path).tensors
    return {name.removeprefix("state_dict."): stored.read() for name, stored in found.items()}


def test_a_namespace_beside_the_weights(tmp_path: Path) -> None:
    module = module_of(FILE)
    module.load_state_dict = ours
    module.test_weights_only_allows_argparse_namespace(tmp_path)


def test_an_object_of_a_class_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm refuses the file. We read the weights, name the class, and make no object of it."""
    module = module_of(FILE)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # so that its class can be pickled
    made: list[object] = []
    module._CustomPayload.__setstate__ = lambda self, state: made.append(self)
    read: list[str] = []

    def without_the_object(path: Path) -> dict[str, Tensor]:
        assert ours(path).keys() == {"layer.weight"}
        read.extend(read_tensors(path).notes())
        raise RuntimeError("No automatic unsafe pickle fallback is performed")  # what their test waits for

    module.load_state_dict = without_the_object
    module.test_weights_only_blocks_non_allowlisted_globals(tmp_path)
    assert any("_CustomPayload" in note for note in read)
    assert made == []


def test_the_weights_of_a_file_to_resume_from(tmp_path: Path) -> None:
    module = module_of(FILE)
    theirs = module.resume_checkpoint

    def ours_first(model: nn.Module, path: Path, **more: object) -> object:
        state = {name: value for name, value in ours(path).items() if not name.startswith("optimizer.")}
        result = theirs(model, path, **more)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        return result

    module.resume_checkpoint = ours_first
    module.test_resume_checkpoint_default_weights_only_namespace(tmp_path)
