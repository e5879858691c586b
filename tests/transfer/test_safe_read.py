"""Reading files that are damaged, hostile, large or old."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.backbones import load_backbone
from engine.errors import CheckpointError
from tests.transfer.checkpoint_files import save
from transfer.checkpoints.safe_read import read_tensors
from transfer.checkpoints.source import read_source


def test_damaged_files_are_named(resnet18: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        read_source(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_source(tmp_path)
    whole = save(tmp_path, load_backbone(resnet18)[0]).read_bytes()
    for name, content in (("half.pth", whole[: len(whole) // 2]), ("empty.pth", b""), ("text.pth", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_source(tmp_path / name)
    for name in ("backbone.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(resnet18.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match=f"{name}: truncated"):
            read_source(tmp_path / name)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (os.system, ("touch /tmp/mixmask-was-here",))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_by_name(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"model": Hostile()}))
    else:
        torch.save({"state_dict": Hostile()}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"refused, it holds more than tensors.*: (posix|os)\.system"):
        read_source(path)
    assert not Path("/tmp/mixmask-was-here").exists()


def test_a_hostile_function_of_numpy_is_refused(tmp_path: Path) -> None:
    class Loads:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (np.loadtxt, ("/etc/hostname",))

    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": Loads()}))
    with pytest.raises(CheckpointError, match=r"refused.*: numpy\S*\.loadtxt"):
        read_source(tmp_path / "x.pkl")


def test_settings_beside_the_tensors_do_no_harm(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    content = {"state_dict": state, "args": Namespace(lr=0.1), "best": np.float64(3.5), "where": tmp_path, "epoch": 3}
    for legacy in (False, True):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        assert len(read_source(tmp_path / "x.pth").account.used) == len(state)


def test_large_files_are_mapped(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    torch.save({"state_dict": state, "optimizer": {"state": [torch.zeros(10_000_000)]}}, tmp_path / "big.pth")
    save_file(state, tmp_path / "big.safetensors")
    for name in ("big.pth", "big.safetensors"):
        content = read_tensors(tmp_path / name)
        assert name in Path("/proc/self/maps").read_text()
        del content


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_every_plain_kind_are_restored(protocol: int, tmp_path: Path) -> None:
    arrays = {
        f"{kind}{order}": np.asfortranarray(np.arange(6).reshape(2, 3).astype(f"{order}{kind}"))
        for kind in ("f4", "f8", "f2", "i8", "u1")
        for order in "<>"
    }
    arrays |= {"empty": np.zeros((0, 3), dtype=np.float32), "none": np.array(7), "sure": np.array([True, False])}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "score": np.float64(2.5)}, protocol=protocol))
    back = read_tensors(path)
    assert back["score"] == 2.5
    for name, array in arrays.items():
        assert back["model"][name].shape == array.shape
        assert np.array_equal(back["model"][name], array), name


def test_arrays_that_hold_objects_are_refused(tmp_path: Path) -> None:
    """numpy's own restoring takes a pointer out of such a file."""
    for value in (np.array([{}], dtype=object), np.zeros(1, dtype=[("a", "O")]), np.zeros(2, dtype="V8")):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": value}))
        with pytest.raises(CheckpointError, match=r"refused.*: numpy\.dtype"):
            read_tensors(tmp_path / "x.pkl")
